"""The projection φ = P·S·∇J: S keeps a random part of the coordinates, P is a sparse Johnson-Lindenstrauss transform.

Each kept coordinate is added, with a random sign, to one of k buckets (a count sketch; Charikar, Chen, Farach-Colton
2002; Weinberger et al. 2009), scaled so that E‖φ‖² = ‖∇J‖². Bucket and sign of a coordinate are a 64-bit
counter-based function of (seed, parameter name, coordinate) and of nothing else.

Two forms of S for a weight of shape (m, n), both at density p:
    uniform    every coordinate on its own; the full gradient of the layer is formed once per prompt.
    factored   a random subset of rows times a random subset of columns; with a the layer's input and δ the gradient
               of its output only δ[:, R]ᵀ a[:, C] is ever formed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cropi_core.counter import below, key64, random64
from cropi_core.errors import ProjectionError
from data_schemas.config import Projection


@dataclass(frozen=True)
class ParameterSketch:
    """What the projection does to one parameter of shape (m, n); a vector is (m, 1).

    Attributes:
        name: The parameter's name in the model.
        shape: (m, n).
        offset: First column of ``out`` it writes; only ``projection.kind=none`` has one other than 0.
        k: Buckets; 0 when the gradient is stored whole.
        cells: (kept,) int32: bucket of each kept coordinate, plus k when its sign is negative.
        rows: (|R|,) kept rows, sorted; None unless factored.
        columns: (|C|,) kept columns, sorted; None unless factored.
        kept: (kept,) kept flat coordinates, sorted; None unless uniform.
        scale: sqrt(m·n / kept), which makes ‖φ‖² unbiased.
    """

    name: str
    shape: tuple[int, int]
    offset: int
    k: int
    cells: Tensor
    rows: Tensor | None
    columns: Tensor | None
    kept: Tensor | None
    scale: float

    @property
    def coverage(self) -> float:
        """Share of the parameter's coordinates that are kept."""
        return 1.0 if self.k == 0 else self.cells.numel() / (self.shape[0] * self.shape[1])

    def add_outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Add the sketch of Σ_s left_s rightᵀ_s for every prompt.

        Args:
            left: (prompts, S, m): for a linear layer the gradient of its output.
            right: (prompts, S, n): its input.
            out: (prompts, width) float32 accumulator, see :func:`fold`.
        """
        if self.rows is not None and self.columns is not None:
            left, right = left.index_select(2, self.rows), right.index_select(2, self.columns)
            self._add_cells(torch.bmm(left.float().transpose(1, 2), right.float()).flatten(1), out)
            return
        for p in range(left.shape[0]):  # one prompt at a time: the full block is as large as the weight
            self._add_full(left[p].float().T @ right[p].float(), out[p])

    def add_rows(self, indices: Tensor, values: Tensor, out: Tensor) -> None:
        """Add the sketch of Σ_s e_{index_s} valueᵀ_s: the gradient of an embedding.

        Args:
            indices: (prompts, S) row numbers, the token ids.
            values: (prompts, S, n) gradients of the embedded tokens.
            out: (prompts, width) accumulator.
        """
        for p in range(indices.shape[0]):
            unique, inverse = indices[p].unique(return_inverse=True)
            summed = torch.zeros(len(unique), values.shape[2], device=values.device)
            summed.index_add_(0, inverse, values[p].float())
            self._add_some_rows(unique, summed, out[p])

    def add_vector(self, values: Tensor, out: Tensor) -> None:
        """Add the sketch of a vector parameter's gradient.

        Args:
            values: (prompts, m).
            out: (prompts, width) accumulator.
        """
        values = values.float()
        if self.k == 0:
            out[:, self.offset : self.offset + self.shape[0]] += values
            return
        index = self.rows if self.rows is not None else self.kept
        assert index is not None
        self._add_cells(values.index_select(1, index), out)

    def _add_cells(self, values: Tensor, out: Tensor) -> None:
        """Add (prompts, kept) values of all kept coordinates to their buckets."""
        for p in range(values.shape[0]):  # one-dimensional: the buckets of a prompt stay in the cache
            out[p].index_add_(0, self.cells, values[p], alpha=self.scale)

    def _add_full(self, gradient: Tensor, out: Tensor) -> None:
        """Add one prompt's whole (m, n) gradient."""
        if self.k == 0:
            out[self.offset : self.offset + gradient.numel()] += gradient.flatten()
            return
        assert self.kept is not None
        out.index_add_(0, self.cells, gradient.flatten().index_select(0, self.kept), alpha=self.scale)

    def _add_some_rows(self, rows: Tensor, values: Tensor, out: Tensor) -> None:
        """Add (u, n) gradients of ``rows`` (u,), all other rows being zero."""
        n = self.shape[1]
        if self.k == 0:
            out[self.offset : self.offset + self.shape[0] * n].view(-1, n).index_add_(0, rows, values)
        elif self.rows is not None and self.columns is not None:
            place = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
            hit = self.rows[place] == rows
            width = len(self.columns)
            cells = self.cells.view(-1, width)[place[hit]]
            block = values[hit].index_select(1, self.columns)
            out.index_add_(0, cells.flatten(), block.flatten(), alpha=self.scale)
        else:
            assert self.kept is not None
            begin = torch.searchsorted(self.kept, rows * n)
            count = torch.searchsorted(self.kept, (rows + 1) * n) - begin
            which = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
            within = torch.arange(len(which), device=rows.device) - (count.cumsum(0) - count)[which]
            place = begin[which] + within
            picked = values[which, self.kept[place] - rows[which] * n]
            out.index_add_(0, self.cells[place], picked, alpha=self.scale)


def fold(out: Tensor, projection: Projection) -> Tensor:
    """Turn accumulators (prompts, 2k) into features (prompts, k): positive buckets minus negative ones."""
    if projection.kind == "none":
        return out
    return out[:, : projection.k] - out[:, projection.k :]


def width(sketches: dict[str, ParameterSketch], projection: Projection) -> int:
    """Return the columns of an accumulator."""
    if projection.kind == "none":
        return sum(math.prod(s.shape) for s in sketches.values())
    return 2 * projection.k


def dimension(sketches: dict[str, ParameterSketch], projection: Projection) -> int:
    """Return the dimension of a feature."""
    return projection.k if projection.kind == "sjlt" else width(sketches, projection)


def build_sketches(
    shapes: dict[str, tuple[int, ...]], projection: Projection, device: torch.device
) -> dict[str, ParameterSketch]:
    """Plan the projection of every parameter.

    Args:
        shapes: Shape of each parameter that trains, by name; one or two dimensions.
        projection: The choices.
        device: Where the indices live; their values do not depend on it.

    Raises:
        ProjectionError: A parameter has more than two dimensions.
    """
    sketches, offset = {}, 0
    for name, shape in shapes.items():
        if not 1 <= len(shape) <= 2:
            raise ProjectionError(
                f"parameter {name} has shape {shape}; only vectors and matrices are supported"
            )
        m, n = shape[0], shape[1] if len(shape) == 2 else 1
        sketches[name] = _sketch(name, m, n, offset, projection, device)
        offset += m * n if projection.kind == "none" else 0
    return sketches


def _sketch(
    name: str, m: int, n: int, offset: int, projection: Projection, device: torch.device
) -> ParameterSketch:
    if projection.kind == "none":
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return ParameterSketch(name, (m, n), offset, 0, empty, None, None, None, 1.0)
    rows = columns = kept = None
    if projection.form == "factored":
        rows, columns = _rows_and_columns(name, m, n, projection, device)
        flat = (rows[:, None] * n + columns[None, :]).flatten()
    else:
        kept = flat = _smallest(key64("subset", projection.seed, name), m * n, projection.density, device)
    bits = random64(key64("sjlt", projection.seed, name), flat)
    # The lowest bit is the sign, the upper 32 the bucket: they never overlap.
    cells = (below(bits, projection.k) + (bits & 1) * projection.k).to(torch.int32)
    scale = math.sqrt(m * n / flat.numel())
    return ParameterSketch(name, (m, n), 0, projection.k, cells, rows, columns, kept, scale)


def _smallest(key: int, size: int, share: float, device: torch.device) -> Tensor:
    """Choose round(share·size) of ``size`` numbers, at least one: those with the smallest random bits, sorted."""
    count = max(1, round(share * size))
    if count == size:
        return torch.arange(size, device=device)
    bits = random64(key, torch.arange(size, device=device))
    return bits.topk(count, largest=False, sorted=False).indices.sort().values


def _rows_and_columns(
    name: str, m: int, n: int, projection: Projection, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Choose |R| ≈ m√p rows and then as many columns as bring |R||C| nearest to p·m·n."""
    p = projection.density
    wanted_rows = m * p if n == 1 else m * math.sqrt(p)
    count = min(m, max(1, round(wanted_rows)))
    columns = min(n, max(1, round(p * m * n / count)))
    count = min(m, max(1, round(p * m * n / columns)))  # a short side was rounded: mend it on the other
    key = projection.seed
    return (
        _smallest(key64("rows", key, name), m, count / m, device),
        _smallest(key64("columns", key, name), n, columns / n, device),
    )


def self_test(
    sketches: dict[str, ParameterSketch], projection: Projection, device: torch.device, pairs: int = 4
) -> dict[str, float]:
    """Check the projection on random vectors before any model work.

    Kept coordinates of ``pairs`` pairs of Gaussian vectors of known cosine are projected; the norm ratio and the
    cosine must lie within six standard deviations of their expectation (Johnson-Lindenstrauss: variance about 2/k for
    ‖φ‖², plus that of which coordinates were kept), and every parameter must be covered in proportion to its size.

    Returns:
        ``norm_ratio`` (mean), ``cosine_error`` (largest), ``coverage`` (of all), ``coverage_min``, ``coverage_max``.

    Raises:
        ProjectionError: A figure is off; names it with its bound.
    """
    if projection.kind == "none":
        return {
            "norm_ratio": 1.0,
            "cosine_error": 0.0,
            "coverage": 1.0,
            "coverage_min": 1.0,
            "coverage_max": 1.0,
        }
    size = sum(math.prod(s.shape) for s in sketches.values())
    kept = sum(s.cells.numel() for s in sketches.values())
    _check_coverage(sketches, projection)
    ratios, errors = [], []
    for pair in range(pairs):
        total = torch.zeros(2, 2 * projection.k, device=device)
        for name, sketch in sketches.items():
            generator = torch.Generator().manual_seed(key64("self-test", pair, name) % (1 << 62))
            x, y = torch.randn(2, sketch.cells.numel(), generator=generator).to(device)
            for row, values in enumerate((x, 0.6 * x + 0.8 * y)):
                total[row].index_add_(0, sketch.cells, values, alpha=sketch.scale)
        a, b = fold(total, projection)
        ratios += [float(a.square().sum()) / size, float(b.square().sum()) / size]
        errors.append(abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0)) - 0.6))
    # Parameters kept at unequal scale add to the spread; the exact variance of the sum of squares is used.
    fourth = sum(s.cells.numel() * s.scale**4 for s in sketches.values())
    deviation = math.sqrt(2 / projection.k + 2 * fourth / size**2)
    bound = 6 * deviation
    ratio, error = sum(ratios) / len(ratios), max(errors)
    if not all(abs(r - 1) < bound for r in ratios):
        raise ProjectionError(
            f"projection self-test: norm ratios {ratios} are off 1 by more than {bound:.3g}"
        )
    if error > bound:
        raise ProjectionError(
            f"projection self-test: a cosine of 0.6 came out {error:.3g} off, bound {bound:.3g}"
        )
    coverages = [s.coverage for s in sketches.values()]
    return {
        "norm_ratio": ratio,
        "cosine_error": error,
        "coverage": kept / size,
        "coverage_min": min(coverages),
        "coverage_max": max(coverages),
    }


def _check_coverage(sketches: dict[str, ParameterSketch], projection: Projection) -> None:
    """Check that every parameter keeps its share, up to the rounding of its own shape."""
    for sketch in sketches.values():
        m, n = sketch.shape
        kept, wanted = sketch.cells.numel(), projection.density * m * n
        # One row or column more or less is the finest step a factored subset can take.
        step = (
            max(len(sketch.rows), len(sketch.columns))
            if sketch.rows is not None and sketch.columns is not None
            else 1
        )
        if abs(kept - wanted) > max(1, step):
            raise ProjectionError(
                f"projection self-test: {sketch.name} {sketch.shape} keeps {kept} coordinates, "
                f"{wanted:.0f} are due at density {projection.density}"
            )
