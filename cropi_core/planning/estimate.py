"""Compute the cost of a curriculum from measurements on a few prompts, without running anything.

    estimates = estimate(works, Assumptions(samples, disk), speeds, Limits.from_config(config))
    total(estimates).seconds

Assumes that at every stage the steps of the pool and of training resemble the sample of the pool, and those of
validation and test sets the sample of the validation sets.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from cropi_core.planning.terms import Assumptions, Estimate, Limits, Line, Memory, Rate, Sample, Speeds, Work

SCORED_NUMBERS_PER_S = 5e8
"""Stored numbers that scoring reads per second; not measured, since scoring takes seconds, not hours."""
MULTIPLIED_NUMBERS_PER_S = 1.5e10
"""Multiply-adds per second of scoring on one core (docs/background/decisions.md); a product takes k of them."""

# Measured on artifacts of the embedded demo; together less than a hundredth of a run's bytes.
MANIFEST = Line(1500, 160)
"""Bytes by number of files."""
METRICS = Line(4000, 80)
SCORES = Line(4000, 21)
SELECTION = Line(3500, 19)
PROMPTS = Line(2500, 25)
ACCURACY = 290.0
DIAGNOSTICS = 1000.0
STORE_ARRAYS = 13


def mean_length(lengths: Sequence[int], limit: int) -> float:
    """Average completion lengths, each cut at ``limit``; 0 if there are none."""
    return sum(min(length, limit) for length in lengths) / len(lengths) if lengths else 0.0


def live_prompts(work: Work, sample: Sample) -> float:
    """Return the number of prompts of a step that have a gradient."""
    return work.prompts * sample.live if work.rows is None else work.rows


def completions(work: Work, sample: Sample, *, live: bool = False) -> float:
    """Return the completions of a prompt, of one with a gradient if ``live``; with passes they are the sample's."""
    passes = sample.live_samples if live else sample.samples
    return work.samples if passes is None or not work.passes else passes


def tokens(work: Work, sample: Sample) -> tuple[float, float]:
    """Count the tokens that a step generates, and those of its forward and backward passes, prompts included.

    A pass reads each completion together with its prompt. Training draws from the prompts with a gradient, or from all
    prompts if the sample has none.
    """
    if work.step in ("rollouts", "evaluation"):
        size = completions(work, sample)
        return work.prompts * size * mean_length(sample.lengths, work.max_new_tokens), 0.0
    live = mean_length(sample.live_lengths, work.max_new_tokens)
    if work.step == "gradients":
        size = completions(work, sample, live=True)
        return 0.0, live_prompts(work, sample) * size * (sample.live_prompt_tokens + live)
    if work.step == "training":
        prompt = sample.live_prompt_tokens
        if not sample.live_lengths:
            prompt, live = sample.prompt_tokens, mean_length(sample.lengths, work.max_new_tokens)
        batch = work.prompts * work.samples
        return work.batches * batch * live, work.steps * batch * (prompt + live)
    return 0.0, 0.0


def packed_tokens(work: Work, sample: Sample) -> float:
    """Count the tokens of a prompt with a gradient in a pass: the prompt once, then its completions."""
    size = completions(work, sample, live=True)
    return sample.live_prompt_tokens + size * mean_length(sample.live_lengths, work.max_new_tokens)


def disk(work: Work, assumptions: Assumptions, limits: Limits) -> float:
    """Return the size of a step's artifact in bytes."""
    sizes, sample = assumptions.disk, assumptions.samples[work.source]
    match work.step:
        case "policy":
            size, files = float(sizes.policy), 6
        case "training":
            size, files = sizes.trained + METRICS.at(work.steps), 7
        case "rollouts":
            files = math.ceil(work.prompts / limits.shard_prompts)
            line = sizes.rollouts[work.source]
            size = files * line.fixed + line.per_row * work.prompts * completions(work, sample)
        case "gradients":
            files = 2 * STORE_ARRAYS + math.ceil(work.prompts / limits.rows_per_shard)
            size = sizes.columns.at(work.prompts) + sizes.features * live_prompts(work, sample)
        case "evaluation":
            size, files = sizes.evaluation.at(work.prompts * work.samples) + ACCURACY * work.calls, 2
        case "scores":
            size, files = SCORES.at(work.prompts), 1
        case "selection":
            size, files = SELECTION.at(work.prompts), 1
        case "prompts":
            size, files = PROMPTS.at(work.prompts), 1
        case "diagnostics":
            size, files = DIAGNOSTICS, 1
    return (size if work.bytes is None else work.bytes) + MANIFEST.at(files)


def _sampling_rate(work: Work, speeds: Speeds) -> Rate:
    """Return the rate at which a step's completions are sampled."""
    other = speeds.evaluation if work.step == "evaluation" else None
    return other or speeds.sampling[work.source]


def seconds(work: Work, sample: Sample, speeds: Speeds, limits: Limits) -> float:
    """Return the seconds of a step, without imports and costs that are paid once per process."""
    if work.seconds is not None:
        return work.seconds
    generated, _ = tokens(work, sample)
    match work.step:
        case "rollouts" | "evaluation":
            rate = _sampling_rate(work, speeds)
            spent = rate.start_s + generated * rate.token_s
        case "gradients":
            rate = speeds.gradients[work.source]
            spent = rate.start_s + live_prompts(work, sample) * packed_tokens(work, sample) * rate.token_s
        case "training":
            rate = speeds.training
            spent = rate.start_s + work.steps * work.prompts * work.samples * rate.completion_s
            spent += math.ceil(work.steps / limits.save_steps) * rate.save_s
        case "scores":
            rows = live_prompts(work, sample)
            number_s = 1 / SCORED_NUMBERS_PER_S + work.products / MULTIPLIED_NUMBERS_PER_S
            spent = speeds.scores_s + rows * limits.k * number_s
        case _:
            spent = 0.0
    return spent + speeds.step_s


def memory(work: Work, sample: Sample, held: Memory, limits: Limits) -> float:
    """Return the peak memory of a step in its own process, in bytes."""
    match work.step:
        case "rollouts" | "evaluation":
            return held.sampling.at(min(limits.generation_rows, work.prompts * work.samples))
        case "gradients":
            one = packed_tokens(work, sample)
            block = min(limits.block_rows, work.prompts) * sample.live * one
            return held.gradients.at(min(block, max(limits.token_budget, one)))
        case "training":
            return held.training
        case "policy":
            return held.sampling.fixed
        case _:
            return held.base


def first_seconds(work: Work, speeds: Speeds, paid: set[str]) -> float:
    """Return the costs that a step pays as the first of its kind in its process, and add them to ``paid``."""
    due = {"imports": speeds.imports_s}
    if work.step in ("policy", "rollouts", "evaluation"):
        due["sampling"] = max(rate.first_s for rate in speeds.sampling.values())
    elif work.step == "gradients":
        due["gradients"] = max(rate.first_s for rate in speeds.gradients.values())
    elif work.step == "training":
        due["training"] = speeds.training.first_s
    new = {name: cost for name, cost in due.items() if name not in paid}
    paid.update(new)
    return sum(new.values())


def estimate(
    works: Sequence[Work], assumptions: Assumptions, speeds: Speeds | None, limits: Limits
) -> list[Estimate]:
    """Estimate every step, in the order of the run; existing artifacts cost nothing."""
    estimates, paid, peak = [], set[str](), 0.0
    for work in works:
        empty = Estimate(work.slot, work.stage, work.origin)
        if work.origin != "computed":
            estimates.append(empty if speeds is None else replace(empty, seconds=0.0))
            continue
        sample = assumptions.samples[work.source]
        generated, passed = tokens(work, sample)
        duration = peak_memory = None
        if speeds is not None:
            if limits.subprocess:
                paid, peak = set(), 0.0
            duration = first_seconds(work, speeds, paid) + seconds(work, sample, speeds, limits)
            peak = peak_memory = max(peak, memory(work, sample, speeds.memory, limits))
        estimates.append(
            replace(
                empty,
                tokens_generated=generated,
                tokens_passed=passed,
                seconds=duration,
                peak_memory_bytes=peak_memory,
                disk_bytes=disk(work, assumptions, limits),
            )
        )
    return estimates


def total(estimates: Sequence[Estimate], name: str = "total", stage: int | None = None) -> Estimate:
    """Add up estimates; of memory take the maximum."""
    times = [e.seconds for e in estimates if e.seconds is not None]
    peaks = [e.peak_memory_bytes for e in estimates if e.peak_memory_bytes is not None]
    return Estimate(
        name,
        stage,
        None,
        sum(e.tokens_generated for e in estimates),
        sum(e.tokens_passed for e in estimates),
        sum(times) if times else None,
        max(peaks, default=None),
        sum(e.disk_bytes for e in estimates),
    )


def by_stage(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Add up the steps of every stage."""
    stages = sorted({e.stage for e in estimates if e.stage is not None})
    return [
        total([e for e in estimates if e.stage == stage], f"stage {stage}" if stage else "before", stage)
        for stage in stages
    ]
