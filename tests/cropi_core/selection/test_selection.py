"""A selection takes the requested share by the requested strategy, and states its reasons."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_core.errors import ConfigError, DataError, SelectionError
from cropi_core.gradients.store import GradientStore
from cropi_core.scores.fusion import SETTINGS_KEY
from cropi_core.scores.influence import score
from cropi_core.selection.evidence import Evidence, pass_rates
from cropi_core.selection.strategies import select, subset_size, worth
from data_schemas.scores import Scores
from data_schemas.selection import Selection
from data_schemas.tables import PROMPTS, ROLLOUTS, SELECTION, scores_schema

N = 20
IDS = [f"t-{i}" for i in range(N)]


def write_prompts(path: Path, ids: list[str] = IDS) -> Path:
    rows = [
        {
            "prompt_id": prompt_id,
            "source": "sort" if i % 2 else "reverse",
            "messages": [],
            "answer": "",
            "verifier": "exact",
            "level": None if i < 2 else "hard",
            "tags": [],
        }
        for i, prompt_id in enumerate(ids)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def write_scores(path: Path, ids: list[str] = IDS, dead: int = 0) -> Path:
    """Write ascending scores in the order of ``ids``; the first ``dead`` prompts have no gradient."""
    n = len(ids)
    place = np.arange(n)
    live = place >= dead
    columns = [
        pa.array(ids),
        pa.array(["ok" if x else "zero_variance" for x in live]),
        pa.array(place / n, pa.float32(), mask=~live),
        pa.array(place / n, pa.float32(), mask=~live),
        pa.array(n - place, pa.int32(), mask=~live),
        pa.array(place / n, pa.float32()),
        pa.array((place * 7) % n, pa.float32()),
    ]
    pq.write_table(pa.table(columns, schema=scores_schema(["v"])), path)
    return path


def write_rollouts(directory: Path, rewards: dict[str, list[float | None]]) -> Path:
    directory.mkdir()
    for part, (prompt_id, values) in enumerate(rewards.items()):
        rows = [
            {
                "prompt_id": prompt_id,
                "sample": i,
                "prompt_ids": [1],
                "completion_ids": [2],
                "behavior_logprobs": [0.0],
                "text": "",
                "reward": value,
                "finish_reason": "stop",
            }
            for i, value in enumerate(values)
        ]
        schema = ROLLOUTS.with_metadata({"part": str(part)})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), directory / f"part-{part:05d}.parquet")
    return directory


def write_gradients(path: Path, n: int, seed: int) -> Path:
    attributes = {"projection": {"kind": "sjlt"}, "objective": {}, "policy": "0"}
    ids = [f"{path.stem}-{i}" for i in range(n)]
    store = GradientStore.create(path, ids, k=16, dtype="float16", rows_per_shard=n, attributes=attributes)
    rows = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)
    store.write_shard(0, rows, {"status": np.zeros(n)})
    store.finish()
    return path


def run(
    tmp_path: Path, *, scores: Path | None = None, rollouts: Path | None = None, seed: int = 0, **options
):
    prompts = tmp_path / "prompts.parquet"
    if not prompts.exists():
        write_prompts(prompts)
    out = tmp_path / "selection.parquet"
    summary = select(
        prompts=prompts,
        scores=scores,
        rollouts=rollouts,
        out=out,
        settings=Selection.model_validate(options),
        seed=seed,
    )
    table = pq.read_table(out)
    chosen = [row["prompt_id"] for row in table.to_pylist() if row["selected"]]
    return table, chosen, summary


def test_influence_takes_the_best_tenth_of_the_pool_and_not_of_the_living(tmp_path: Path):
    scores = write_scores(tmp_path / "s.parquet", dead=15)
    table, chosen, summary = run(tmp_path, scores=scores, ratio=0.1)
    assert chosen == ["t-18", "t-19"]
    assert table.schema == SELECTION
    assert table.column("prompt_id").to_pylist() == IDS
    assert table.column("rank").to_pylist() == [None] * 15 + [5, 4, 3, 2, 1]
    assert table.column("reason").to_pylist()[0] == "dead: zero_variance"
    assert table.column("reason").to_pylist()[19] == "influence: v #1 (0.950)"
    assert summary["short_by"] == 0
    assert summary["sources"] == {"reverse": {"pool": 10, "selected": 1}, "sort": {"pool": 10, "selected": 1}}
    assert summary["levels"] == {"hard": {"pool": 18, "selected": 2}, "none": {"pool": 2, "selected": 0}}
    assert summary["status"] == {"ok": 5, "zero_variance": 15}
    assert sum(summary["pass_rate"]["pool"]) == N
    assert summary["pass_rate"]["selected"] == [0] * 9 + [2]


def test_too_few_eligible_prompts_are_all_selected_and_the_shortage_is_reported(tmp_path: Path):
    scores = write_scores(tmp_path / "s.parquet", dead=17)
    _, chosen, summary = run(tmp_path, scores=scores, ratio=0.5)
    assert chosen == ["t-17", "t-18", "t-19"]
    assert (summary["selected"], summary["short_by"], summary["eligible"]) == (3, 7, 3)


def test_a_pool_without_an_eligible_prompt_is_an_error(tmp_path: Path):
    with pytest.raises(SelectionError, match=r"zero_variance 20.*raise the temperature"):
        run(tmp_path, scores=write_scores(tmp_path / "s.parquet", dead=N))


def test_rows_are_matched_by_id_and_not_by_place(tmp_path: Path):
    _, chosen, _ = run(tmp_path, scores=write_scores(tmp_path / "s.parquet", IDS[::-1]), ratio=0.1)
    assert chosen == ["t-0", "t-1"]


def test_scores_of_another_pool_are_refused_by_name(tmp_path: Path):
    scores = write_scores(tmp_path / "s.parquet", [*IDS[1:], "stranger"])
    with pytest.raises(SelectionError, match=r"'t-0'.*'stranger'"):
        run(tmp_path, scores=scores)
    scores = write_scores(tmp_path / "d.parquet", [*IDS, "t-3"])
    with pytest.raises(SelectionError, match="1 ids occur twice"):
        run(tmp_path, scores=scores)


def test_a_prompt_that_was_never_sampled_is_not_passed_over(tmp_path: Path):
    rollouts = write_rollouts(tmp_path / "parts", {i: [0.0, 1.0] for i in IDS[:-1]})
    with pytest.raises(SelectionError, match=r"1 prompts of the pool are missing \('t-19'\)"):
        run(tmp_path, rollouts=rollouts, strategy="learnability")


def test_reasons_name_who_voted_and_how(tmp_path: Path):
    train = write_gradients(tmp_path / "t.zarr", N, 0)
    names = ("sort", "reverse")
    stores = {name: write_gradients(tmp_path / f"{name}.zarr", 5, i) for i, name in enumerate(names, 1)}
    options = Scores(fusion="rrf", rrf_k0=0, rrf_top=3)
    score(train=train, validation=stores, out=tmp_path / "s.parquet", settings=options, seed=0)
    table, chosen, _ = run(tmp_path, scores=tmp_path / "s.parquet", ratio=0.05)
    (best,) = [row for row in table.to_pylist() if row["selected"]]
    assert best["prompt_id"] == chosen[0]
    assert best["rank"] == 1
    assert best["reason"].startswith("rrf: ")
    assert " #1 (0." in best["reason"]
    stored = pq.read_table(tmp_path / "s.parquet")
    assert SETTINGS_KEY in stored.schema.metadata
    for row, scored in zip(table.to_pylist(), stored.to_pylist(), strict=True):
        assert row["score"] == scored["score"]
        voters = [name for name in ("sort", "reverse") if f"{name} #" in row["reason"]]
        assert (row["reason"] == "rrf: no set voted") == (not voters) == (row["score"] == 0)
        for name in voters:
            assert f"({scored[name]:.3f})" in row["reason"]


REWARDS = {
    "t-0": [1.0, 1.0, 1.0, 1.0],
    "t-1": [0.0, 1.0, 0.0, 1.0],
    "t-2": [0.0, 0.0, 0.0, 1.0],
    "t-3": [0.0, None, 1.0, 1.0],
    "t-4": [None, None, None, 1.0],
    "t-5": [0.0, 0.0, 0.0, 0.0],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "prompts.parquet", list(REWARDS))
    return write_rollouts(tmp_path / "parts", REWARDS)


def test_pass_rates_are_means_over_what_was_graded(small: Path):
    rows = {row["prompt_id"]: row for row in pass_rates(small).to_pylist()}
    assert {i: rows[i]["pass_rate"] for i in rows} == pytest.approx(
        {"t-0": 1, "t-1": 0.5, "t-2": 0.25, "t-3": 2 / 3, "t-4": 1, "t-5": 0}
    )
    assert [rows[f"t-{i}"]["status"] for i in (0, 1, 4, 5)] == [
        "zero_variance",
        "ok",
        "too_few_gradable",
        "zero_variance",
    ]


def test_learnability_takes_what_is_neither_solved_nor_hopeless(tmp_path: Path, small: Path):
    table, chosen, summary = run(tmp_path, rollouts=small, strategy="learnability", ratio=1.0)
    assert chosen == ["t-1", "t-2", "t-3"]
    assert table.column("rank").to_pylist() == [None, 1, 3, 2, None, None]
    assert table.column("reason").to_pylist()[1:3] == [
        "pass rate 0.500, p(1-p) 0.250",
        "pass rate 0.250, p(1-p) 0.188",
    ]
    assert table.column("reason").to_pylist()[4:] == ["dead: too_few_gradable", "dead: zero_variance"]
    assert summary["short_by"] == 3


def test_pass_rate_takes_the_nearest_to_its_target(tmp_path: Path, small: Path):
    _, chosen, _ = run(tmp_path, rollouts=small, strategy="pass_rate", pass_rate_target=0.3, ratio=0.3)
    assert chosen == ["t-1", "t-2"]
    _, chosen, _ = run(tmp_path, rollouts=small, strategy="pass_rate", pass_rate_target=1.0, ratio=0.1)
    assert chosen == ["t-0"]


def test_learnability_of_scores_uses_their_mean_reward(tmp_path: Path):
    _, chosen, _ = run(
        tmp_path, scores=write_scores(tmp_path / "s.parquet"), strategy="learnability", ratio=0.15
    )
    assert chosen == ["t-9", "t-10", "t-11"]


def test_grad_norm_takes_the_longest_gradients(tmp_path: Path):
    scores = write_scores(tmp_path / "s.parquet", dead=3)
    table, chosen, _ = run(tmp_path, scores=scores, strategy="grad_norm", ratio=0.1)
    assert {(int(i[2:]) * 7) % N for i in chosen} == {18, 19}
    assert "gradient norm 19" in table.column("reason").to_pylist()


def test_random_follows_the_seed_and_the_id_and_not_the_place(tmp_path: Path):
    _, first, _ = run(tmp_path, strategy="random", ratio=0.25, seed=1)
    _, again, _ = run(tmp_path, strategy="random", ratio=0.25, seed=1)
    _, other, _ = run(tmp_path, strategy="random", ratio=0.25, seed=2)
    write_prompts(tmp_path / "prompts.parquet", IDS[::-1])
    table, turned, _ = run(tmp_path, strategy="random", ratio=0.25, seed=1)
    assert first == again == turned[::-1] != other
    assert set(table.column("reason").to_pylist()) == {"random draw", "not drawn"}
    assert set(table.column("status").to_pylist()) == {"unmeasured"}


def test_full_takes_everything(tmp_path: Path):
    _, chosen, summary = run(tmp_path, strategy="full", ratio=1.0)
    assert chosen == IDS
    assert summary["pass_rate"] is None


@pytest.mark.parametrize("strategy", ["influence", "grad_norm", "learnability", "pass_rate"])
def test_a_strategy_without_its_evidence_is_an_error_and_not_random(tmp_path: Path, strategy: str):
    with pytest.raises(ConfigError, match="needs"):
        run(tmp_path, strategy=strategy)


def test_unknown_strategies_are_errors(tmp_path: Path):
    unknown = Selection.model_construct(strategy="best", ratio=0.1)
    with pytest.raises(ConfigError, match="strategy='best' is unknown"):
        select(
            prompts=write_prompts(tmp_path / "p.parquet"),
            scores=None,
            rollouts=None,
            out=tmp_path / "o.parquet",
            settings=unknown,  # pyright: ignore[reportArgumentType]
            seed=0,
        )


def test_broken_tables_are_errors(tmp_path: Path):
    (tmp_path / "s.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        run(tmp_path, scores=tmp_path / "s.parquet")
    with pytest.raises(DataError, match="lacks the columns"):
        run(tmp_path, scores=tmp_path / "prompts.parquet")
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match="no part-"):
        run(tmp_path, rollouts=tmp_path / "parts", strategy="pass_rate")


@pytest.mark.parametrize("strategy", ["learnability", "pass_rate"])
def test_pass_rates_are_of_rewards_from_zero_to_one(tmp_path: Path, strategy: str):
    write_prompts(tmp_path / "prompts.parquet", ["a", "b"])
    rollouts = write_rollouts(tmp_path / "parts", {"a": [0.0, 5.0], "b": [0.0, 1.0]})
    with pytest.raises(SelectionError, match=r"from 0\.5 to 2\.5"):
        run(tmp_path, rollouts=rollouts, strategy=strategy)


def test_equal_inputs_give_equal_bytes(tmp_path: Path, small: Path):
    for _ in range(2):
        run(tmp_path, rollouts=small, strategy="pass_rate")
        first = (tmp_path / "selection.parquet").read_bytes()
    assert (tmp_path / "selection.parquet").read_bytes() == first
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("ratio", "pool", "size"),
    [(0.1, 20, 2), (0.1, 25, 3), (0.29, 50, 15), (0.1, 4, 1), (1.0, 7, 7), (0.001, 10, 1)],
)
def test_a_share_is_rounded_as_on_paper(ratio: float, pool: int, size: int):
    assert subset_size(ratio, pool) == size


@settings(max_examples=200)
@given(st.floats(0.001, 1), st.integers(1, 10**6))
def test_a_share_is_never_none_and_never_more_than_the_pool(ratio: float, pool: int):
    size = subset_size(ratio, pool)
    assert 1 <= size <= pool
    assert abs(size - ratio * pool) <= max(0.5 + 1e-6, 1 - ratio * pool)


def test_equally_far_pass_rates_are_ties(tmp_path: Path):
    p = np.array([0.3, 0.7], dtype=np.float32).astype(np.float64)
    nothing = np.full(2, np.nan)
    evidence = Evidence(["a", "b"], ["ok", "ok"], p, nothing, nothing, nothing, ["", ""], nothing)
    for strategy in ("pass_rate", "learnability"):
        values = worth(evidence, Selection.model_validate({"strategy": strategy}))
        assert values[0] == values[1]


def write_texts(path: Path, texts: dict[str, str]) -> Path:
    rows = [
        {
            "prompt_id": prompt_id,
            "source": "texts",
            "messages": [{"role": "user", "content": text}],
            "answer": "",
            "verifier": "exact",
            "level": None,
            "tags": [],
        }
        for prompt_id, text in texts.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def test_text_similarity_selects_the_prompts_that_read_like_the_validation_prompts_of_any_set(tmp_path):
    kinds = {"sum": "What is {} plus {}?", "poem": "Write {} lines about {}.", "sort": "sort: {} {} 7 1"}
    texts = {f"{kind}-{i}": form.format(i, 3 * i) for kind, form in kinds.items() for i in range(10)}
    pool = write_texts(tmp_path / "pool.parquet", texts)
    sums = write_texts(tmp_path / "sums.parquet", {"v0": "What is 40 plus 2?", "v1": "What is 8 plus 11?"})
    sorts = write_texts(tmp_path / "sorts.parquet", {"w0": "sort: 5 9 7 1"})
    settings = Selection(strategy="text_similarity", ratio=2 / 3)
    summary = select(prompts=pool, out=tmp_path / "s", settings=settings, targets={"a": sums, "b": sorts})
    chosen = pq.read_table(tmp_path / "s").filter(pa.compute.field("selected"))
    assert summary["selected"] == 20
    assert {name.split("-")[0] for name in chosen["prompt_id"].to_pylist()} == {"sum", "sort"}
    assert "most alike validation prompts" in chosen["reason"][0].as_py()


def test_text_similarity_without_validation_prompts_is_refused(tmp_path):
    pool = write_texts(tmp_path / "pool.parquet", {"a": "x"})
    with pytest.raises(ConfigError, match="validation sets"):
        select(prompts=pool, out=tmp_path / "s", settings=Selection(strategy="text_similarity"))
