"""Describe the GPU memory of a planned run by step, whether it fits a card, and the least time of its products."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from cropi_core.planning.cards import Card
from cropi_core.planning.device_memory import SPARE_BYTES, Shape, device_needs, fault
from cropi_core.planning.estimate import live_prompts, packed_tokens, tokens
from cropi_core.planning.rehearsal import Rehearsed
from cropi_core.planning.terms import Assumptions, Speeds
from data_schemas import Config

FORWARD, BACKWARD = 2, 4
"""Floating point operations of a parameter and token; a backward pass to activations alone takes half of the second."""


def has_device(config: Config) -> bool:
    """Return whether this machine has the device of ``runtime.device``."""
    return not config.runtime.device.startswith("cuda") or torch.cuda.is_available()


def on_device(
    config: Config, rehearsed: Rehearsed, assumptions: Assumptions, speeds: Speeds | None, card: Card | None
) -> dict[str, Any]:
    """Count the memory of each step on a GPU.

    Args:
        config: Configuration of the run.
        rehearsed: Its steps and its policy.
        assumptions: Lengths of prompts and completions.
        speeds: Measurements; the memory of a gradient pass is taken from them if they are of a GPU.
        card: The GPU; None only counts.

    Returns:
        ``card``, ``memory_bytes``, ``spare_bytes``, and ``steps`` with ``step``, ``bytes``, ``parts``, ``fits``,
        ``fault``, ``advice`` and ``least_seconds``: the time of the step's matrix products, over all stages, at the
        card's full rate.
    """
    settings = AutoConfig.from_pretrained(rehearsed.policy, trust_remote_code=False, local_files_only=True)
    shape = Shape.of(settings, config.gradients.layers)
    if speeds is not None and torch.cuda.is_available() and speeds.memory.gradients.per_row:
        shape = replace(shape, measured=speeds.memory.gradients.per_row)
    prompt_tokens = max(sample.prompt_tokens for sample in assumptions.samples.values())
    rows = []
    seconds = _least_seconds(config, shape, rehearsed, assumptions, card) if card else {}
    for need in device_needs(config, shape, prompt_tokens, card):
        reason = fault(need, card) if card else None
        rows.append(
            {
                "step": need.step,
                "bytes": round(need.total),
                "parts": {name: round(size) for name, size in need.parts.items()},
                "fits": reason is None if card else None,
                "fault": reason,
                "advice": need.advice if reason else None,
                "least_seconds": seconds.get(need.step),
            }
        )
    return {
        "card": card.name if card else None,
        "memory_bytes": card.memory_bytes if card else None,
        "spare_bytes": SPARE_BYTES,
        "steps": rows,
    }


def _least_seconds(
    config: Config, shape: Shape, rehearsed: Rehearsed, assumptions: Assumptions, card: Card
) -> dict[str, float]:
    """Return the seconds of matrix products in gradients and training, on all GPUs of the step together."""
    runtime, training = config.runtime, config.training
    workers = runtime.ray.workers if runtime.ray else runtime.workers
    ranks = runtime.launch.processes if runtime.launch else 1
    again = 0 if runtime.gradient_checkpointing is False else FORWARD
    reference = FORWARD if training.beta > 0 else 0
    factors = {
        "gradients": (FORWARD + BACKWARD / 2) / workers,
        "training": (FORWARD + BACKWARD + again + reference) / ranks,
    }
    counts = dict.fromkeys(factors, 0.0)
    for work in rehearsed.works:
        sample = assumptions.samples[work.source]
        if work.origin == "computed" and work.step == "gradients":
            counts["gradients"] += live_prompts(work, sample) * packed_tokens(work, sample)
        elif work.origin == "computed" and work.step == "training":
            counts["training"] += tokens(work, sample)[1]
    rate = card.bf16_flops / shape.parameters
    return {step: counts[step] * factor / rate for step, factor in factors.items()}
