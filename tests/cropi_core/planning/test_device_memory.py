"""The memory of a GPU, counted without one: bytes a token as a followed pass has them, and presets that fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen2Config

from cropi_core.config.loading import load_config
from cropi_core.errors import ConfigError
from cropi_core.gradients import attention
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.packing import make_pack
from cropi_core.planning.cards import CARDS, find_card
from cropi_core.planning.device_memory import (
    Shape,
    activation_bytes,
    device_needs,
    fault,
    kept_bytes,
    servers_share,
    sketch_bytes,
)
from cropi_core.planning.prediction import predict
from data_schemas.gradients import Projection
from data_schemas.vllm import Vllm
from tests.support import tiny
from tests.support.live_memory import LiveBytes

WIDTHS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
TYPES = {2: torch.bfloat16, 4: torch.float32}
# Of config.json of the policies that the presets name.
QWEN = {
    "Qwen/Qwen2.5-0.5B-Instruct": (151_936, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (151_936, 1536, 8960, 28, 12, 2, True),
    "Qwen/Qwen2.5-7B-Instruct": (152_064, 3584, 18_944, 28, 28, 4, False),
}
PRESETS = {
    "paper-1.5b": "h100-80gb",
    "paper-7b": "h100-80gb",
    "single-80gb": "h100-80gb",
    "small-gpu": "rtx4090-24gb",
}
PROMPT = 256


def qwen(path):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    values: dict[str, Any] = dict(zip(names, QWEN[path], strict=True))
    return Qwen2Config(**values)


def needs_of(config, card=None):
    shape = Shape.of(qwen(config.policy.path), config.gradients.layers)
    return {need.step: need for need in device_needs(config, shape, PROMPT, card)}


def engine_of(kind, number, form, layers):
    config = CONFIG_MAPPING[kind](**(WIDTHS | {"num_hidden_layers": layers}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=TYPES[number], attn_implementation="sdpa").eval()
    return FeatureEngine(model, Projection(k=64, form=form)), config


def peak(engine, tokens, recompute):
    """Return the largest sum of the bytes of all tensors that a pass creates."""
    pack = make_pack([[1] * 8], [[[2] * (tokens // 2)] * 2], torch.device("cpu"))
    out = engine.accumulators(1)
    with LiveBytes() as live:
        engine.project(pack, 1.0, lambda _, logprobs, __: torch.ones_like(logprobs), out, recompute=recompute)
    return live.peak


@pytest.mark.parametrize(
    ("kind", "number", "form"),
    [
        ("qwen2", 2, "folded"),
        ("qwen2", 4, "folded"),
        ("qwen2", 2, "uniform"),
        ("qwen3", 2, "factored"),
        ("gemma", 2, "folded"),
        ("llama", 4, "uniform"),
    ],
)
def test_activations_take_the_counted_bytes_a_token(kind, number, form, monkeypatch):
    """On the CPU, without masks, as the kernel of a GPU has none; the counted bytes may be a little more."""
    monkeypatch.setattr(attention, "MASK_ENTRIES", 0)
    monkeypatch.setattr(attention, "MASK_ENTRIES_A_TOKEN", 0)
    engine, config = engine_of(kind, number, form, layers=2)
    shape = Shape.of(config)
    kept, used = activation_bytes(shape, number)
    counted = 2 * kept + kept_bytes(shape, number, engine.projection) + used
    measured = (peak(engine, 1024, False) - peak(engine, 768, False)) / 256
    assert 0.97 <= counted / measured <= 1.2
    again = shape.layers * number * shape.hidden + kept_bytes(shape, number, engine.projection) + kept + used
    measured = (peak(engine, 1024, True) - peak(engine, 768, True)) / 256
    assert 0.97 <= again / measured <= 1.3
    engine.close()


@pytest.mark.parametrize("form", ["folded", "factored", "uniform"])
def test_sketches_take_the_counted_bytes(form):
    engine, config = engine_of("llama", 4, form, layers=2)
    held = [tensor for s in engine.sketches.values() for tensor in (s.cells, s.kept) if tensor is not None]
    counted = sketch_bytes(Shape.of(config), engine.projection)
    assert sum(tensor.nbytes for tensor in held) == pytest.approx(counted, rel=0.01)
    engine.close()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_step_of_a_preset_fits_its_card(name):
    config, card = load_config(name), CARDS[PRESETS[name]]
    needs = needs_of(config, card)
    assert set(needs) == {"rollouts", "gradients", "training", "evaluation"}
    assert {step: fault(need, card) for step, need in needs.items()} == dict.fromkeys(needs)
    lines = Path(f"configs/{name}.yaml").read_text(encoding="utf-8")
    assert f"cropi plan configs/{name}.yaml --card {card.name}" in lines


@pytest.mark.parametrize(("name", "share"), [("paper-1.5b", 0.3), ("single-80gb", 0.3), ("paper-7b", 0.5)])
def test_vllm_inside_training_is_counted_while_it_samples_or_always(name, share):
    """Asleep it takes nothing; with all else that training keeps, it would not fit beside a large micro-batch."""
    card = CARDS["h100-80gb"]
    need = needs_of(load_config(name), card)["training"]
    assert need.parts["vLLM in the process"] == pytest.approx(share * 80e9)
    assert "activations" not in need.parts
    awake = ["runtime.trl.vllm_enable_sleep_mode=false", "runtime.train_micro_batch=32"]
    need = needs_of(load_config(name, awake), card)["training"]
    assert {"vLLM in the process", "activations"} <= need.parts.keys()
    assert fault(need, card)


@pytest.mark.parametrize(
    ("name", "sequences"), [("paper-1.5b", 128), ("single-80gb", 256), ("paper-7b", 128)]
)
def test_the_share_of_vllm_inside_training_holds_all_completions_of_a_step(name, sequences):
    """Weights and activations of vLLM take 4 GB more than the weights; the rest is its cache."""
    config = load_config(name)
    launch, training, trl = config.runtime.launch, config.training, config.runtime.trl
    ranks = launch.processes if launch else 1
    assert training.prompts_per_step * training.sampling.samples == sequences * ranks
    shape = Shape.of(qwen(config.policy.path))
    length = PROMPT + training.sampling.max_new_tokens
    cache = sequences * length * 2 * 2 * shape.layers * shape.key
    assert trl.vllm_gpu_memory_utilization is not None
    assert 2 * shape.parameters + 4e9 + cache <= trl.vllm_gpu_memory_utilization * 80e9


@pytest.mark.parametrize(
    ("override", "step", "advice"),
    [
        ("runtime.token_budget=32768", "gradients", "runtime.token_budget=16384"),
        ("runtime.train_micro_batch=64", "training", "runtime.train_micro_batch=32"),
        ('runtime.vllm.arguments=["--gpu-memory-utilization=0.05"]', "rollouts", "--gpu-memory-utilization"),
    ],
)
def test_a_step_that_does_not_fit_says_why_and_what_to_change(override, step, advice):
    card = CARDS["h100-80gb"]
    need = needs_of(load_config("single-80gb", [override]), card)[step]
    assert " GB" in (fault(need, card) or "")
    assert advice in need.advice


def test_seven_billion_parameters_do_not_train_on_one_card():
    card = CARDS["h100-80gb"]
    need = needs_of(load_config("paper-7b", ["runtime.launch={processes: 1}"]), card)["training"]
    assert fault(need, card)
    assert "runtime.launch.sharded" in need.advice


def test_servers_that_share_a_gpu_are_added():
    arguments = ["--gpu-memory-utilization=0.6", "--tensor-parallel-size=2"]
    assert servers_share(Vllm(servers=2, gpus=["0", "1"])) == (1, 0.92)
    assert servers_share(Vllm(servers=2, gpus=["0,1", "1,2"], arguments=arguments)) == (2, 1.2)
    assert servers_share(Vllm(servers=2)) == (1, 1.84)  # both get all GPUs of the process
    card = CARDS["h100-80gb"]
    config = load_config("single-80gb", ["runtime.vllm={servers: 2}"])
    assert "1.84 of the card" in (fault(needs_of(config, card)["rollouts"], card) or "")


def test_features_of_the_output_layer_keep_no_activations():
    every, head = (
        needs_of(load_config("single-80gb", [f"gradients.layers={layers}"]))["gradients"]
        for layers in ("all", "head")
    )
    assert head.parts["activations"] < 0.1 * every.parts["activations"]


def test_a_plan_names_the_card_and_runs_without_one(tmp_path):
    """A GPU that this machine lacks is counted, and nothing is measured."""
    config = tiny.tiny(stages=1, runtime={"device": "cuda"})
    result = predict(config, str(tmp_path / "root"), tmp_path, calibrated=True, card="l4-24gb")
    memory = result["device_memory"]
    assert result["calibration"] is None
    assert memory["card"] == "l4-24gb"
    assert {step["fits"] for step in memory["steps"]} == {True}
    assert {s["step"]: s["least_seconds"] for s in memory["steps"]}["training"] > 0


def test_an_unknown_card_is_refused():
    with pytest.raises(ConfigError, match="h100-80gb"):
        find_card("h100")


def test_a_measurement_on_a_gpu_replaces_the_counted_bytes():
    config = load_config("single-80gb")
    shape = replace(Shape.of(qwen(config.policy.path)), measured=1e6)
    (need,) = [n for n in device_needs(config, shape, PROMPT) if n.step == "gradients"]
    assert need.parts["activations"] == 8192 * 1e6
