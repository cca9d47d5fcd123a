"""Adam's state carried from one stage to the next: equal to uninterrupted training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from cropi_core.errors import PolicyError
from cropi_core.policy.optimizer_state import STATE, restore_state, save_state
from tests.support.training import SMALL, digest, run, write_policy, write_tables

CARRIED = SMALL.model_copy(update={"optimizer_state": "carried"})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)
    return tmp_path


def step(model: torch.nn.Module, optimizer: AdamW, seed: int) -> None:
    """Take a step on a random gradient that does not depend on the model, so that only the optimizer matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
def test_steps_with_a_break_are_those_without(tmp_path: Path, foreach: bool):
    whole, broken = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    broken.load_state_dict(whole.state_dict())

    def begun(model: torch.nn.Module) -> AdamW:
        return AdamW(model.parameters(), lr=0.1, weight_decay=0.01, foreach=foreach)

    optimizer, first = begun(whole), begun(broken)
    assert restore_state(broken, first, tmp_path) == 0  # like a base policy, it has no state
    for seed in range(6):
        step(whole, optimizer, seed)
    for seed in range(3):
        step(broken, first, seed)
    save_state(broken, first, tmp_path)
    second = begun(broken)
    assert restore_state(broken, second, tmp_path) == 3
    for seed in range(3, 6):
        step(broken, second, seed)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def test_a_stage_continues_the_optimizer_state_of_the_previous_one_after_a_stop(workspace: Path, monkeypatch):
    """Stage 1 has no state to continue, stage 2 has; an interrupted stage 2 has the same bytes."""
    _, fresh = run(workspace, "fresh")
    summary, first = run(workspace, "first", training=CARRIED)
    assert summary["carried_steps"] == 0
    kept = digest(first)
    kept.pop(f"checkpoint/{STATE.as_posix()}")
    assert kept == digest(fresh)

    policy = first / "checkpoint"
    summary, second = run(workspace, "second", policy=policy, training=CARRIED, seed=4)
    assert summary["carried_steps"] == SMALL.steps
    state = load_file(second / "checkpoint" / STATE)
    assert {int(v) for k, v in state.items() if k.startswith("step/")} == {2 * SMALL.steps}
    summary, begun = run(workspace, "begun", policy=policy, seed=4)
    assert summary["carried_steps"] == 0
    weights = "checkpoint/model.safetensors"
    assert digest(begun)[weights] != digest(second)[weights]

    from cropi_core.training import trainer as grpo

    rollout = grpo.Stage.rollout

    def stops(stage, prompts, trainer):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return rollout(stage, prompts, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(grpo.Stage, "rollout", stops)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, "stopped", policy=policy, training=CARRIED, seed=4)
    summary, stopped = run(workspace, "stopped", policy=policy, training=CARRIED, seed=4)
    assert (summary["resumed_from_step"], summary["carried_steps"]) == (2, SMALL.steps)
    assert digest(stopped) == digest(second)


def test_a_state_of_another_policy_is_refused_with_what_to_do(workspace: Path):
    _, first = run(workspace, "first", training=CARRIED)
    policy = first / "checkpoint"
    path, key = policy / STATE, "exp_avg/model.norm.weight"
    state = load_file(path)
    for wrong, words in [
        ({k: v for k, v in state.items() if k != key}, f"has no {key}"),
        (state | {key: torch.zeros(3)}, r"has shape \(3,\)"),
        (state | {key: torch.full_like(state[key], torch.nan)}, "not all values are finite"),
    ]:
        save_file(wrong, path)
        with pytest.raises(PolicyError, match=words) as refused:
            run(workspace, "second", policy=policy, training=CARRIED)
        assert "training.optimizer_state=fresh" in str(refused.value)
    path.write_bytes(b"no tensors")
    with pytest.raises(PolicyError, match="not a safetensors file"):
        run(workspace, "second", policy=policy, training=CARRIED)
