"""The Logs tab: one line a step of what happened, progress of trainings, no lines that only say Completed()."""

import logging
from types import SimpleNamespace

import pytest

from cropi_core.curriculum import StepResult
from cropi_core.formatting import significant
from cropi_core.progress import Progress
from cropi_core.runs.step_facts import COUNTED
from data_schemas.records import ArtifactRef
from data_schemas.steps import StepSpec
from tasks import step_lines
from tasks.step_lines import TrainingLines, drop_completed, step_line

ACCURACY = {"accuracy": 0.4875, "low": 0.4, "high": 0.6, "prompts": 80, "completions": 80, "not_gradable": 0}
CASES = [
    (
        "prompts",
        "prompts/pool",
        {"prompts": 1160, "by_source": {"a": 1160}},
        "prompts/pool: 1160 prompts; ",
    ),
    ("policy", "policy@0", {"model_type": "llama", "parameters": 864384}, "policy@0: 864384 parameters; "),
    (
        "rollouts",
        "rollouts/pool@1",
        {"prompts": 4, "completions": 32, "mean_reward": 0.4447198, "not_gradable": 0},
        "rollouts/pool@1: 4 prompts, 32 completions, mean reward 0.445; ",
    ),
    (
        "rollouts",
        "rollouts/pool@1",
        {"prompts": 4, "completions": 32, "mean_reward": None, "not_gradable": 32},
        "rollouts/pool@1: 4 prompts, 32 completions, 32 not gradable; ",
    ),
    (
        "gradients",
        "gradients/v@1",
        {"prompts": 64, "tokens": 15104, "status": {"ok": 56, "zero_variance": 8, "not_finite": 0}},
        "gradients/v@1: 64 prompts, 15104 tokens, 56 ok, 8 zero variance; ",
    ),
    ("selection", "selection@1", {"selected": 116, "pool": 1160}, "selection@1: 116 selected, 1160 pool; "),
    (
        "training",
        "policy@1",
        {"steps": 20, "prompts": 116, "first_quarter_reward": 0.778125, "last_quarter_reward": 0.9273},
        "policy@1: 20 steps, 116 prompts, reward in the first quarter 0.778, in the last 0.927; ",
    ),
    (
        "evaluation",
        "evaluation@1",
        {"completions": 80, "accuracy": {"shift\nINFO": ACCURACY}},
        "evaluation@1: 80 completions, shift INFO 48.8 %; ",
    ),
]


def line(step, slot, summary, *, cached=False, seconds=12.3):
    kind = "policy" if step == "training" else step
    ref = ArtifactRef(kind=kind, key=f"{kind}-v1-0123456789abcdef", digest="")
    return step_line(StepSpec(step=step, slot=slot, settings={}), StepResult(ref, cached, seconds), summary)


@pytest.mark.parametrize(("step", "slot", "summary", "words"), CASES)
def test_a_line_says_what_a_step_did(step, slot, summary, words):
    made = line(step, slot, summary)
    assert made.startswith(words + "computed in 12 s, "), made
    assert made.endswith("-v1-0123456789abcdef")
    assert line(step, slot, summary, cached=True).startswith(words + "found, ")
    assert "\n" not in made


def test_many_sets_are_counted():
    made = line("evaluation", "evaluation@0", {"accuracy": {f"s{i}": ACCURACY for i in range(11)}})
    assert "s7 48.8 %, 3 more sets; " in made


def test_summaries_without_figures_have_a_line():
    for step in set(COUNTED) - {"gradients"}:
        assert line(step, "x", {}) == line(step, "x", {}).strip()


@pytest.mark.parametrize(
    ("level", "message", "kept"),
    [
        (logging.INFO, "Finished in state Completed()", False),
        (logging.INFO, "Finished in state Cached(type=COMPLETED)", False),
        (logging.ERROR, "Finished in state Failed('no space left')", True),
        (logging.INFO, "anything else", True),
    ],
)
def test_lines_of_completed_tasks_are_dropped_and_failures_stay(level, message, kept):
    drop_completed()
    log = logging.getLogger("prefect.task_runs")
    assert bool(log.filter(log.makeRecord(log.name, level, "", 1, message, (), None))) == kept


def test_a_training_says_how_far_it_is(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(step_lines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    log = logging.getLogger("test.lines")
    lines = TrainingLines("policy@1", log)
    with caplog.at_level(logging.INFO, logger="test.lines"):
        for step in range(1, 41):
            clock[0] = 2.0 * step
            lines.moved(Progress(step, 40, "step", "reward 0.41"))
    assert caplog.messages == [
        "policy@1: step 15 of 40  reward 0.41",
        "policy@1: step 30 of 40  reward 0.41",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4875, "0.488"),
        (0.5, "0.5"),
        (12.345, "12.3"),
        (1234.5, "1235"),
        (-0.01234, "−0.0123"),
        (0.0, "0"),
        (3e-7, "3e−07"),
        (2.54e-6, "2.54e−06"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_three_digits_are_enough(value, text):
    assert significant(value) == text
