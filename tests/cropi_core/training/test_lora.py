"""Adapter training: the trained parameters, the stored files, and the initial state of the next stage."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("trl", reason="training needs the extra `train`")
pytest.importorskip("peft", reason="adapters need the extra `train`")

from cropi_core.errors import ConfigError, PolicyError
from cropi_core.policy.loading import load_policy
from cropi_core.policy.lora import ADAPTER, attach, merged
from cropi_core.training import stage as training
from data_schemas.training import Lora, Training
from tests.support import processes
from tests.support.training import CPU, SMALL, digest, rows_of, run, write_policy, write_tables


def stage(**lora):
    return Training.model_validate(SMALL.model_dump() | {"lora": {"r": 4, "alpha": 8, **lora}})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)
    return tmp_path


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.slow
def test_the_checkpoint_has_the_merged_weights_and_the_adapter(workspace: Path):
    _, target = run(workspace, training=stage())
    adapter = target / "checkpoint" / ADAPTER
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = (adapter / "adapter_config.json").read_text()
    assert str(workspace) not in written
    layers = json.loads(written)["target_modules"]
    assert layers == sorted(layers)  # in PEFT a set: its order, and the digest, would vary
    assert len(layers) > 1
    before, after = weights(workspace / "policy"), weights(target / "checkpoint")
    again = merged(workspace / "policy", adapter).state_dict()
    assert sorted(before) == sorted(after)
    assert all(torch.equal(after[name], again[name]) for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:
        rank = torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)
        assert 1 <= rank <= 4, name
    assert not (target / ".scratch").exists()


def test_a_new_adapter_leaves_the_policy_as_it_was_and_is_of_the_seed(workspace: Path):
    logits, matrices = [], []
    ids = torch.tensor([[1, 4, 5, 6]])
    for seed in (1, 1, 2):
        model, _ = load_policy(workspace / "policy", "float32", "cpu")
        plain = model(ids).logits
        adapted = attach(model, Lora(r=4), None, seed).eval()
        logits.append(torch.equal(plain, adapted(ids).logits))
        matrices.append(next(p for name, p in adapted.named_parameters() if "lora_A" in name))
    assert all(logits)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


@pytest.mark.slow
def test_reward_rises(workspace: Path):
    """The head is tied to embeddings that no adapter changes; with random embeddings no token could become likely."""
    path = workspace / "policy" / "model.safetensors"
    larger = {name: tensor * (20 if "embed" in name else 1) for name, tensor in load_file(path).items()}
    save_file(larger, path, metadata={"format": "pt"})
    longer = stage().model_copy(update={"steps": 40, "learning_rate": 3e-2})
    summary, _ = run(workspace, training=longer)
    first, last = summary["first_quarter_reward"], summary["last_quarter_reward"]
    assert last > first + 0.2, (first, last)


@pytest.mark.slow
def test_an_adapter_is_trained_on_by_the_next_stage(workspace: Path):
    """The adapter's weights continue, on those of the base: with a learning rate close to 0 they do not change."""
    carried = stage(carry="adapter")
    _, first = run(workspace, "first", training=carried)
    still = carried.model_copy(update={"learning_rate": 1e-30})
    _, second = run(
        workspace, "second", policy=first / "checkpoint", base=workspace / "policy", training=still
    )
    one, two = weights(first / "checkpoint"), weights(second / "checkpoint")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert digest(first / "checkpoint" / ADAPTER) == digest(second / "checkpoint" / ADAPTER)
    _, third = run(
        workspace, "third", policy=first / "checkpoint", base=workspace / "policy", training=carried
    )
    moved = weights(third / "checkpoint")
    base = weights(workspace / "policy")
    ranks = {int(torch.linalg.matrix_rank(moved[n] - base[n], rtol=1e-4)) for n in base if "_proj" in n}
    assert max(ranks) <= 4  # two stages, one adapter
    assert any(not torch.equal(one[name], moved[name]) for name in one)


def test_merged_stages_add_up_to_more_than_one_rank(workspace: Path):
    _, first = run(workspace, "first", training=stage())
    _, second = run(workspace, "second", policy=first / "checkpoint", training=stage(), seed=9)
    base, after = weights(workspace / "policy"), weights(second / "checkpoint")
    ranks = {int(torch.linalg.matrix_rank(after[n] - base[n], rtol=1e-4)) for n in base if "_proj" in n}
    assert max(ranks) > 4


@pytest.mark.parametrize("edit", [{"r": 8}, {"lora_alpha": 1.0}])
def test_an_adapter_of_another_shape_is_refused(workspace: Path, edit):
    _, first = run(workspace, "first", training=stage(carry="adapter"))
    path = first / "checkpoint" / ADAPTER / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(PolicyError, match="an adapter keeps its shape"):
        run(
            workspace,
            "second",
            policy=first / "checkpoint",
            base=workspace / "policy",
            training=stage(carry="adapter"),
        )


def test_a_policy_without_an_adapter_cannot_be_gone_on_with(workspace: Path):
    with pytest.raises(PolicyError, match="has to be trained with training"):
        run(workspace, base=workspace / "policy", training=stage(carry="adapter"))


def test_missing_layers_are_named(workspace: Path):
    with pytest.raises(ConfigError, match="nosuchlayer"):
        run(workspace, training=stage(targets=["nosuchlayer"]))


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["merged", "adapter"])
def test_the_reference_of_the_kl_is_the_policy_as_the_stage_began(workspace: Path, carry):
    """The KL is 0 at the first step, where policy and reference are identical, and not later."""
    with_kl = stage(carry=carry).model_copy(update={"beta": 0.1})
    _, first = run(workspace, "first", training=with_kl, reference=workspace / "policy")
    start = {"policy": first / "checkpoint", "reference": first / "checkpoint"}
    base = workspace / "policy" if carry == "adapter" else None
    _, second = run(workspace, "second", training=with_kl, base=base, **start)
    for target in (first, second):
        kl = [row["kl"] for row in rows_of(target)]
        assert kl[0] == pytest.approx(0, abs=1e-7)
        assert kl[-1] > 1e-5
    assert len(list((second / "checkpoint" / ADAPTER).iterdir())) == 2


@pytest.mark.slow
def test_a_stage_killed_at_any_instant_ends_with_the_same_bytes(workspace: Path):
    _, whole = run(workspace, "whole", training=stage())
    code = f"""
import sys; sys.path[:0] = {[p for p in sys.path if p]!r}
from pathlib import Path
from tests.cropi_core.training.test_lora import run, stage
run(Path({str(workspace)!r}), "killed", training=stage())
"""
    scratch = workspace / "killed" / ".scratch"
    child = processes.start([sys.executable, "-c", code], env={**os.environ})
    deadline = time.monotonic() + 500
    while not list(scratch.glob("checkpoint-*/whole.json")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert training.last_whole(scratch) is not None
    summary, killed = run(workspace, "killed", training=stage(), runtime=CPU)
    assert summary["resumed_from_step"]
    assert digest(whole / "checkpoint") == digest(killed / "checkpoint")
