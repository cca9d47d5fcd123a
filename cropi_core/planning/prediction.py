"""Assemble a plan: the steps, the measurements or assumptions, the estimates, and notes on them."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_schemas import Config

if TYPE_CHECKING:
    from cropi_core.planning.calibration import Measured
    from cropi_core.planning.rehearsal import Rehearsed
    from cropi_core.planning.terms import Assumptions, Estimate, Sample, Source

COUNTED_PROMPTS = 500
"""Number of prompts that are tokenised if nothing is sampled."""


def predict(
    config: Config, root: str, folder: Path, *, calibrated: bool, card: str | None = None
) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: Configuration of the run.
        root: Root in which artifacts are looked up; nothing is written to it.
        folder: An empty directory for measurements.
        calibrated: Measure; otherwise completions are assumed to have their maximum length, and there are no times.
        card: Name of a GPU with which the memory of each step is compared. If ``runtime.device`` is a GPU and this
            machine has none, nothing is measured.

    Returns:
        ``run``, ``calibration`` (None without one), ``steps``, ``stages`` and ``totals`` with the fields of
        :class:`cropi_core.planning.terms.Estimate`, ``device_memory`` (see
        :func:`cropi_core.planning.card_plan.on_device`; None for the CPU without ``card``), and ``notes`` with the
        assumptions.

    Raises:
        CropiError: The run itself would raise it before it computes anything, or a measured step raised it.
    """
    start = time.monotonic()
    from cropi_core.artifacts import Store
    from cropi_core.planning import estimate as plan
    from cropi_core.planning.calibration import Calibration, facts
    from cropi_core.planning.card_plan import has_device, on_device
    from cropi_core.planning.cards import find_card
    from cropi_core.planning.rehearsal import rehearse
    from cropi_core.planning.terms import Limits
    from cropi_core.runs import run_id

    imports_s = time.monotonic() - start
    chosen = find_card(card) if card else None
    (folder / "store").mkdir()
    rehearsed = rehearse(config, Store(root), folder / "store")
    limits = Limits.from_config(config)
    measured: Measured | None = None
    calibrated = calibrated and config.training.engine != "command"  # a measurement would run it
    calibrated = calibrated and (chosen is None or has_device(config))
    if calibrated and any(work.origin == "computed" for work in rehearsed.works):
        (folder / "measured").mkdir()
        calibration = Calibration(config, rehearsed.policy, rehearsed.prompts, folder / "measured")
        measured = calibration.run(imports_s)
    assumptions = measured.assumptions if measured else assumed(config, rehearsed, limits)
    speeds = measured.speeds if measured else None
    steps = plan.estimate(rehearsed.works, assumptions, speeds, limits)
    on_gpu = chosen is not None or config.runtime.device.startswith("cuda")
    return {
        "run": run_id(config),
        "calibration": facts(measured) if measured else None,
        "steps": [row(step) for step in steps],
        "stages": [row(stage) for stage in plan.by_stage(steps)],
        "totals": row(plan.total(steps)),
        "device_memory": on_device(config, rehearsed, assumptions, speeds, chosen) if on_gpu else None,
        "notes": notes(config, rehearsed, assumptions.samples, measured),
    }


def row(estimate: "Estimate") -> dict[str, Any]:
    """Turn an estimate into JSON types; tokens and bytes are integers, seconds have three decimals."""
    fields = asdict(estimate)
    for name in ("tokens_generated", "tokens_passed", "peak_memory_bytes", "disk_bytes"):
        fields[name] = None if fields[name] is None else round(fields[name])
    fields["seconds"] = None if fields["seconds"] is None else round(fields["seconds"], 3)
    return fields


def assumed(config: Config, rehearsed: "Rehearsed", limits: Any) -> "Assumptions":
    """Assume the longest completions and a gradient for every prompt; only prompts are tokenised."""
    from transformers import AutoTokenizer

    from cropi_core.planning.files import assumed_disk
    from cropi_core.planning.samples import spread
    from cropi_core.planning.terms import Assumptions, Sample
    from cropi_core.policy import render
    from cropi_core.prompts import read_prompts

    tokenizer: Any = AutoTokenizer.from_pretrained(
        rehearsed.policy, trust_remote_code=False, local_files_only=True
    )
    longest = max(
        s.max_new_tokens
        for s in (
            config.rollouts.pool,
            config.rollouts.validation,
            config.training.sampling,
            config.evaluation.sampling,
        )
    )

    def sample(names: list[str]) -> Sample:
        counts = []
        for name in names:
            rows = spread(read_prompts(rehearsed.prompts[name]), COUNTED_PROMPTS, 1).to_pylist()
            counts += [len(render(tokenizer, r["messages"])) for r in rows]
        mean = sum(counts) / len(counts)
        return Sample(0, mean, (longest,), 1.0, mean, (longest,))

    samples: dict[Source, Sample] = {
        "pool": sample(["pool"]),
        "validation": sample([*config.data.validation]),
    }
    lengths: dict[Source, int] = {
        "pool": config.rollouts.pool.max_new_tokens,
        "validation": config.rollouts.validation.max_new_tokens,
    }
    return Assumptions(samples, assumed_disk(rehearsed.policy, lengths, limits))


def notes(
    config: Config,
    rehearsed: "Rehearsed",
    samples: "dict[Source, Sample] | Any",
    measured: "Measured | None",
) -> list[str]:
    """List the assumptions, and the costs that are not counted."""
    notes = []
    if config.training.engine == "command":
        notes.append(
            "the cost of training.command is unknown: rows of training are those of cropi's own trainer"
        )
    if config.rollouts.samples_by_source or config.evaluation.samples_by_source:
        notes.append(
            "samples_by_source: completions are counted by source; the share of prompts with a gradient is predicted "
            "as if all sources had the number of the others"
        )
    existing = [work.slot for work in rehearsed.works if work.origin != "computed"]
    if existing:
        notes.append(f"{len(existing)} of {len(rehearsed.works)} artifacts exist already and cost nothing")
    if len(existing) == len(rehearsed.works):
        return notes
    if measured is None:
        notes.append(
            "not calibrated: every completion is counted at its longest and every prompt as if it had a gradient; "
            "tokens and disk are upper bounds"
        )
    else:
        pool, validation = samples["pool"], samples["validation"]
        notes.append(
            f"measured on {pool.prompts} prompts of the pool and {validation.prompts} of the validation sets; test "
            "sets are assumed to be like validation sets, what is trained on like the pool's prompts with a gradient"
        )
        notes += _dead(config, samples)
        if not measured.memory_exact:
            notes.append(
                "this system does not forget peaks of memory: growth below an earlier peak was not seen"
            )
    if config.stages > 1:
        notes.append(
            "lengths and shares of prompts with a gradient of later stages are assumed equal to the first's"
        )
    if config.may_refresh and config.rollouts.refresh == "never":
        notes.append("a limit of the section diagnostics may collect trajectories again; that is not counted")
    notes += _servers(config, rehearsed)
    if config.runtime.workers > 1:
        notes.append(
            f"runtime.workers={config.runtime.workers}: gradients are timed in one process with all threads; the "
            "memory is that of one process, each worker takes as much again"
        )
    if config.rollouts.validation.max_new_tokens < config.evaluation.sampling.max_new_tokens:
        notes.append(
            "evaluation may generate longer completions than the validation sets' rollouts; taken as equal"
        )
    if measured is not None and config.rollouts.pool.max_new_tokens < config.training.sampling.max_new_tokens:
        notes.append(
            "training may generate longer completions than the pool's rollouts; tokens are taken as equal"
        )
    return notes


def _servers(config: Config, rehearsed: "Rehearsed") -> list[str]:
    """Explain the effect of vLLM servers on the estimates."""
    engines = {"rollouts": config.rollouts.engine, "evaluation": config.evaluation.engine}
    todo = [w for w in rehearsed.works if w.origin == "computed" and engines.get(w.step) == "vllm"]
    if not todo:
        return []
    vllm = config.runtime.vllm
    if vllm.base_urls:
        return [
            f"{len(todo)} steps sample by running servers ({', '.join(vllm.base_urls)}), whose memory is not included"
        ]
    return [
        f"{len(todo)} steps start {vllm.servers} of vLLM's servers each, which is in their seconds; the servers' "
        "memory is not in the table of steps (--gpu-memory-utilization is its limit; --card compares it with a GPU)"
    ]


def _dead(config: Config, samples: Any) -> list[str]:
    """Report sources without any sampled prompt that has a gradient."""
    notes = []
    for source, label in (("pool", "the pool"), ("validation", "the validation sets")):
        if samples[source].live == 0 and config.needs_gradients:
            notes.append(
                f"none of {samples[source].prompts} prompts sampled of {label} has a gradient (their rewards are all "
                "equal): gradients are predicted to cost nothing, and scores would fail; collect more samples a "
                "prompt, raise the temperature, or choose other prompts"
            )
    return notes
