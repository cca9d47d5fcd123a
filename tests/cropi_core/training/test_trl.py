"""The supported fields of TRL's configuration, and the equality of TRL's losses with the scoring objective."""

import dataclasses
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("trl", reason="training needs the extra `train`")

from cropi_core.errors import ConfigError
from cropi_core.gradients.objective import token_weights
from cropi_core.policy.loading import load_policy
from cropi_core.training.arguments import trackers, trainer_arguments
from cropi_core.training.trainer import GRPOConfig
from data_schemas.config import Config
from data_schemas.gradients import Objective
from data_schemas.runtime import Runtime
from data_schemas.training import Training
from data_schemas.trl import NEVER, SET_ELSEWHERE, TrlRuntime, TrlTraining
from tests.support.training import CPU, SMALL, loss_trainer, rows_of, run, write_policy, write_tables

PLACES = {
    "SET_ELSEWHERE": set(SET_ELSEWHERE),
    "NEVER": set(NEVER),
    "TrlTraining": set(TrlTraining.model_fields),
    "TrlRuntime": set(TrlRuntime.model_fields),
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)
    return tmp_path


def config(**changes):
    world = {"kind": "world", "families": {"sort": 4}}
    return Config.model_validate({"data": {"pool": world, "validation": {"v": world}}, **changes})


# -- fields ------------------------------------------------------------------------------------------------------


def test_every_field_of_the_installed_trl_is_in_one_place():
    known = [name for names in PLACES.values() for name in names]
    assert sorted(known) == sorted({field.name for field in dataclasses.fields(GRPOConfig)})


def test_what_a_field_follows_from_is_a_setting():
    settings = config().model_dump()
    for place in SET_ELSEWHERE.values():
        for name in place.split(" and "):
            section = settings
            for part in name.split(".")[:-1]:
                section = section[part] or {
                    "config": None,
                    "processes": 1,
                }  # runtime.launch is empty by default
            assert name.split(".")[-1] in section, name


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("training", "learning_rate", "follows from training.learning_rate: set that"),
        ("training", "push_to_hub", "a stage sends nothing to a hub"),
        ("training", "torch_compile", "belongs in runtime.trl"),
        ("runtime", "epsilon_high", "belongs in training.trl"),
        ("runtime", "fsdp", "runtime.launch.config"),
        ("training", "learing_rate", "is not a field of TRL's GRPOConfig"),
    ],
)
def test_a_field_that_is_not_passed_on_is_refused_by_name(section, name, said):
    with pytest.raises(ValidationError, match=f"{name} .*{said}"):
        config(**{section: {"trl": {name: 1}}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"loss_type": "cispo"}}, "for example to 5"),
        ({"objective": {"loss_type": "luspo"}}, "importance_sampling_level=sequence"),
        ({"training": {"trl": {"sapo_temperature_pos": 2}}}, "which does not read them"),
        ({"training": {"trl": {"sync_ref_model": True}}}, "needs training.beta above 0"),
        ({"training": {"second_moments": True, "trl": {"optim": "adafactor"}}}, "drop training.trl.optim"),
        ({"training": {"second_moments": True, "lora": {}}}, "drop training.lora"),
        (
            {"training": {"optimizer_state": "carried", "lora": {}}},
            "optimizer_state=carried.*drop training.lora",
        ),
        ({"training": {"optimizer_state": "carried", "start": "base"}}, "training.start=previous"),
        ({"training": {"lora": {}, "beta": 0.1, "reference": "base"}}, "set training.reference=stage_start"),
        ({"training": {"lora": {"carry": "adapter"}, "start": "base"}}, "set merged"),
        ({"runtime": {"launch": {"processes": 3}}}, "not a multiple of runtime.launch.processes=3"),
        ({"runtime": {"trl": {"vllm_mode": "server"}}}, "set training.engine=vllm"),
    ],
)
def test_contradictory_settings_are_reported(changes, said):
    with pytest.raises(ValidationError, match=said):
        config(**changes)


def test_a_configuration_without_it_is_unchanged_by_json():
    assert Config.model_validate_json(config().model_dump_json()) == config()


def test_fields_reach_the_trainer(tmp_path: Path):
    trl = {"adam_beta2": 0.9, "epsilon_high": 0.28, "optim": "adafactor", "mask_truncated_completions": True}
    stage = Training.model_validate({"trl": trl})
    runtime = Runtime.model_validate({"device": "cpu", "trl": {"torch_empty_cache_steps": 3}})
    arguments = trainer_arguments(stage, Objective(), "float32", 0, runtime, tmp_path, 1000)
    assert {name: getattr(arguments, name) for name in trl} == trl
    assert arguments.torch_empty_cache_steps == 3
    assert not arguments.use_vllm
    assert not arguments.push_to_hub


def test_vllm_stops_where_a_turn_ends(tmp_path: Path):
    runtime = Runtime(device="cpu")
    stage = Training(engine="vllm")
    arguments = trainer_arguments(stage, Objective(), "float32", 0, runtime, tmp_path, 1000, ends=[2, 7])
    assert arguments.generation_kwargs == {"stop_token_ids": [2, 7]}
    own = trainer_arguments(Training(), Objective(), "float32", 0, runtime, tmp_path, 1000, ends=[2, 7])
    assert own.generation_kwargs is None


def test_settings_that_trl_refuses_are_reported_by_name(tmp_path: Path):
    runtime = Runtime.model_validate({"device": "cpu", "trl": {"tf32": True}})
    with pytest.raises(ConfigError, match=r"TRL refuses the settings of the stage \(tf32\)"):
        trainer_arguments(Training(), Objective(), "float32", 0, runtime, tmp_path, 1000)


@pytest.mark.parametrize(
    ("setting", "recomputes"), [(None, False), (True, True), (False, False)], ids=["auto", "on", "off"]
)
def test_gradient_checkpointing_is_by_size_unless_it_is_set(tmp_path: Path, setting, recomputes):
    runtime = Runtime(device="cpu", gradient_checkpointing=setting)
    arguments = trainer_arguments(Training(), Objective(), "float32", 0, runtime, tmp_path, 1000)
    assert arguments.gradient_checkpointing is recomputes


@pytest.mark.slow
def test_a_setting_of_trl_changes_the_stage(workspace: Path):
    """Adam without momentum takes a different second step; the first is the same."""
    run(workspace, "plain")
    other = Training.model_validate(SMALL.model_dump() | {"trl": {"adam_beta1": 0.0}})
    run(workspace, "other", training=other)
    plain, other = rows_of(workspace / "plain"), rows_of(workspace / "other")
    assert plain[0]["loss"] == other[0]["loss"]
    assert [r["grad_norm"] for r in plain] != [r["grad_norm"] for r in other]


def test_tensorboard_gets_every_step_below_the_logs(workspace: Path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runtime = CPU.model_copy(update={"report_to": ["tensorboard"]})
    run(workspace, runtime=runtime, logs=workspace / "logs", name="run")
    (written,) = (workspace / "logs" / "tensorboard").rglob("events.*")
    log = event.EventAccumulator(str(written.parent)).Reload()
    found = [(one.step, one.value) for one in log.Scalars("train/reward")]
    wanted = [(row["step"], pytest.approx(row["reward"], abs=1e-6)) for row in rows_of(workspace / "run")]
    assert found == wanted


def test_a_tracker_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="pip install nosuchtracker"):
        trackers(["nosuchtracker"])


# -- losses ------------------------------------------------------------------------------------------------------

PROMPTS = ["0=", "1011="]
SEQUENCE = {"importance_sampling_level": "sequence"}
WIDE = {"clip_epsilon": 1e6}


def stored_batch(model, tokenizer, drift: float):
    """Return two groups of four completions of different lengths, sampled by weights that are ``drift`` away."""
    generator = torch.Generator().manual_seed(7)
    groups = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        completions = [
            torch.randint(3, 8, (n,), generator=generator).tolist() + [2] * (n < 6) for n in (2, 5, 6, 3)
        ]
        rewards = (
            torch.tensor([1.0, 0.0, 0.0, 1.0]) if prompt == "0=" else torch.tensor([0.0, 0.25, 1.0, 0.0])
        )
        groups.append((ids, completions, rewards))
    behavior = []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(drift * torch.randn(parameter.shape, generator=generator))
        for ids, completions, _ in groups:
            behavior.append([logprobs(model, ids, c) for c in completions])
    return groups, behavior


def logprobs(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


def padded(rows, left=False):
    width = max(len(row) for row in rows)
    fill = [torch.zeros(width - len(row)) for row in rows]
    rows = [torch.as_tensor(row) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.stack([torch.cat([f, r] if left else [r, f]) for f, r in pairs])


def gradient_of_trl(model, trainer, groups, behavior, advantages):
    """Return the gradient of TRL's own loss on the stored completions, in one micro-batch."""
    prompts = [ids for ids, completions, _ in groups for _ in completions]
    completions = [c for _, group, _ in groups for c in group]
    inputs = {
        "prompt_ids": padded(prompts, left=True).long(),
        "prompt_mask": padded([torch.ones(len(p)) for p in prompts], left=True).long(),
        "completion_ids": padded(completions).long(),
        "completion_mask": padded([torch.ones(len(c)) for c in completions]).long(),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    if behavior is not None:
        inputs["old_per_token_logps"] = padded([row for group in behavior for row in group])
    model.zero_grad()
    trainer._compute_loss(model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_of_ours(model, groups, behavior, objective):
    """Return -∇J of the two groups: each prompt's gradient, combined like in a step (by tokens, or by prompts)."""
    model.zero_grad()
    tokens = [sum(map(len, completions)) for _, completions, _ in groups]
    for (ids, completions, rewards), stored, count in zip(groups, behavior, tokens, strict=True):
        mask = padded([torch.ones(len(c)) for c in completions]).bool()
        now = padded([logprobs(model, ids, c) for c in completions])
        weights = token_weights(now.detach(), padded(stored), mask, rewards, objective, 6).weights
        by_tokens = objective.loss_type in ("dapo", "bnpo", "cispo", "vespo")
        share = count / sum(tokens) if by_tokens else 1 / len(groups)
        (-share * (weights * now).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(tmp_path, loss_type, ratio, drift, *, trl=None, clip_epsilon=0.2):
    """Return the largest difference of the two gradients, relative to the larger one's largest absolute value."""
    trl = {**({"epsilon_high": 5.0} if loss_type == "cispo" else {}), **(trl or {})}
    write_policy(tmp_path / "policy", seed=0)
    model, tokenizer = load_policy(tmp_path / "policy", "float32", "cpu")
    start = [p.detach().clone() for p in model.parameters()]
    groups, behavior = stored_batch(model, tokenizer, drift)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    objective = Objective(loss_type=loss_type, ratio=ratio, clip_epsilon=clip_epsilon)
    stage = Training.model_validate(
        {"prompts_per_step": 2, "sampling": {"samples": 4, "max_new_tokens": 6}, "trl": trl}
    )
    trainer = loss_trainer(model, tokenizer, tmp_path, stage, objective)
    model.train()
    advantages = torch.cat([(r - r.mean()) / (r.std() + 1e-4) for _, _, r in groups])
    theirs = gradient_of_trl(model, trainer, groups, None if ratio == "none" else behavior, advantages)
    ours = gradient_of_ours(model, groups, behavior, objective)
    assert theirs.abs().max() > 1e-3
    return float((theirs - ours).abs().max() / theirs.abs().max())


LOSSES = ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_every_loss_of_trl_has_the_gradient_of_our_objective(tmp_path: Path, loss_type):
    trl = SEQUENCE if loss_type == "luspo" else None
    assert compare(tmp_path, loss_type, "none", 0.0, trl=trl) < 2e-5


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(("ratio", "clip_epsilon"), [("token", 1e6), ("token_clip", 0.05)])
def test_so_have_those_with_token_ratios_on_stored_completions(
    tmp_path: Path, loss_type, ratio, clip_epsilon
):
    assert compare(tmp_path, loss_type, ratio, 0.1, clip_epsilon=clip_epsilon) < 2e-5


def test_the_clip_of_that_comparison_clips(tmp_path: Path):
    """Without the clip in the scoring objective the gradients differ, so the comparison above is sensitive to it."""
    assert compare(tmp_path, "dapo", "token", 0.1, clip_epsilon=0.05) > 1e-2


def test_cispo_is_dapo_with_the_ratio_held(tmp_path: Path):
    assert compare(tmp_path, "cispo", "token", 0.1, trl={"epsilon_high": 1e6}) < 2e-5


def test_a_sequence_ratio_is_that_of_gspo(tmp_path: Path):
    """TRL spreads a sequence's ratio over its tokens' mean gradient, like `ratio: sequence` with `grpo`."""
    assert compare(tmp_path, "grpo", "sequence", 0.1, trl=SEQUENCE, clip_epsilon=1e6) < 2e-5
