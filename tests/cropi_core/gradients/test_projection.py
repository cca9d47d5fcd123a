"""The projection preserves inner products, covers every layer, and is the same on every machine."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_core.errors import ProjectionError
from cropi_core.gradients import projection as projections
from cropi_core.gradients.folding import Fold
from cropi_core.gradients.projection import build_sketches, fold, width
from cropi_core.gradients.self_checks import self_test
from cropi_core.random_bits import below, key64, random64, uniform
from data_schemas.gradients import Projection
from tests.support import processes

CPU = torch.device("cpu")
KNOWN = (1, 4, [996, 835, 461, 767], 20, 15)
KNOWN_FOLD = ((0, 7, 7, 10), [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0], (0, 9, 4, 0), [1935, 627, 1658, 1119])
SHAPES = {"embed": (300, 40), "up": (96, 40), "down": (40, 96), "norm": (40,), "head": (300, 40)}


def splitmix64(key, counter):
    """Implement SplitMix64 with Python integers, as published."""
    mask = (1 << 64) - 1
    x = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def project(sketches, projection, gradients):
    """Project complete gradients {name: (m, n)} with add_outer and an identity."""
    out = torch.zeros(1, width(sketches, projection))
    for name, sketch in sketches.items():
        g = gradients[name].reshape(sketch.shape)
        if len(SHAPES[name]) == 1:
            sketch.add_vector(g.T, out)
        else:
            left, right = sketch.reduce_left(torch.eye(g.shape[0])), sketch.reduce_right(g)
            sketch.add_outer(left, right, [0, g.shape[0]], out)
    return fold(out, projection)[0]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_counter_is_splitmix64_past_32_bits(key, counter):
    """Mistake 7: 64-bit counters; the torch arithmetic is the published generator, wrap-around included."""
    bits = int(random64(key, torch.tensor([counter]))[0])
    assert bits % (1 << 64) == splitmix64(key, counter)


def test_values_depend_on_their_counter_alone():
    whole = random64(7, torch.arange(1000))
    assert torch.equal(random64(7, torch.arange(400, 500)), whole[400:500])
    assert torch.equal(random64(torch.tensor([7, 8])[:, None], torch.arange(3))[0], whole[:3])


def test_uniform_and_below_are_uniform():
    u = uniform(3, torch.arange(100_000)).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount((u * 20).astype(int), minlength=20)
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 19 degrees of freedom, p ≈ 0.0007
    buckets = below(random64(4, torch.arange(70_000)), 7).numpy()
    assert set(buckets) == set(range(7))
    assert ((np.bincount(buckets) - 10_000) ** 2 / 10_000).sum() < 25


@pytest.mark.parametrize("form", ["folded", "factored", "uniform"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_inner_products_within_the_johnson_lindenstrauss_bound(form, density):
    """Mean error close to 0 and tails according to the variance, for gradients of low rank like those of layers."""
    k, errors = 512, []
    generator = torch.Generator().manual_seed(0)
    for seed in range(30):
        projection = Projection(k=k, density=density, form=form, seed=seed, min_side=1)
        sketches = build_sketches(SHAPES, projection, CPU)
        x = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        y = {n: 0.5 * x[n] + math.sqrt(0.75) * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        a, b = project(sketches, projection, x), project(sketches, projection, y)
        errors.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0)) - 0.5)
    # Variance of the estimated cosine: (1 − c²)²/k of the sketch, and the same over the kept coordinates.
    kept = sum(s.cells.numel() for s in sketches.values())
    deviation = 0.75 * math.sqrt(1 / k + (1 / kept if density < 1 else 0))
    assert abs(np.mean(errors)) < 4 * deviation / math.sqrt(len(errors))
    assert np.quantile(np.abs(errors), 0.95) < 3 * deviation
    assert 0.5 * deviation < np.std(errors) < 1.7 * deviation


@pytest.mark.parametrize("form", ["folded", "factored", "uniform"])
def test_norm_is_unbiased(form):
    ratios = []
    generator = torch.Generator().manual_seed(1)
    for seed in range(60):
        projection = Projection(k=256, density=0.2, form=form, seed=seed, min_side=1)
        sketches = build_sketches(SHAPES, projection, CPU)
        x = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        full = sum(float(v.square().sum()) for v in x.values())
        ratios.append(float(project(sketches, projection, x).square().sum()) / full)
    assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios) / math.sqrt(len(ratios))


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_folding_covers_every_coordinate_and_keeps_short_sides(density):
    """Mistake 1: every coordinate of every layer reaches the sketch; density and length determine what a side keeps."""
    sketches = build_sketches(SHAPES, Projection(density=density, form="folded", min_side=30), CPU)
    for name, sketch in sketches.items():
        m, n = sketch.shape
        for side, size in ((sketch.left, m), (sketch.right, n)):
            wanted = size if n == 1 else min(size, max(30, round(size * math.sqrt(density))))
            assert side.size == wanted, name
            present, places, signs = side.find(torch.arange(size))
            assert present.all()
            assert set(places.tolist()) == set(range(side.size)), "no place stays empty"
            assert set(signs.tolist()) <= {-1.0, 1.0}
            assert torch.equal(side.reduce(torch.eye(size)), torch.eye(side.size)[places] * signs[:, None])


def test_two_coordinates_rarely_meet_in_a_fold():
    """At most once in `size` folds for any two coordinates, as the variance bound of a count sketch requires."""
    size, folds = 16, 4000
    together = torch.zeros(50, 50)
    for seed in range(folds):
        side = Fold.make(seed, 50, size, CPU)
        _, places, _ = side.find(torch.arange(50))
        together += places[:, None] == places[None]
    off = together - torch.diag(together.diag())
    assert float(off.max()) / folds < 1 / size + 5 * math.sqrt(1 / size / folds)


@pytest.mark.parametrize("form", ["factored", "uniform"])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_every_layer_is_covered_in_proportion(form, density):
    """Mistake 1: no layer is dropped, none is kept completely; kept coordinates are spread over the whole layer."""
    sketches = build_sketches(SHAPES, Projection(density=density, form=form), CPU)
    for sketch in sketches.values():
        m, n = sketch.shape
        step = 1 if form == "uniform" or n == 1 else max(sketch.left.size, sketch.right.size)
        assert abs(sketch.cells.numel() - density * m * n) <= max(1, step)
        index = sketch.left.index if sketch.left is not None else sketch.kept
        size = m if sketch.left is not None else m * n
        if len(index) >= 10:  # uniform over the whole range: both halves are sampled
            assert 0.2 < float((index < size / 2).float().mean()) < 0.8


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.floats(0.001, 1), st.sampled_from(["factored", "uniform"]))
def test_indices_are_integers_within_bounds(m, n, density, form):
    sketch = build_sketches({"w": (m, n)}, Projection(k=32, density=density, form=form), CPU)["w"]
    cells = sketch.cells.numel()
    assert 1 <= cells <= m * n
    assert int(sketch.cells.min()) >= 0
    assert int(sketch.cells.max()) < 64
    assert sketch.scale == pytest.approx(math.sqrt(m * n / cells))
    flat = flat_of(sketch)
    assert len(flat.unique()) == cells
    assert int(flat.max()) < m * n


def flat_of(sketch):
    """Return the flat coordinates that a sketch keeps."""
    if sketch.kept is not None:
        return sketch.kept
    return (sketch.left.index[:, None] * sketch.shape[1] + sketch.right.index).flatten()


def test_a_coordinate_keeps_its_bucket_in_both_forms():
    """Bucket and sign depend only on (seed, name, coordinate)."""
    sketches = [
        build_sketches({"w": (50, 30)}, Projection(k=64, density=d, form=f), CPU)["w"]
        for d, f in [(1.0, "uniform"), (0.3, "uniform"), (0.3, "factored")]
    ]
    whole = sketches[0].cells
    assert torch.equal(sketches[1].cells, whole[sketches[1].kept])
    flat = flat_of(sketches[2])
    assert torch.equal(sketches[2].cells, whole[flat])
    other = build_sketches({"v": (50, 30)}, Projection(k=64, density=1.0, form="uniform"), CPU)["v"]
    assert float((other.cells == whole).float().mean()) < 0.1


def test_known_answer():
    """The projection is part of the artifacts' format: these numbers may change only with a new algorithm version."""
    shape = {"model.layers.0.w": (64, 48)}
    factored = build_sketches(shape, Projection(k=1000, density=0.1, form="factored"), CPU)[
        "model.layers.0.w"
    ]
    first = (
        int(factored.left.index[0]),
        int(factored.right.index[0]),
        factored.cells[:4].tolist(),
        factored.left.size,
        factored.right.size,
    )
    assert first == KNOWN, first
    folded = build_sketches(shape, Projection(k=1000, density=0.1, min_side=1), CPU)["model.layers.0.w"]
    again = (
        folded.left.shifts,
        folded.left.signs[:6].tolist(),
        folded.right.shifts,
        folded.cells[:4].tolist(),
    )
    assert again == KNOWN_FOLD, again
    assert key64("a", "bc") != key64("ab", "c")


def test_self_test_passes_and_refuses():
    """A projection that returns zeros, drops signs or skips a layer is rejected before model work."""
    projection = Projection(k=256, density=0.5, form="factored")
    good = build_sketches(SHAPES, projection, CPU)
    figures = self_test(good, projection, CPU)
    assert abs(figures["norm_ratio"] - 1) < 0.2
    assert figures["coverage"] == pytest.approx(0.5, abs=0.02)

    from dataclasses import replace

    collapsed = {n: replace(s, cells=torch.zeros_like(s.cells)) for n, s in good.items()}
    with pytest.raises(ProjectionError, match="self-test"):
        self_test(collapsed, projection, CPU)
    unscaled = {n: replace(s, scale=1.0) for n, s in good.items()}
    with pytest.raises(ProjectionError, match="norm ratio"):
        self_test(unscaled, projection, CPU)
    few = build_sketches(SHAPES, Projection(k=256, density=0.05, form="factored"), CPU)
    with pytest.raises(ProjectionError, match="keeps"):
        self_test(good | {"up": few["up"]}, projection, CPU)


def test_three_dimensions_are_refused_by_name():
    with pytest.raises(ProjectionError, match=r"experts\.w"):
        build_sketches({"experts.w": (4, 8, 8)}, Projection(), CPU)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
def test_a_subset_chosen_in_pieces_is_that_of_the_smallest_bits(share, monkeypatch):
    """The bits are never together in memory; a range that misses the threshold is widened."""
    monkeypatch.setattr(projections, "PIECE", 700)
    for key, size in ((5, 1), (6, 699), (7, 10_001)):
        chosen = projections._smallest(key, size, share, CPU)
        count = max(1, round(share * size))
        bits = random64(key, torch.arange(size))
        assert torch.equal(chosen, bits.topk(count, largest=False).indices.sort().values)


PEAK = """
import torch
from cropi_core.gradients.projection import build_sketches
from cropi_core.system import peak_resident, resident
from data_schemas.gradients import Projection
torch.set_num_threads(1)
projection = Projection(form="uniform", density=0.1)
build_sketches({"small": (100, 100)}, projection, torch.device("cpu"))
before = resident()
build_sketches({"head": (10_000, 3_000)}, projection, torch.device("cpu"))
print((peak_resident() - before) / 30e6)
"""


def test_a_uniform_subset_is_built_within_eight_bytes_a_coordinate():
    done = processes.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert float(done.stdout) < 8 + 6 * 8 * projections.PIECE / 30e6, done.stderr[
        -2000:
    ]  # the rest: one piece
