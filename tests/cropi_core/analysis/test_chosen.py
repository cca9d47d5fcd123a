"""Analysis of selected prompts: against hand calculations, by property, and on the artifacts of a run."""

import itertools
import json
import logging
import math
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cropi_core.analysis import change, contrast, level_numbers, load_embedder, redundancy, similarity
from cropi_core.analysis.columns import compared_features
from cropi_core.analysis.contrast import Change, Contrast, Z, chance_jaccard, fixed
from cropi_core.analysis.findings import later_is_harder, over_stages
from cropi_core.analysis.likeness import pair_figures, unit
from cropi_core.analysis.sentences import INSTALL, prompt_text
from cropi_core.errors import ConfigError
from cropi_core.gradients.store import GradientStore
from tests.support import processes

values = st.lists(st.integers(-8, 8).map(lambda n: n / 4) | st.just(math.nan), min_size=2, max_size=24)


def masks(length: int, seed: int, share: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).random(length) < share


# -- selection and pool --------------------------------------------------------------------------------------


def test_a_contrast_counted_by_hand() -> None:
    found = contrast(np.array([0.0, 1, 2, 3, math.nan]), np.array([1, 1, 0, 0, 1], dtype=bool))
    assert found is not None
    assert (found.pool_count, found.selected_count, found.pool_mean, found.selected_mean) == (4, 2, 1.5, 0.5)
    # The six pairs of 0, 1, 2, 3 have means 0.5, 1, 1.5, 1.5, 2, 2.5 with variance 2.5 / 6.
    assert found.low == pytest.approx(1.5 - Z * math.sqrt(2.5 / 6))
    assert found.high == pytest.approx(1.5 + Z * math.sqrt(2.5 / 6))
    assert found.side == "like chance"
    assert found.reach == pytest.approx(-1 / (Z * math.sqrt(2.5 / 6)))


@given(values, st.integers(1, 5))
def test_chance_is_what_all_subsets_of_that_size_have(raw: list[float], size: int) -> None:
    known = [value for value in raw if not math.isnan(value)][:9]
    assume(len(known) >= 2 and size <= len(known))
    found = contrast(np.array(known), np.arange(len(known)) < size)
    means = [float(np.mean(subset)) for subset in itertools.combinations(known, size)]
    assert found is not None
    assert found.pool_mean == pytest.approx(np.mean(means))
    assert (found.high - found.low) / 2 == pytest.approx(Z * np.std(means), abs=1e-9)


@given(values)
def test_the_whole_pool_does_not_differ_from_itself(raw: list[float]) -> None:
    found = contrast(np.array(raw), np.ones(len(raw), dtype=bool))
    if found is not None:
        assert found.selected_mean == found.pool_mean
        assert (found.side, found.reach) == ("like chance", None)


@given(values, st.integers(0, 99), st.randoms())
def test_the_order_of_rows_changes_nothing(raw: list[float], seed: int, random) -> None:
    x, one, other = np.array(raw), masks(len(raw), seed), masks(len(raw), seed + 1)
    mixed = list(range(len(raw)))
    random.shuffle(mixed)
    for found, again in (
        (contrast(x, one), contrast(x[mixed], one[mixed])),
        (change(x, one, other), change(x[mixed], one[mixed], other[mixed])),
    ):
        assert (found is None) == (again is None)
        if found is not None and again is not None:
            assert vars(again) == pytest.approx(vars(found), abs=1e-12)
            assert again.side == found.side


@given(st.lists(st.integers(0, 10**6), min_size=10, max_size=60, unique=True))
def test_the_lowest_are_lower_and_the_highest_higher(raw: list[int]) -> None:
    x = np.array(raw, dtype=float)
    order = np.argsort(x)
    for rows, side, beyond in ((order[: len(x) // 4], "lower", -1), (order[-(len(x) // 4) :], "higher", 1)):
        found = contrast(x, np.isin(np.arange(len(x)), rows))
        assert found is not None
        assert np.sign(found.selected_mean - found.pool_mean) == beyond
        assert found.side in (side, "like chance")
    even = np.arange(100.0)
    found = contrast(even, even < 10)
    assert found is not None
    assert found.side == "lower"


def test_a_random_tenth_is_beyond_chance_about_one_time_in_twenty() -> None:
    random = np.random.default_rng(0)
    x = random.gamma(1.0, size=1000)  # skewed, like entropies
    sides = []
    for _ in range(2000):
        found = contrast(x, np.isin(np.arange(1000), random.choice(1000, 100, replace=False)))
        assert found is not None
        sides.append(found.side != "like chance")
    assert 0.03 < np.mean(sides) < 0.07


def test_unknown_values_give_no_contrast() -> None:
    nothing = np.full(4, math.nan)
    assert contrast(nothing, np.ones(4, dtype=bool)) is None
    assert contrast(np.arange(4.0), np.zeros(4, dtype=bool)) is None
    constant = contrast(np.full(7, 0.1), np.arange(7) < 3)
    assert constant is not None
    assert constant.side == "like chance"


# -- from stage to stage -------------------------------------------------------------------------------------


def test_two_selections_without_a_prompt_in_common_are_compared_as_welch_does() -> None:
    x = np.array([1.0, 2, 3, 5, 6, 10])
    found = change(x, np.arange(6) < 3, np.arange(6) >= 3)
    assert found is not None
    assert (found.before, found.after, found.difference) == (2.0, 7.0, 5.0)
    # Variances of the means, 2/3 / 3 and 14/3 / 3, as of six prompts.
    half = Z * math.sqrt((2 / 9 + 14 / 9) * 6 / 5)
    assert (found.low, found.high) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert found.side == "higher"


@given(values, st.integers(0, 99))
def test_a_selection_has_not_moved_from_itself_and_going_back_is_the_opposite(
    raw: list[float], seed: int
) -> None:
    x, one, other = np.array(raw), masks(len(raw), seed), masks(len(raw), seed + 1)
    same, there, back = change(x, one, one), change(x, one, other), change(x, other, one)
    if same is not None:
        assert (same.difference, same.low, same.high, same.side) == (0, 0, 0, "like chance")
    if there is not None and back is not None:
        assert back.difference == pytest.approx(-there.difference)
        assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))


@pytest.mark.parametrize(
    ("levels", "numbers"),
    [
        (["Level 3", "Level 5", None, ""], [3, 5, math.nan, math.nan]),
        (["2", "0.5", "-1"], [2, 0.5, -1]),
        (["3", "easy"], [math.nan, math.nan]),
        (["grade 3 of 12"], [math.nan]),
        (["9" * 400, "3"], [math.nan, math.nan]),
        ([], []),
    ],
)
def test_levels_are_numbers_where_all_of_them_are(levels: list, numbers: list[float]) -> None:
    assert level_numbers(levels) == pytest.approx(numbers, nan_ok=True)


def test_chance_has_a_jaccard_index() -> None:
    assert chance_jaccard(10, 10, 100) == pytest.approx(1 / 19)
    assert chance_jaccard(5, 5, 5) == 1
    assert chance_jaccard(0, 0, 5) is None


# -- cosines -------------------------------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    prompts = np.array([[2.0, 0], [0, 3], [1, 1], [0, 0]])
    mean, nearest = similarity(prompts, np.array([[5.0, 0], [0, 0.1], [0, 0]]))
    half = math.sqrt(0.5)
    assert mean == pytest.approx([0.5, 0.5, half, math.nan], nan_ok=True, abs=1e-6)
    assert nearest == pytest.approx([1, 1, half, math.nan], nan_ok=True, abs=1e-6)
    assert np.isnan(similarity(prompts, np.zeros((2, 2)))[0]).all()


def test_pairs_by_hand() -> None:
    rows = unit(np.array([[1.0, 0], [0, 1], [1, 1]]))
    half = math.sqrt(0.5)
    mean, nearest = pair_figures(rows @ rows.T)
    assert mean == pytest.approx(2 * half / 3)
    assert nearest == pytest.approx(half)


def test_copies_are_redundant_and_a_random_subset_is_like_chance() -> None:
    random = np.random.default_rng(0)
    pool = random.normal(size=(120, 64)).astype(np.float32)
    pool[:20] = pool[:1] + 0.1 * random.normal(size=(20, 64))
    found = redundancy(pool[:20], pool)
    assert {name: one.side for name, one in found.items()} == {"alike": "higher", "nearest": "higher"}
    assert found["alike"].selected_mean > 0.9
    plain = random.normal(size=(120, 64))
    drawn = [redundancy(plain[random.choice(120, 20, replace=False)], plain, seed=i) for i in range(40)]
    assert sum(one["alike"].side == "like chance" for one in drawn) >= 34  # 38 are expected
    mixed = random.permutation(20)
    again = redundancy(pool[:20][mixed], pool)
    assert again["alike"].selected_mean == pytest.approx(found["alike"].selected_mean, abs=1e-6)
    whole = redundancy(pool, pool)
    assert whole["alike"].selected_mean == pytest.approx(whole["alike"].pool_mean, abs=1e-6)
    assert whole["alike"].side == whole["nearest"].side == "like chance"
    assert redundancy(pool[:1], pool) == {}


def test_the_rows_that_are_compared_are_those_of_the_store(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(50)]
    features = random.normal(size=(50, 8)).astype(np.float32)
    status = np.where(np.arange(50) % 5 == 0, 1, 0).astype(np.uint8)
    store = GradientStore.create(
        tmp_path / "g.zarr", ids, k=8, dtype="float32", rows_per_shard=16, attributes={}
    )
    for shard in range(store.shards):
        rows = slice(store.shard_rows(shard).start, store.shard_rows(shard).stop)
        store.write_shard(shard, features[rows], {"status": status[rows]})
    store.finish()
    # The pool's order differs from the store's, and it has a prompt that the store lacks.
    pool = [*reversed(ids), "elsewhere"]
    selected = np.array([name in {"p1", "p5", "p7", "p49", "elsewhere"} for name in pool])
    ours, theirs = compared_features(GradientStore.open(tmp_path / "g.zarr"), pool, selected, seed=0)
    assert np.array_equal(ours, features[[1, 7, 49]])  # p5 has no gradient
    assert np.array_equal(theirs, features[status == 0])
    monkeypatch.setattr("cropi_core.analysis.columns.MOST_CHOSEN", 2)
    monkeypatch.setattr("cropi_core.analysis.columns.MOST_POOL", 10)
    few, some = compared_features(GradientStore.open(tmp_path / "g.zarr"), pool, selected, seed=0)
    assert (len(few), len(some)) == (2, 10)
    live = {row.tobytes() for row in features[status == 0]}
    assert {row.tobytes() for row in few} < {row.tobytes() for row in ours}
    assert len({row.tobytes() for row in some} & live) == 10
    monkeypatch.setattr("cropi_core.analysis.columns.MOST_BYTES", 31)  # less than one row
    assert [len(x) for x in compared_features(store, pool, selected, seed=0)] == [0, 0]


# -- the paper's findings ------------------------------------------------------------------------------------


def beside(chosen: float) -> Contrast:
    return Contrast(pool_count=100, selected_count=10, pool_mean=0.5, selected_mean=chosen, low=0.4, high=0.6)


@pytest.mark.parametrize(
    ("chosen", "outcome"),
    [
        ([0.1, 0.2], "holds"),
        ([0.1, 0.5], "holds in part"),
        ([0.9, 0.5], "does not hold"),
        ([0.5, 0.45], "inconclusive"),
        ([], "not measured"),
    ],
)
def test_a_finding_is_judged_by_every_stage(chosen: list[float], outcome: str) -> None:
    verdict = over_stages("lower", "lower", {i: beside(value) for i, value in enumerate(chosen, 1)})
    assert verdict.outcome == outcome
    assert verdict.sentence.startswith(f"lower: {outcome}")
    assert all(f"{value:.3f} compared with 0.500" in verdict.sentence for value in chosen)


@pytest.mark.parametrize(
    ("low", "outcome"),
    [
        ([0.1], "holds"),
        ([0.1, -0.1], "holds in part"),
        ([0.1, -1.0], "measures disagree"),
        ([-1.0], "does not hold"),
        ([-0.1], "inconclusive"),
        ([], "not measured"),
    ],
)
def test_harder_is_judged_by_every_measure(low: list[float], outcome: str) -> None:
    changes = {f"measure {i}": Change(0, x + 0.3, x + 0.3, x, x + 0.6) for i, x in enumerate(low)}
    assert later_is_harder({**changes, "unknown": None}).outcome == outcome


# -- sentences -----------------------------------------------------------------------------------------------


def test_texts_of_a_kind_are_nearer_than_others() -> None:
    pytest.importorskip("wordllama", reason="sentence embeddings need the extra `analysis`")
    embed = load_embedder()
    texts = [
        "A farmer has 12 apples and gives away 5. How many apples are left?",
        "Tom buys 7 oranges and eats 2 of them. How many oranges does he still have?",
        "Prove that the square root of two is irrational.",
        "",
        "a lone \ud800 surrogate",
    ]
    vectors = embed(texts)
    assert vectors.shape == (5, 256)
    cosines = unit(vectors[:3]) @ unit(vectors[:3]).T
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    assert not vectors[3].any()
    assert np.isfinite(vectors).all()
    # A text's vector does not depend on other texts or on its position.
    many = texts * 300
    assert np.array_equal(embed(many)[-5:], vectors)


@pytest.mark.slow
def test_the_embedding_is_loaded_without_network_and_without_its_package() -> None:
    """Importing wordllama sets the root logger to INFO; reading its files must not change the process."""
    pytest.importorskip("wordllama", reason="sentence embeddings need the extra `analysis`")
    program = (
        "import logging, socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from cropi_core.analysis.sentences import load_embedder\n"
        "print(load_embedder()(['one two three']).any(), 'wordllama' in sys.modules, logging.root.level)\n"
    )
    done = processes.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", str(logging.WARNING)], done.stderr


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi_core.analysis.sentences.PACKAGE", "not_there_at_all")
    with pytest.raises(ConfigError, match=r'pip install "cropi\[analysis\]"'):
        load_embedder()
    monkeypatch.setattr("cropi_core.analysis.sentences.PACKAGE", "json")
    with pytest.raises(ConfigError, match=r"lacks weights/l2_supercat_256\.safetensors"):
        load_embedder()
    assert "cropi[analysis]" in INSTALL


def test_the_system_message_is_not_part_of_the_compared_text() -> None:
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}
    assert prompt_text([system, asked]) == prompt_text([asked]) == "1 + 1?"
    assert json.dumps(prompt_text([asked, {"role": "assistant", "content": "2"}])) == '"1 + 1?\\n2"'


def test_a_zero_has_no_sign_and_a_minus_is_one() -> None:
    assert [fixed(-0.0001), fixed(-0.25, 2), fixed(1.0005, 1)] == ["0.000", "−0.25", "1.0"]
