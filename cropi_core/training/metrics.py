"""Metrics of a GRPO stage: from the trainer's log to one Parquet row an optimizer step, and to the summary.

The table contains no times, so equal stages give equal bytes.
"""

import math
from typing import Any

import pyarrow as pa

from cropi_core.errors import CropiError
from data_schemas import Training

COLUMNS = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "entropy": "entropy",
    "completion_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clip_ratio": "clip_ratio/region_mean",
    "clip_ratio_low": "clip_ratio/low_mean",
    "clip_ratio_high": "clip_ratio/high_mean",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "not_gradable": "not_gradable",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}
"""TRL's key of each column. ``reward``, ``reward_std``, ``completion_length`` (tokens), ``truncated``
(share), ``frac_reward_zero_std`` and ``not_gradable`` (count) describe the completions generated for the step,
null on a step that reuses them (iterations > 1); ``kl`` is null without a reference; ``grad_norm`` is taken
before clipping."""

TERM = "reward_term_"
"""Beginning of the name of a column that only sums of verifiers have: the mean reward that one of them gave."""

METRICS = pa.schema(
    [pa.field("step", pa.int32(), False), *[pa.field(name, pa.float64()) for name in COLUMNS]]
)
"""One row for each optimizer step; ``step`` counts from 1."""


class TrainingError(CropiError, ArithmeticError):
    """A stage produced values that are not finite, or did not fit into memory."""


def check_finite(step: int, log: dict[str, Any]) -> None:
    """Check the loss and the gradient norm of a step.

    Raises:
        TrainingError: One of them is NaN or infinite; nothing of this step is kept.
    """
    for name in ("loss", "grad_norm"):
        value = log.get(name)
        if value is not None and not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value}; lower training.learning_rate={log.get('learning_rate')} or "
                "training.max_grad_norm, or look for infinities in the start policy"
            )


def step_metrics(log: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of one step that the trainer logged, by column."""
    values = {name: log.get(key) for name, key in COLUMNS.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def metrics_table(history: list[dict[str, Any]]) -> pa.Table:
    """Convert the trainer's log history to a table of :data:`METRICS`.

    Args:
        history: Entries of ``TrainerState.log_history``; those without a loss (the closing one) are dropped.

    Returns:
        Rows in the order of steps. With weighted sums of verifiers it also has a column for each term (:data:`TERM`).
    """
    entries = [entry for entry in history if "loss" in entry]
    terms = sorted({name for entry in entries for name in entry if name.startswith(TERM)})
    columns = {**COLUMNS, **{name: name for name in terms}}
    rows = [
        {"step": entry["step"], **{column: entry.get(key) for column, key in columns.items()}}
        for entry in entries
    ]
    schema = pa.schema([*METRICS, *(pa.field(name, pa.float64()) for name in terms)])
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["step"]), schema=schema)


def used_up(history: list[dict[str, Any]], training: Training) -> str | None:
    """Say why a stage ends now, or None if it does not.

    Args:
        history: Entries of ``TrainerState.log_history``.
        training: Settings; ``training.end`` is the limit. ``sampled_mixed`` counts replaced groups too, where the
            trainer logs it.
    """
    end, entries = training.end, [entry for entry in history if "loss" in entry]
    if end is None or not entries or entries[-1]["step"] % training.iterations:
        return None
    shares = [
        entry.get("sampled_mixed", 1 - entry["frac_reward_zero_std"])
        for entry in entries
        if entry.get("frac_reward_zero_std") is not None
    ]
    step, last = entries[-1]["step"], shares[-end.window :]
    if step < end.min_steps or len(last) < end.window or sum(last) / end.window >= end.mixed_below:
        return None
    return (
        f"{100 * sum(last) / end.window:.0f} % of the groups of the last {end.window} batches had more than one "
        f"reward, fewer than training.end.mixed_below={end.mixed_below:g}"
    )


def reward_summary(table: pa.Table) -> dict[str, Any]:
    """Average the reward over the first and the last quarter of the stage; count the completions not gradable.

    ``reward_terms`` has the same two means of each term of weighted sums, if there are any. A quarter has at least one
    step; a mean is None if none of its steps has a graded completion.
    """
    rewards = table["reward"].to_pylist()
    quarter = max(1, len(rewards) // 4)

    def mean(values: list[float | None]) -> float | None:
        graded = [value for value in values if value is not None]
        return sum(graded) / len(graded) if graded else None

    terms = {
        name.removeprefix(TERM): [mean(values[:quarter]), mean(values[-quarter:])]
        for name in table.column_names
        if name.startswith(TERM)
        for values in (table[name].to_pylist(),)
    }
    return {
        "first_quarter_reward": mean(rewards[:quarter]),
        "last_quarter_reward": mean(rewards[-quarter:]),
        **({"reward_terms": terms} if terms else {}),
        "not_gradable": int(sum(v or 0 for v in table["not_gradable"].to_pylist())),
    }


def token_counts(table: pa.Table, completions: int, prompt_tokens: int) -> dict[str, int]:
    """Count the tokens that a stage generated, and those it trained on.

    Args:
        table: The stage's metrics.
        completions: Number of completions of one generation batch.
        prompt_tokens: Tokens of the prompts of all generation batches, counted once for each completion.

    Returns:
        ``tokens_generated``, and ``tokens_trained``: tokens of prompts and completions, counted once for each pass.
    """
    lengths = [value for value in table["completion_length"].to_pylist() if value is not None]
    generated = round(math.fsum(lengths) * completions)
    passes = table.num_rows / max(1, len(lengths))
    return {"tokens_generated": generated, "tokens_trained": round(passes * (generated + prompt_tokens))}
