"""Prompts without a gradient are scored like the prompts that read most alike."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.prompts.loading import write_prompts
from cropi_core.prompts.mixing import draw_prompts
from cropi_core.prompts.similarity import nearest, text_vectors
from cropi_core.scores.influence import score
from cropi_core.scores.neighbours import with_neighbours
from cropi_core.selection.strategies import select
from cropi_core.world import build
from data_schemas import Scores, Selection
from tests.cropi_core.scores.test_influence import draw, write_store


def test_texts_of_one_kind_are_nearest():
    kinds = [
        "What is {} plus {}?",
        "Reverse the letters of {}{}.",
        "{} 的平方加 {} 是多少？",
        r"\frac{{{}}}{{{}}} = x",
    ]
    random = np.random.default_rng(0)
    texts = [kind.format(*random.integers(100, 999, 2)) for kind in kinds for _ in range(12)]
    vectors = text_vectors([*texts, ""])
    assert not vectors[-1].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:-1], axis=1), 1, rtol=1e-5)
    for row in range(len(texts)):
        others = np.delete(np.arange(len(texts)), row)
        found = others[nearest(vectors[row : row + 1], vectors[others], 5)[0]]
        assert (found // 12 == row // 12).all()


def test_hashed_cosines_are_those_of_the_runs():
    """Against a dictionary of runs with the same weights; the fold to fewer dimensions adds a little noise."""
    texts = ["rev:nycw=", "rev:nycx=", "sort:4,2", "zzzzzzzz"]
    runs = [[(n, t[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(t) - n + 1)] for t in texts]
    names = sorted({run for text in runs for run in text})
    seen = np.array([sum(name in text for text in runs) for name in names])
    tf = np.array([[text.count(name) for name in names] for text in runs], float)
    exact = np.where(tf > 0, 1 + np.log(np.maximum(tf, 1)), 0) * np.sqrt(np.log(5 / (1 + seen)))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    vectors = text_vectors(texts)
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=0.12)


def test_values_are_the_mean_of_the_nearest():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8], [0, 0]], np.float32)
    live = np.array([True, False, True, False, False])
    values, scored = with_neighbours(np.array([[1.0], [3.0]], np.float32), live, vectors, 1)
    assert scored.tolist() == [True, True, True, True, False]
    assert values[:, 0].tolist() == [1, 1, 3, 3]
    values, _ = with_neighbours(np.array([[1.0], [3.0]], np.float32), live, vectors, 9)
    assert values[:, 0].tolist() == [1, 2, 3, 2]


def test_a_scores_table_with_neighbours(tmp_path):
    """Measured scores stay as they are; the others say in the selection that they are inferred."""
    table = build({"reverse": 20, "copy": 20}, "pool", 0)
    write_prompts(table, tmp_path / "p.parquet")
    ids, source = table["prompt_id"].to_pylist(), np.array(table["source"].to_pylist())
    goal = draw(5, 0)
    features = np.where((source == "reverse")[:, None], goal[:1], -goal[:1]) + 0.1 * draw(40, 1)
    status = np.array([0, 1] * 20, np.uint8)
    features[status == 1] = 0
    pool = write_store(tmp_path / "pool", features.astype(np.float32), status, ids)
    validation = {"goal": write_store(tmp_path / "goal", goal[:1])}
    plain, inferred = tmp_path / "plain.parquet", tmp_path / "inferred.parquet"
    score(train=pool, validation=validation, out=plain)
    settings = Scores(neighbours=3)
    summary = score(
        train=pool, validation=validation, out=inferred, settings=settings, prompts=tmp_path / "p.parquet"
    )
    assert (summary["scored"], summary["scored_by_neighbours"]) == (20, 20)
    before, after = pq.read_table(plain).to_pylist(), pq.read_table(inferred).to_pylist()
    assert [r["goal"] for r in before if r["goal"] is not None] == [
        r["goal"] for r in after if r["status"] == "ok"
    ]
    ranked = sorted(after, key=lambda r: r["rank"])
    assert sum(r["prompt_id"].startswith("reverse") for r in ranked[:20]) >= 18
    select(
        prompts=tmp_path / "p.parquet",
        scores=inferred,
        rollouts=None,
        out=tmp_path / "s.parquet",
        settings=Selection(ratio=0.5),
        seed=0,
    )
    chosen = [r for r in pq.read_table(tmp_path / "s.parquet").to_pylist() if r["selected"]]
    assert len(chosen) == 20
    assert all(("scored like its neighbours" in r["reason"]) == (r["status"] != "ok") for r in chosen)
    with pytest.raises(ConfigError, match=r"scores.neighbours=3 compares the texts"):
        score(train=pool, validation=validation, out=inferred, settings=settings)
    write_prompts(table.slice(1), tmp_path / "p.parquet")
    with pytest.raises(ArtifactError, match="lacks 1 prompts of this pool"):
        score(
            train=pool, validation=validation, out=inferred, settings=settings, prompts=tmp_path / "p.parquet"
        )


def test_prompts_that_were_not_sampled_are_scored_like_those_that_read_alike(tmp_path):
    """The scores table has the order of the pool, also where the store has another one."""
    table = build({"reverse": 20, "copy": 20}, "pool", 0)
    write_prompts(table, tmp_path / "p.parquet")
    sampled = draw_prompts(table, 20, seed=0)
    assert sampled["prompt_id"].to_pylist() == [
        name for name in table["prompt_id"].to_pylist() if name in sampled["prompt_id"].to_pylist()
    ]
    assert set(draw_prompts(table, 10, 0)["prompt_id"].to_pylist()) < set(sampled["prompt_id"].to_pylist())
    sampled = sampled.take(list(range(19, -1, -1)))
    ids, source = sampled["prompt_id"].to_pylist(), np.array(sampled["source"].to_pylist())
    goal = draw(5, 0)
    features = np.where((source == "reverse")[:, None], goal[:1], -goal[:1]) + 0.1 * draw(20, 1)
    pool = write_store(tmp_path / "pool", features.astype(np.float32), np.zeros(20, np.uint8), ids)
    validation = {"goal": write_store(tmp_path / "goal", goal[:1])}
    plain, inferred = tmp_path / "plain.parquet", tmp_path / "inferred.parquet"
    score(train=pool, validation=validation, out=plain)
    summary = score(
        train=pool,
        validation=validation,
        out=inferred,
        settings=Scores(neighbours=3),
        prompts=tmp_path / "p.parquet",
    )
    assert (summary["scored"], summary["scored_by_neighbours"], summary["not_sampled"]) == (20, 20, 20)
    assert summary["status"]["too_few_gradable"] == 0
    after = pq.read_table(inferred).to_pylist()
    assert [r["prompt_id"] for r in after] == table["prompt_id"].to_pylist()
    assert {r["prompt_id"]: r["goal"] for r in after if r["status"] == "ok"} == {
        r["prompt_id"]: r["goal"] for r in pq.read_table(plain).to_pylist()
    }
    ranked = sorted(after, key=lambda r: r["rank"])
    assert sum(r["prompt_id"].startswith("reverse") for r in ranked[:20]) >= 18
