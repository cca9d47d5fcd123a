"""Weighted sums of verifiers: the sum is the reward, each term is kept, and a missing term does not count as zero."""

import json
import re

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cropi_core.artifacts import Store
from cropi_core.cli.app import app
from cropi_core.evaluation.accuracy import EvaluationFiles, evaluate
from cropi_core.importing.artifacts import import_artifact
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.prompts.loading import write_prompts
from cropi_core.rewards import Item, key_settings, open_verifier
from cropi_core.rollouts.merging import merge_rollouts
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import base_checkpoint, build
from data_schemas import ALTERNATIVE, Config, Evaluation, Grading, Runtime, Sampling
from tests.support.paths import CHECKOUT
from tests.support.rollouts import run

BOTH = Grading(sums={"both": {"exact": 0.5, "numeric": 0.25, "choice": 0.0}})
SHORT = Sampling(samples=3, max_new_tokens=8)


def test_a_sum_adds_its_terms_and_is_not_gradable_without_one():
    with open_verifier(BOTH) as verifier:
        verifier.check(["both", "exact"])
        right, wrong, unread, plain = verifier.grade_many(
            [("both", "7", "7"), ("both", "it is 7", "7"), ("both", "x", "x"), ("exact", "x", "x")]
        )
        several = verifier.grade("both", "8", f"7{ALTERNATIVE}8")
    assert (right.reward, dict(right.terms)) == (0.75, {"choice": None, "exact": 1.0, "numeric": 1.0})
    assert (wrong.reward, wrong.terms["numeric"]) == (0.25, 1.0)
    assert unread.reward is None
    assert unread.reason.startswith("numeric: ")
    assert unread.terms["exact"] == 1.0
    assert (plain.reward, plain.terms) == (1.0, {})
    assert several.reward == 0.75


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        ({"math": {"exact": 1}}, "are verifiers already"),
        ({"a": {"exact": 1}, "b": {"a": 1}}, "sums.b has the term 'a', which is not a verifier"),
        ({"a": {"exact": 0}}, "no term with a weight other than 0"),
        ({"a": {}}, "no term with a weight other than 0"),
        ({"a": {"exact": float("inf")}}, "finite number"),
    ],
)
def test_sums_that_mean_nothing_are_refused(sums, said):
    with pytest.raises(ValidationError, match=said):
        Grading(sums=sums)


def test_weights_are_part_of_a_key_and_versions_are_those_of_the_terms():
    key = key_settings(BOTH, ["both"])
    assert key["sums"] == {"both": {"choice": 0.0, "exact": 0.5, "numeric": 0.25}}
    assert set(key["verifiers"]) == {"choice", "numeric"}
    assert "sums" not in key_settings(Grading(), ["exact"])
    assert Config.model_validate(config(verifier="both")).grading == BOTH
    with pytest.raises(ValidationError, match=r"grading\.http or grading\.sums"):
        Config.model_validate(config(verifier="neither"))


def config(**changes):
    source = {"kind": "file", "path": "x.jsonl", "columns": {}, **changes}
    return {
        "name": "sums",
        "policy": {"path": "p"},
        "data": {"pool": source, "validation": {"goal": source}},
        "grading": BOTH.model_dump(),
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    table = build({"reverse": 5, "copy": 4}, "pool", 0)
    names = ["both" if source == "copy" else "exact" for source in table["source"].to_pylist()]
    place = table.schema.get_field_index("verifier")
    write_prompts(table.set_column(place, table.schema.field(place), [names]), path)
    return path


LENGTHS = Grading(sums={"both": {"exact": 0.75, "choice": 0.0}})


def test_rollouts_and_evaluations_keep_the_terms(prompts, tmp_path):
    summary = run(tmp_path / "r", prompts, sampling=SHORT, shard=5, grading=LENGTHS)
    run(tmp_path / "exact", prompts, sampling=SHORT, shard=5, grading=Grading(sums={"both": {"exact": 1}}))
    rows, plain = (read_rollouts(tmp_path / name).to_pylist() for name in ("r", "exact"))
    assert {row["prompt_id"].split("-")[0] for row in rows if row["reward_terms"]} == {"copy"}
    for row, exact in zip(rows, plain, strict=True):
        if row["reward_terms"] is not None:
            terms = {term["verifier"]: term["reward"] for term in row["reward_terms"]}
            assert terms == {"choice": None, "exact": exact["reward"]}
            assert row["reward"] == 0.75 * exact["reward"]
    of_copy = [row["reward"] for row in plain if row["prompt_id"].startswith("copy")]
    assert summary["mean_reward_terms"] == {
        "choice": None,
        "exact": pytest.approx(sum(of_copy) / len(of_copy)),
    }
    ref = import_artifact(Store(tmp_path / "root"), "rollouts", tmp_path / "r")
    imported = read_rollouts(Store(tmp_path / "root").directory(ref.key) / "parts")
    assert imported["reward_terms"].to_pylist() == [row["reward_terms"] for row in rows]
    merged = merge_rollouts(
        tmp_path / "r", tmp_path / "exact", tmp_path / "merged", {row["prompt_id"]: "x" for row in rows}
    )
    assert set(merged["mean_reward_terms"]) == {"exact"}
    files = EvaluationFiles(
        completions=tmp_path / "c.parquet", accuracy=tmp_path / "a.json", scratch=tmp_path / ".scratch"
    )
    measured = evaluate(
        policy=Checkpoint(base_checkpoint(), digest="0" * 64),
        sets={"mixed": prompts},
        files=files,
        settings=Evaluation(sampling=SHORT),
        grading=LENGTHS,
        runtime=Runtime(device="cpu", threads=1),
    )
    completions = pq.read_table(files.completions)
    kept = [terms for terms in completions["reward_terms"].to_pylist() if terms]
    means = measured["accuracy"]["mixed"]["mean_reward_terms"]
    assert (len(kept), completions.num_rows) == (12, 27)
    assert means == {"choice": None, "exact": pytest.approx(sum(t[1]["reward"] for t in kept) / 12)}


def test_verify_rewards_shows_the_terms(tmp_path):
    file = tmp_path / "completions.jsonl"
    file.write_text(json.dumps({"completion": "it is 7", "answer": "7", "reward": 1.0}) + "\n")
    options = [
        "verify-rewards",
        str(file),
        "--verifier",
        "both",
        "-o",
        "grading.sums.both={exact: 0.5, numeric: 0.25}",
    ]
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert found["mean_terms"] == {"exact": 0.0, "numeric": 1.0}
    assert found["changes"][0]["terms"] == {"exact": 0.0, "numeric": 1.0}
    assert "exact 0, numeric 1" in CliRunner().invoke(app, options).stdout


def test_the_page_shows_a_sum_that_grades(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    page = (CHECKOUT / "docs/guides/rewards.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "sums:" in b]
    shown = yaml.safe_load(block)
    grading = Grading.model_validate(shown["grading"])
    name = shown["data"]["pool"]["verifier"]
    with open_verifier(grading) as verifier:
        verifier.try_functions([Item(name, "", "7")])
        short, long = verifier.grade_many(
            [(name, "The answer is 7.", "7"), (name, "so " * 400 + "it is 7.", "7")]
        )
    assert short.reward == 1.0
    assert long.reward == 0.9
    assert dict(long.terms) == {"brief": 0.0, "math": 1.0}
