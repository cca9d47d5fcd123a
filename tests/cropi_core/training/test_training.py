"""A stage trains on exactly the selected prompts, and an interrupted stage ends like an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

pytest.importorskip("trl", reason="training needs the extra `train`")

from cropi_core.errors import ConfigError, DataError, SelectionError
from cropi_core.policy.checkpoint import tree_digest
from cropi_core.policy.loading import load_policy, render
from cropi_core.progress import Progress
from cropi_core.training import stage as training
from cropi_core.training import trainer as grpo
from cropi_core.training.arguments import trainer_arguments
from cropi_core.training.draws import stage_order
from cropi_core.training.metrics import METRICS, TrainingError, metrics_table, reward_summary
from cropi_core.training.stage import last_whole, selected_rows
from data_schemas.gradients import Objective
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import PROMPTS
from data_schemas.training import Training
from tests.support import processes
from tests.support.paths import CHECKOUT
from tests.support.training import CPU, SMALL, TEMPLATE, digest, rows_of, run, write_policy, write_tables

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_policy(tmp_path / "other", seed=1)
    write_tables(tmp_path)
    return tmp_path


# -- pure parts ---------------------------------------------------------------------------------------------


@given(
    sizes=st.integers(1, 12).flatmap(lambda s: st.tuples(st.integers(s, 40), st.just(s))),
    batches=st.integers(1, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_order_is_even_and_no_batch_has_a_prompt_twice(sizes, batches, seed):
    prompts, per_step = sizes
    order = stage_order(prompts, per_step, batches, seed)
    assert [len(set(batch)) for batch in order] == [per_step] * batches
    counts = [sum(batch.count(i) for batch in order) for i in range(prompts)]
    assert max(counts) - min(counts) <= 1
    assert order[: batches // 2] == stage_order(prompts, per_step, batches // 2, seed)


def test_only_the_selected_rows_are_read_and_a_short_subset_says_what_to_do(workspace: Path):
    prompts, selection = workspace / "prompts.parquet", workspace / "selection.parquet"
    assert [r["prompt_id"] for r in selected_rows(prompts, selection, 6)] == [
        f"p{i:02d}" for i in range(0, 12, 2)
    ]
    with pytest.raises(SelectionError, match=r"selects 6 prompts.*prompts_per_step=7.*selection.ratio"):
        selected_rows(prompts, selection, 7)
    with pytest.raises(DataError, match="is not a selection table"):
        selected_rows(prompts, prompts, 1)
    (workspace / "fewer").mkdir()
    fewer, _ = write_tables(workspace / "fewer", count=4)
    with pytest.raises(DataError, match=r"4 prompts that .* lacks"):
        selected_rows(fewer, selection, 1)


@pytest.mark.parametrize(("micro", "expected"), [(64, 24), (24, 24), (23, 12), (9, 8), (1, 1)])
def test_one_optimizer_step_is_exactly_the_prompts_times_the_samples(tmp_path: Path, micro, expected):
    settings = Training(prompts_per_step=3, sampling=Sampling(samples=8))
    runtime = Runtime(device="cpu", train_micro_batch=micro)
    arguments = trainer_arguments(settings, Objective(), "float32", 0, runtime, tmp_path, 1000)
    assert arguments.per_device_train_batch_size == expected
    assert arguments.gradient_accumulation_steps * expected == 24
    assert arguments.generation_batch_size == 24
    assert not arguments.bf16


def test_metrics_leave_out_the_closing_entry_and_keep_unknown_rewards_null():
    history = [
        {"step": 2, "loss": 0.5, "reward": None, "not_gradable": 8.0, "step_time": 3.0},
        {"step": 1, "loss": 0.25, "reward": 0.5, "not_gradable": 0.0},
        {"step": 2, "train_loss": 0.3},
    ]
    table = metrics_table(history)
    assert table.schema.equals(METRICS)
    assert table["step"].to_pylist() == [1, 2]
    assert table["reward"].to_pylist() == [0.5, None]
    assert reward_summary(table) == {
        "first_quarter_reward": 0.5,
        "last_quarter_reward": None,
        "not_gradable": 8,
    }


def test_a_checkpoint_without_marker_or_with_a_cut_or_changed_file_is_incomplete(tmp_path: Path):
    for step in (2, 10, 12, 14, 16, 18):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"weights")
        if step != 14:
            (directory / grpo.MARKER).write_text(json.dumps(grpo.file_sums(directory)))
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(b"weigh")
    (tmp_path / "checkpoint-16" / "model.safetensors").write_bytes(b"Weights")
    (tmp_path / "checkpoint-18" / grpo.MARKER).write_bytes(b"\0\0\0")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert last_whole(tmp_path / "absent") is None


# -- a stage ------------------------------------------------------------------------------------------------


def test_a_stage_leaves_a_checkpoint_and_metrics_and_nothing_else(workspace: Path, capfd):
    seen: list[Progress] = []
    summary, target = run(workspace, report=seen.append)
    names = set(digest(target))
    tokenizer_files = {
        f"checkpoint/{n}" for n in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    }
    assert names == tokenizer_files | {
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
        "checkpoint/generation_config.json",
        "metrics.parquet",
    }
    for name in tokenizer_files:
        assert (target / name).read_bytes() == (workspace / "policy" / Path(name).name).read_bytes()
    assert str(workspace) not in (target / "checkpoint" / "config.json").read_text()
    assert [p.done for p in seen] == [1, 2, 3, 4, 5, 6]
    assert all(p.note.startswith("reward 0.") and p.total == 6 for p in seen)
    assert summary["steps"] == 6
    assert summary["completions"] == 6 * 4 * 8
    assert summary["epochs"] == 4.0
    assert summary["seconds_per_step"] > 0
    metrics = rows_of(target)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(row["kl"] is None and row["grad_norm"] > 0 for row in metrics)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_reward_rises(workspace: Path):
    summary, _ = run(workspace, training=SMALL.model_copy(update={"steps": 24, "learning_rate": 3e-2}))
    assert summary["first_quarter_reward"] < 0.4
    assert summary["last_quarter_reward"] > 0.9


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_the_model_is_trained_on_the_token_ids_that_render_gives(tmp_path: Path, monkeypatch, template):
    write_policy(tmp_path / "policy", 0, template)
    write_tables(tmp_path)
    forwards: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spied(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = load_policy(*args, **kwargs)
        model.model.register_forward_pre_hook(
            lambda module, a, k: (
                forwards.append((k["input_ids"], k["attention_mask"])) if module.training else None
            ),
            with_kwargs=True,
        )
        return model, tokenizer

    monkeypatch.setattr(training, "load_policy", spied)
    run(tmp_path, training=SMALL.model_copy(update={"steps": 3}))
    _, tokenizer = load_policy(tmp_path / "policy", "float32", "cpu")
    rows = selected_rows(tmp_path / "prompts.parquet", tmp_path / "selection.parquet", 1)
    wanted = {tuple(render(tokenizer, row["messages"])) for row in rows}
    assert len(forwards) == 3
    for ids, mask in forwards:
        assert ids.shape[0] == 32
        sequences = [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
        prompts = {p for s in sequences for p in wanted if s[: len(p)] == p and 1 <= len(s) - len(p) <= 2}
        assert len(prompts) == 4
        assert all(any(s[: len(p)] == p for p in prompts) for s in sequences)


def test_completions_come_from_the_sampling_settings_alone(workspace: Path, monkeypatch):
    """A checkpoint's own generation settings, or transformers' default top_k of 50, must not change them."""
    path = workspace / "policy" / "generation_config.json"
    own = json.loads(path.read_text())
    _, plain = run(workspace, "plain")
    path.write_text(
        json.dumps(own | {"top_k": 1, "do_sample": True, "repetition_penalty": 5.0, "min_new_tokens": 2})
    )
    _, shaped = run(workspace, "shaped")
    assert digest(plain)["checkpoint/model.safetensors"] == digest(shaped)["checkpoint/model.safetensors"]


@pytest.mark.slow
def test_generation_rows_and_micro_batches_do_not_change_what_is_sampled(workspace: Path):
    _, whole = run(workspace, "whole")
    _, parts = run(
        workspace, "parts", runtime=CPU.model_copy(update={"generation_rows": 5, "train_micro_batch": 8})
    )
    for a, b in zip(rows_of(whole), rows_of(parts), strict=True):
        assert a["reward"] == b["reward"]
        assert a["completion_length"] == b["completion_length"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "sapo", "vespo"])
def test_the_gradient_of_a_step_does_not_depend_on_the_micro_batch(workspace: Path, loss_type):
    one = SMALL.model_copy(update={"steps": 1})
    norms = []
    for micro in (32, 4):
        runtime = CPU.model_copy(update={"train_micro_batch": micro})
        _, target = run(
            workspace, f"{micro}", training=one, runtime=runtime, objective=Objective(loss_type=loss_type)
        )
        norms.append(rows_of(target)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_completions_that_cannot_be_graded_teach_nothing_and_are_counted(workspace: Path):
    pool = pq.read_table(workspace / "prompts.parquet").to_pylist()
    broken = [
        row | ({"verifier": "numeric", "answer": "?"} if i % 4 == 0 else {}) for i, row in enumerate(pool)
    ]
    pq.write_table(pa.Table.from_pylist(broken, schema=PROMPTS), workspace / "prompts.parquet")
    summary, target = run(workspace, training=SMALL.model_copy(update={"prompts_per_step": 6, "steps": 2}))
    assert summary["not_gradable"] == 2 * 3 * 8
    assert all(0 < row["reward"] < 1 and row["not_gradable"] == 24 for row in rows_of(target))
    write_tables(workspace, verifier="numeric", answer="?")
    summary, target = run(workspace, "nothing", training=SMALL.model_copy(update={"steps": 2}))
    assert summary["first_quarter_reward"] is None
    before, after = (
        load_file(d / "model.safetensors") for d in (workspace / "policy", target / "checkpoint")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_sum_of_rewards_is_trained_on_and_its_terms_are_kept(workspace: Path):
    few = SMALL.model_copy(update={"steps": 2})
    plain, first = run(workspace, training=few)
    assert "reward_terms" not in plain
    write_tables(workspace, verifier="both")
    grading = Grading(sums={"both": {"exact": 0.5, "numeric": 0.0}})
    summary, target = run(workspace, "both", training=few, grading=grading)
    rows, exact = rows_of(target), rows_of(first)
    assert rows[0]["reward_term_exact"] == pytest.approx(exact[0]["reward"])
    assert [row["reward"] for row in rows] == pytest.approx([0.5 * row["reward_term_exact"] for row in rows])
    assert summary["reward_terms"]["exact"][1] == rows[1]["reward_term_exact"]
    assert set(summary["reward_terms"]) == {"exact", "numeric"}


@pytest.mark.parametrize("name", ["policy", "other"])
def test_the_reference_is_the_checkpoint_asked_for(workspace: Path, monkeypatch, name):
    built = []
    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *a: built.append(original(*a)) or built[-1])
    with_kl = SMALL.model_copy(update={"beta": 0.1, "steps": 2})
    _, target = run(workspace, training=with_kl, reference=workspace / name)
    reference = built[0].ref_model
    assert not reference.training
    wanted, _ = load_policy(workspace / name, "float32", "cpu")
    for key, value in wanted.state_dict().items():
        assert torch.equal(reference.state_dict()[key], value)
    first = rows_of(target)[0]["kl"]
    assert first == pytest.approx(0, abs=1e-9) if name == "policy" else first > 1e-4
    assert rows_of(target)[1]["kl"] > 1e-9


def test_a_kl_term_without_reference_is_refused(workspace: Path):
    with pytest.raises(ConfigError, match=r"training.beta=0.1 needs a reference"):
        run(workspace, training=SMALL.model_copy(update={"beta": 0.1}))


def test_bfloat16_keeps_updates_smaller_than_its_spacing(workspace: Path):
    tiny = SMALL.model_copy(update={"learning_rate": 1e-6, "steps": 2})
    _, target = run(workspace, training=tiny, dtype="bfloat16")
    before, after = (
        load_file(d / "model.safetensors") for d in (workspace / "policy", target / "checkpoint")
    )
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    assert all(value.dtype == torch.float32 for value in after.values())


def test_warmup_and_schedule_reach_the_optimizer(workspace: Path):
    rates = {}
    for schedule in ("constant", "linear"):
        settings = SMALL.model_copy(update={"schedule": schedule, "warmup_steps": 3})
        _, target = run(workspace, schedule, training=settings)
        rates[schedule] = [row["learning_rate"] / 1e-2 for row in rows_of(target)]
    assert rates["constant"] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    assert rates["linear"] == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("rate", [1e30, 1e18])
def test_a_stage_whose_numbers_are_not_finite_stops_and_names_the_step(workspace: Path, rate):
    with pytest.raises(TrainingError, match=r"step \d: .*not finite|step \d: .* is (nan|inf)"):
        run(workspace, training=SMALL.model_copy(update={"learning_rate": rate, "max_grad_norm": 1e9}))


# -- stops --------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{checkout!r}]
from tests.support.training import CPU, SMALL, run
def report(progress):
    print(progress.done, flush=True)
run(Path({workspace!r}), "killed", training=SMALL.model_validate_json({settings!r}),
    reference=Path({workspace!r}) / "other", runtime=CPU, report=report)
"""


def kill_after(workspace: Path, settings: Training, step: int, delay: float) -> None:
    """Train in a subprocess and kill it with SIGKILL ``delay`` seconds after it reports ``step``."""
    code = CHILD.format(checkout=str(CHECKOUT), workspace=str(workspace), settings=settings.model_dump_json())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= step:
            time.sleep(delay)
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("iterations", "steps"), [(1, 6), (2, 6), (2, 5)])
def test_the_tokens_of_a_stage_are_those_that_went_through_the_model(
    workspace: Path, monkeypatch, iterations, steps
):
    made, passes = [], []
    rollout, loss = grpo.Stage.rollout, grpo.StageTrainer._compute_loss

    def sampled(self, prompts, trainer):
        made.append(rollout(self, prompts, trainer))
        return made[-1]

    def counted(self, model, inputs):
        passes.append(int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()))
        return loss(self, model, inputs)

    monkeypatch.setattr(grpo.Stage, "rollout", sampled)
    monkeypatch.setattr(grpo.StageTrainer, "_compute_loss", counted)
    summary, _ = run(workspace, training=SMALL.model_copy(update={"iterations": iterations, "steps": steps}))
    assert summary["tokens_generated"] == sum(len(ids) for batch in made for ids in batch["completion_ids"])
    # If the last batch is used for fewer passes, the count uses the mean number of passes for all batches.
    exact = iterations == 1 or steps % iterations == 0
    assert summary["tokens_trained"] == pytest.approx(sum(passes), rel=0 if exact else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stage_killed_at_any_instant_ends_with_the_same_bytes(workspace: Path, iterations):
    settings = SMALL.model_copy(
        update={"iterations": iterations, "beta": 0.05, "steps": 9, "schedule": "cosine"}
    )
    summary, target = run(workspace, "whole", training=settings, reference=workspace / "other")
    assert summary["resumed_from_step"] is None
    (workspace / "killed").mkdir()
    kill_after(workspace, settings, step=3, delay=0.0)
    kill_after(workspace, settings, step=6, delay=0.02)
    left = workspace / "killed" / ".scratch"
    assert sorted(left.glob("checkpoint-*")), "the kill came before the first checkpoint"
    resumed, again = run(workspace, "killed", training=settings, reference=workspace / "other")
    assert resumed["resumed_from_step"] in (4, 6, 8)
    assert digest(again) == digest(target)
    timed = ("resumed_from_step", "seconds_per_step")
    assert {k: v for k, v in resumed.items() if k not in timed} == {
        k: v for k, v in summary.items() if k not in timed
    }


@pytest.mark.slow
def test_a_stop_after_the_last_step_costs_no_step(workspace: Path, monkeypatch):
    _, target = run(workspace, "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_trained", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, "stopped")
    summary, again = run(workspace, "stopped")
    assert (summary["resumed_from_step"], summary["seconds_per_step"], summary["steps"]) == (6, None, 6)
    assert digest(again) == digest(target)


@pytest.mark.slow
def test_the_seed_changes_the_stage_and_nothing_else_does(workspace: Path):
    torch.manual_seed(1)
    _, a = run(workspace, "a")
    torch.manual_seed(2)
    _, b = run(workspace, "b")
    _, c = run(workspace, "c", seed=4)
    assert digest(a) == digest(b)
    assert tree_digest(a / "checkpoint") != tree_digest(c / "checkpoint")
