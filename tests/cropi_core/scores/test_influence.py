"""Scores match a short numpy implementation, for all shards, row orders and ties."""

from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cropi_core.errors import ArtifactError, ConfigError, SelectionError
from cropi_core.gradients.store import GradientStore
from cropi_core.scores.fusion import best, fuse, order, ranks, tie_keys
from cropi_core.scores.influence import score
from cropi_core.scores.similarity import mean_of_largest, similarities
from cropi_core.scores.targets import target
from data_schemas.scores import Fusion, Scores
from data_schemas.tables import scores_schema

K = 32
ATTRIBUTES = {
    "projection": {"kind": "sjlt", "k": K, "density": 0.1, "form": "factored", "seed": 0, "dtype": "float32"},
    "objective": {"loss_type": "dapo"},
    "policy": "0123",
}


def write_store(
    path: Path,
    rows: np.ndarray,
    status: np.ndarray | None = None,
    ids: list[str] | None = None,
    rows_per_shard: int = 4,
    **changed: object,
) -> Path:
    n, k = rows.shape
    status = np.zeros(n, dtype=np.uint8) if status is None else status
    store = GradientStore.create(
        path,
        ids or [f"{path.stem}-{i}" for i in range(n)],
        k=k,
        dtype="float32",
        rows_per_shard=rows_per_shard,
        attributes={**ATTRIBUTES, **changed},
    )
    for shard in range(store.shards):
        here = slice(*(store.shard_rows(shard).start, store.shard_rows(shard).stop))
        columns = {"status": status[here], "norm": np.linalg.norm(rows[here], axis=1)}
        store.write_shard(shard, rows[here], {**columns, "mean_reward": np.full(len(status[here]), 0.5)})
    store.finish()
    return path


def draw(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, K)) * rng.lognormal(size=(n, 1))).astype(np.float32)


def run(tmp_path: Path, train: Path, validation: dict[str, Path], **options: object):
    seed, previous = int(str(options.pop("seed", 0))), options.pop("previous", None)
    out = tmp_path / str(options.pop("name", "scores.parquet"))
    summary = score(
        train=train,
        validation=validation,
        out=out,
        settings=Scores.model_validate(options),
        seed=seed,
        previous=previous,
    )
    return pq.read_table(out), summary


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, dict[str, Path], np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rows, sets = draw(23, 0), {"a": draw(6, 1), "b": draw(9, 2)}
    status = np.random.default_rng(3).choice([0, 0, 0, 1, 2, 3], 23).astype(np.uint8)
    train = write_store(tmp_path / "train.zarr", rows, status)
    stores = {name: write_store(tmp_path / f"{name}.zarr", set_rows) for name, set_rows in sets.items()}
    return train, stores, rows, sets, status


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["mean", "normalized_mean"])
def test_streaming_equals_brute_force(tmp_path: Path, world, metric: str, kind: str):
    train, stores, rows, sets, status = world
    table, _ = run(tmp_path, train, stores, metric=metric, target=kind)
    for name, set_rows in sets.items():
        if kind == "normalized_mean":
            set_rows = set_rows / np.linalg.norm(set_rows, axis=1, keepdims=True)
        goal = set_rows.astype(np.float64).mean(axis=0)
        expected = rows @ goal
        if metric == "cosine":
            expected = expected / np.linalg.norm(rows, axis=1) / np.linalg.norm(goal)
        got = table.column(name).to_numpy()
        np.testing.assert_allclose(got[status == 0], expected[status == 0], rtol=1e-4, atol=1e-6)
        assert np.isnan(got[status != 0]).all()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("count", [1, 3, 7, 50])
def test_nearest_is_the_mean_of_the_largest_similarities_to_single_prompts(
    tmp_path: Path, world, metric: str, count: int
):
    train, stores, rows, sets, status = world
    table, summary = run(tmp_path, train, stores, metric=metric, target="nearest", nearest=count)
    for name, set_rows in sets.items():
        similar = rows.astype(np.float64) @ set_rows.T.astype(np.float64)
        if metric == "cosine":
            similar /= np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(set_rows, axis=1)
        expected = -np.sort(-similar, axis=1)[:, :count].mean(axis=1)
        got = table.column(name).to_numpy()
        np.testing.assert_allclose(got[status == 0], expected[status == 0], rtol=1e-4, atol=1e-6)
        assert np.isnan(got[status != 0]).all()
        assert summary["sets"][name]["split_half_top_overlap"] is not None


def test_a_dead_validation_prompt_is_nearest_to_no_prompt(tmp_path: Path, world):
    train, _, _, sets, _ = world
    alive = {"a": write_store(tmp_path / "alive.zarr", sets["a"][:4])}
    status = np.array([0, 0, 0, 0, 2, 1], dtype=np.uint8)
    with_dead = {
        "a": write_store(tmp_path / "dead.zarr", sets["a"], status, [f"alive-{i}" for i in range(6)])
    }
    tables = [run(tmp_path, train, one, target="nearest", nearest=9)[0]["a"] for one in (alive, with_dead)]
    assert tables[0] == tables[1]


def test_nearest_halves_are_scored_by_their_own_prompts_alone():
    """Two halves of opposite directions have no common top prompt."""
    pool = draw(40, 1)
    features, halves = np.concatenate([pool[:3], -pool[:3]]), np.repeat(np.eye(2, dtype=bool), 3, axis=0)
    similar = similarities(pool, features, "cosine")
    first, second = (mean_of_largest(similar[:, half], 3) for half in halves.T)
    np.testing.assert_allclose(first, -second, atol=1e-6)
    assert (mean_of_largest(similar[:, :0], 3) == 0).all()


def test_the_table_has_every_prompt_in_order_and_nothing_else(tmp_path: Path, world):
    train, stores, _, _, status = world
    table, summary = run(tmp_path, train, stores)
    assert table.schema.remove_metadata() == scores_schema(["a", "b"])
    assert table.column("prompt_id").to_pylist() == [f"train-{i}" for i in range(23)]
    dead = status != 0
    assert [value is None for value in table.column("rank").to_pylist()] == dead.tolist()
    assert [value is None for value in table.column("score").to_pylist()] == dead.tolist()
    assert sorted(table.column("rank").drop_null().to_pylist()) == list(range(1, (~dead).sum() + 1))
    assert summary["prompts"] == 23
    assert summary["scored"] == (~dead).sum() == summary["status"]["ok"]
    assert set(summary["sets"]) == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("fusion", get_args(Fusion))
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("target", ["mean", "nearest"])
def test_neither_shards_nor_blocks_nor_listing_change_the_bytes(
    tmp_path: Path, world, fusion: str, metric: str, target: str
):
    train, stores, rows, _, status = world
    run(tmp_path, train, stores, fusion=fusion, metric=metric, target=target)
    first = (tmp_path / "scores.parquet").read_bytes()
    ids = [f"train-{i}" for i in range(23)]
    whole = write_store(tmp_path / "w.zarr", rows, status, ids, rows_per_shard=64)
    run(tmp_path, whole, dict(reversed(stores.items())), fusion=fusion, metric=metric, target=target)
    assert (tmp_path / "scores.parquet").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("target", ["mean", "nearest"])
@pytest.mark.parametrize("fusion", get_args(Fusion))
def test_the_order_of_the_rows_changes_nothing(tmp_path: Path, fusion: str, target: str):
    rows = np.concatenate([draw(12, 0)] * 3)  # three of each, so that there are only ties
    ids = [f"p{i}" for i in range(len(rows))]
    stores = {
        "a": write_store(tmp_path / "a.zarr", draw(4, 1)),
        "b": write_store(tmp_path / "b.zarr", draw(4, 2)),
    }
    ordered = {}
    for trial, permutation in enumerate([np.arange(36), np.random.default_rng(5).permutation(36)]):
        train = write_store(tmp_path / f"t{trial}.zarr", rows[permutation], ids=[ids[i] for i in permutation])
        table, _ = run(tmp_path, train, stores, fusion=fusion, target=target)
        ordered[trial] = dict(
            zip(table.column("prompt_id").to_pylist(), table.column("rank").to_pylist(), strict=True)
        )
    assert ordered[0] == ordered[1]


def test_ties_follow_the_seed_and_not_the_place():
    values, ids = np.zeros(200), [f"p{i}" for i in range(200)]
    first, second = ranks(values, tie_keys(ids, 0)), ranks(values, tie_keys(ids, 1))
    assert (first != second).any()
    assert (first != np.arange(1, 201)).any()
    np.testing.assert_array_equal(ranks(values, tie_keys(ids, 0)), first)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(1, 60),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan])
        | st.floats(-1, 1, width=16),
    ),
    st.integers(1, 60),
)
def test_the_order_is_that_of_a_sort_by_two_keys(values, count):
    keys = tie_keys([str(i) for i in range(len(values))], 0)
    expected = np.lexsort((keys, -values))
    np.testing.assert_array_equal(order(values, keys), expected)
    count = min(count, len(values))
    np.testing.assert_array_equal(best(values, keys, count), expected[:count])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_score(tmp_path: Path, world, monkeypatch, threads: int):
    train, stores, *_ = world
    run(tmp_path, train, stores)
    first = (tmp_path / "scores.parquet").read_bytes()
    monkeypatch.setattr("cropi_core.gradients.store.threads_here", lambda: threads)
    score(train=train, validation=stores, out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == first


SMALL = np.array([[0.9, 0.1], [0.5, 0.8], [0.2, 0.7], [0.1, -0.9]], dtype=np.float32)
KEYS = np.arange(4, dtype=np.uint64)


def test_rrf_by_hand():
    value, rank, votes = fuse(SMALL, Scores(fusion="rrf", rrf_k0=60), KEYS)
    np.testing.assert_array_equal(votes, [[1, 3], [2, 1], [3, 2], [4, 4]])
    np.testing.assert_allclose(value, [1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62, 2 / 64], rtol=1e-6)
    np.testing.assert_array_equal(rank, [2, 1, 3, 4])


def test_rrf_of_the_released_code_counts_only_the_best_votes():
    value, rank, votes = fuse(SMALL, Scores(fusion="rrf", rrf_k0=0, rrf_top=2), KEYS)
    np.testing.assert_array_equal(votes, [[1, 0], [2, 1], [0, 2], [0, 0]])
    np.testing.assert_allclose(value, [1, 1.5, 0.5, 0])
    np.testing.assert_array_equal(rank, [2, 1, 3, 4])


def test_max_by_hand():
    value, rank, votes = fuse(SMALL, Scores(fusion="max"), KEYS)
    np.testing.assert_allclose(value, [0.9, 0.8, 0.7, 0.1])
    np.testing.assert_array_equal(rank, [1, 2, 3, 4])
    np.testing.assert_array_equal(votes, [[1, 0], [0, 1], [0, 2], [4, 0]])


def test_max_of_inner_products_does_not_favour_the_set_with_the_longer_target():
    scores = np.array([[1000.0, 0.1], [999.0, 0.2], [998.0, 0.9]], dtype=np.float32)
    _, rank, _ = fuse(scores, Scores(fusion="max", metric="dot"), KEYS[:3])
    assert rank[2] == 1
    _, scaled, _ = fuse(scores * np.float32([1e-3, 64]), Scores(fusion="max", metric="dot"), KEYS[:3])
    np.testing.assert_array_equal(rank, scaled)


def test_mean_by_hand():
    scores = np.array([[3.0, 10.0], [2.0, 30.0], [1.0, 20.0]], dtype=np.float32)
    value, rank, _ = fuse(scores, Scores(fusion="mean"), KEYS[:3])
    step = np.sqrt(3 / 2)
    np.testing.assert_allclose(value, [0, step / 2, -step / 2], atol=1e-7)
    np.testing.assert_array_equal(rank, [2, 1, 3])


def test_quota_by_hand():
    value, rank, votes = fuse(SMALL, Scores(fusion="quota"), KEYS)
    np.testing.assert_array_equal(rank, [1, 2, 3, 4])  # a: 0, b: 1, a: its next is 2, b: 3 remains
    np.testing.assert_array_equal(votes, [[1, 0], [0, 1], [3, 0], [0, 4]])
    np.testing.assert_allclose(value, [1, 0.75, 0.5, 0.25])


def test_quota_shares_the_subset_equally():
    scores = np.random.default_rng(0).standard_normal((90, 3)).astype(np.float32)
    _, rank, votes = fuse(scores, Scores(fusion="quota"), np.arange(90, dtype=np.uint64))
    np.testing.assert_array_equal((votes[rank <= 9] > 0).sum(axis=0), [3, 3, 3])


def test_cosine_forgets_length_and_dot_does_not():
    goal = np.array([[1.0, 0.0]])
    rows = np.array([[0.1, 0.0], [5.0, 5.0], [0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(similarities(rows, goal, "cosine")[:, 0], [1, np.sqrt(0.5), 0], rtol=1e-6)
    np.testing.assert_allclose(similarities(rows, goal, "dot")[:, 0], [0.1, 5, 0], rtol=1e-6)
    assert np.argmax(similarities(rows, goal, "cosine")) == 0
    assert np.argmax(similarities(rows, goal, "dot")) == 1


finite = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 3)),
    elements=st.floats(-1, 1, width=32) | st.sampled_from([0.0, 0.5, -0.5]),
)


@settings(max_examples=150, deadline=None)
@given(
    finite,
    st.sampled_from(["rrf", "max", "mean", "quota"]),
    st.sampled_from(["cosine", "dot"]),
    st.none() | st.integers(1, 5),
    st.sampled_from([0.0, 60.0]),
    st.randoms(use_true_random=False),
)
def test_fusion_is_monotone_complete_and_blind_to_row_order(scores, fusion, metric, top, k0, random):
    n = len(scores)
    options = Scores(fusion=fusion, metric=metric, rrf_top=top, rrf_k0=k0)
    keys = tie_keys([str(i) for i in range(n)], 0)
    value, rank, votes = fuse(scores, options, keys)
    assert sorted(rank) == list(range(1, n + 1))
    assert (np.diff(value[np.argsort(rank)]) <= 0).all()
    assert votes.shape == scores.shape
    shuffle = np.array(random.sample(range(n), n))
    again, places, _ = fuse(scores[shuffle], options, keys[shuffle])
    np.testing.assert_array_equal(again, value[shuffle])
    np.testing.assert_array_equal(places, rank[shuffle])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["mean", "normalized_mean"]))
def test_a_target_does_not_depend_on_its_blocks(n: int, size: int, kind: str):
    rows = draw(n, 7)
    members = np.random.default_rng(n).random((n, 2)) < 0.6
    whole = target([(slice(0, n), rows)], members, kind)
    parts = [(slice(i, min(i + size, n)), rows[i : i + size]) for i in range(0, n, size)]
    np.testing.assert_allclose(target(parts, members, kind), whole, rtol=1e-12, atol=1e-15)


def test_a_target_ignores_prompts_that_are_not_members():
    rows = np.array([[1.0, 0.0], [np.nan, np.inf]], dtype=np.float32)
    got = target([(slice(0, 2), rows)], np.array([[True], [False]]), "mean")
    np.testing.assert_array_equal(got, [[1.0, 0.0]])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"policy": "4567"}, "policy is 0123 and 4567"),
        ({"objective": {"loss_type": "grpo"}}, "objective is .*dapo.* and .*grpo"),
        ({"projection": {**ATTRIBUTES["projection"], "seed": 1}}, r"projection\.seed is 0 and 1"),
        ({"projection": {**ATTRIBUTES["projection"], "form": "uniform"}}, "factored and uniform"),
    ],
)
def test_features_of_different_making_are_not_compared(tmp_path: Path, changed: dict, named: str):
    train = write_store(tmp_path / "train.zarr", draw(4, 0))
    other = write_store(tmp_path / "v.zarr", draw(4, 1), **changed)
    with pytest.raises(ArtifactError, match=named):
        run(tmp_path, train, {"v": other})
    assert not (tmp_path / "scores.parquet").exists()


def test_a_store_without_its_settings_is_not_compared(tmp_path: Path):
    store = GradientStore.create(
        tmp_path / "bare.zarr", ["x"], k=K, dtype="float32", rows_per_shard=1, attributes={}
    )
    store.write_shard(0, draw(1, 0), {"status": np.zeros(1)})
    store.finish()
    with pytest.raises(ArtifactError, match="does not state its projection, objective, policy"):
        run(tmp_path, write_store(tmp_path / "t.zarr", draw(4, 0)), {"v": tmp_path / "bare.zarr"})


def test_an_unfinished_store_is_not_scored(tmp_path: Path):
    train = write_store(tmp_path / "train.zarr", draw(4, 0))
    GradientStore.create(
        tmp_path / "v.zarr", ["x", "y"], k=K, dtype="float32", rows_per_shard=1, attributes=ATTRIBUTES
    )
    with pytest.raises(ArtifactError, match="2 of 2 shards are missing"):
        run(tmp_path, train, {"v": tmp_path / "v.zarr"})


def test_sets_without_a_gradient_are_refused_with_their_statuses(tmp_path: Path):
    live, dead = write_store(tmp_path / "l.zarr", draw(4, 0)), np.array([1, 1, 2, 3], dtype=np.uint8)
    nothing = write_store(tmp_path / "d.zarr", draw(4, 1), dead)
    with pytest.raises(
        SelectionError, match=r"no prompt of validation set v has a gradient .*zero_variance 2"
    ):
        run(tmp_path, live, {"v": nothing})
    with pytest.raises(SelectionError, match=r"no prompt of the pool .*not_finite 1.* temperature"):
        run(tmp_path, nothing, {"v": live})


def test_unknown_choices_are_errors():
    for broken in (Scores.model_construct(fusion="best"), Scores.model_construct(fusion="rank")):
        with pytest.raises(ConfigError, match="must be"):
            fuse(SMALL, broken, KEYS)
    with pytest.raises(ConfigError):
        similarities(SMALL, SMALL, "euclid")
    with pytest.raises(ConfigError):
        target([], np.ones((1, 1), dtype=bool), "median")
    with pytest.raises(ConfigError):
        score(train=Path("x"), validation={}, out=Path("y"), settings=Scores(), seed=0)
    with pytest.raises(SelectionError, match="not finite"):
        fuse(np.array([[np.nan]]), Scores(), KEYS[:1])


def test_halves_of_a_consistent_set_agree_and_of_a_noisy_one_do_not(tmp_path: Path):
    rng = np.random.default_rng(0)
    train = write_store(tmp_path / "t.zarr", rng.standard_normal((200, K)).astype(np.float32))
    common = rng.standard_normal(K).astype(np.float32)
    steady = write_store(tmp_path / "s.zarr", common + 0.05 * draw(20, 1) / 5)
    noisy = write_store(tmp_path / "n.zarr", rng.standard_normal((20, K)).astype(np.float32))
    single = write_store(tmp_path / "o.zarr", draw(1, 2))
    _, summary = run(tmp_path, train, {"steady": steady, "noisy": noisy, "single": single})
    sets = summary["sets"]
    assert sets["steady"]["split_half_cosine"] > 0.95
    assert sets["steady"]["split_half_top_overlap"] > 0.8
    assert sets["noisy"]["split_half_cosine"] < 0.7
    assert sets["single"]["split_half_cosine"] is None


def test_progress_reaches_the_end(tmp_path: Path, world):
    train, stores, *_ = world
    seen = []
    score(
        train=train,
        validation=stores,
        out=tmp_path / "s.parquet",
        settings=Scores(),
        seed=0,
        report=seen.append,
    )
    assert [p.done for p in seen] == [4, 8, 12, 16, 20, 23]
    assert {p.total for p in seen} == {23}


# -- memory -------------------------------------------------------------------------------------------------


def stage(tmp_path: Path, number: int, sets: tuple[str, ...] = ("a", "b")) -> tuple[Path, dict[str, Path]]:
    """Return a pool with the same prompts at every stage, but other dead prompts and other gradients."""
    place = tmp_path / f"stage-{number}"
    place.mkdir()
    status = np.random.default_rng(50 + number).choice([0, 0, 0, 2], 31).astype(np.uint8)
    train = write_store(place / "train.zarr", draw(31, 60 + number), status)
    return train, {name: write_store(place / f"{name}.zarr", draw(5, ord(name) + number)) for name in sets}


def columns(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in ("a", "b")], axis=1).astype(np.float64)


def standard(scores: np.ndarray) -> np.ndarray:
    return (scores - np.nanmean(scores, axis=0)) / np.nanstd(scores, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", get_args(Fusion))
def test_memory_adds_the_standardised_scores_of_all_stages_before(tmp_path: Path, fusion: str):
    stages = [stage(tmp_path, number) for number in (1, 2, 3)]
    expected, previous = np.zeros((31, 2)), None
    for number, (train, sets) in enumerate(stages):
        alone, _ = run(tmp_path, train, sets, metric="dot", fusion=fusion, name="alone.parquet")
        settings = {"metric": "dot", "fusion": fusion, "name": f"{number}.parquet"}
        memory = {} if previous is None else {"memory": 0.5, "previous": previous}
        table, _ = run(tmp_path, train, sets, **settings, **memory)
        expected = standard(columns(alone)) + 0.5 * expected
        found = columns(table) if previous is not None else standard(columns(table))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (np.isnan(found) == np.isnan(columns(alone))).all(), "only prompts with a gradient are scored"
        expected, previous = np.nan_to_num(expected), tmp_path / settings["name"]
        live = ~np.isnan(table["rank"].to_numpy(zero_copy_only=False).astype(float))
        names = [one for one, ok in zip(table["prompt_id"].to_pylist(), live, strict=True) if ok]
        _, rank, _ = fuse(
            columns(table)[live].astype(np.float32), Scores(fusion=fusion, metric="dot"), tie_keys(names, 0)
        )
        assert table["rank"].drop_null().to_pylist() == rank.tolist()


def test_memory_finds_a_direction_under_noise_that_changes_from_stage_to_stage(tmp_path: Path):
    rng, found = np.random.default_rng(5), {0.0: 0, 1.0: 0}
    rows = rng.standard_normal((400, K)).astype(np.float32)
    rows[:40, 0] += 3  # a tenth of the pool has the targets' direction
    train, previous = write_store(tmp_path / "pool.zarr", rows, rows_per_shard=100), None
    for number in range(6):
        noisy = 0.6 * rng.standard_normal((1, K)).astype(np.float32)
        noisy[0, 0] += 1
        sets = {"a": write_store(tmp_path / f"a{number}.zarr", noisy)}
        for memory in found:
            kept = {"memory": memory, "previous": previous} if memory and previous else {}
            table, _ = run(tmp_path, train, sets, name=f"{number}-{memory}.parquet", **kept)
            chosen = np.argsort(table["rank"].to_numpy())[:40]
            found[memory] += int((chosen < 40).sum())
        previous = tmp_path / f"{number}-1.0.parquet"
    assert found[1.0] > 1.2 * found[0.0], found


def test_memory_and_the_stage_before_go_together(tmp_path: Path):
    train, sets = stage(tmp_path, 1)
    run(tmp_path, train, sets, name="before.parquet")
    before = tmp_path / "before.parquet"
    with pytest.raises(ConfigError, match=r"memory=0\.5 without the scores"):
        run(tmp_path, train, sets, memory=0.5)
    with pytest.raises(ConfigError, match=r"memory=0\.0 with the scores"):
        run(tmp_path, train, sets, previous=before)
    with pytest.raises(ConfigError, match=r"validation sets \['a', 'b'\], this one against \['a'\]"):
        run(tmp_path, train, {"a": sets["a"]}, previous=before, memory=0.5)
    other = write_store(tmp_path / "other.zarr", draw(4, 9))
    with pytest.raises(ArtifactError, match="lacks 4 prompts of this pool, such as 'other-0'"):
        run(tmp_path, other, sets, previous=before, memory=0.5)
