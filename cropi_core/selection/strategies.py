"""Choose the subset of the pool that a stage trains on, with a reason for every prompt.

    summary = select(
        prompts=Path("prompts.parquet"), scores=Path("scores.parquet"), rollouts=None,
        out=Path("selection.parquet"), settings=Selection(strategy="influence", ratio=0.1), seed=0,
    )

A strategy gives every prompt a value; the best ``ratio`` of the pool is selected. Prompts without a value (dead
prompts) are never selected, but count as part of the pool: a tenth is a tenth of the collected prompts.

References:
    CROPI, arXiv 2510.26491: selection of the top α by influence, and its baselines.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.errors import ConfigError, SelectionError
from cropi_core.scores import order, tie_keys
from cropi_core.selection.belief import read_belief
from cropi_core.selection.evidence import TOO_FEW, Evidence, gather, read_columns, with_expected_rates
from cropi_core.selection.shares import share_sizes, take
from cropi_core.selection.texts import similarity_to_targets
from cropi_core.statistics import pass_rate_counts
from data_schemas import SELECTION, Selection


def select(
    *,
    out: Path,
    prompts: Path | None = None,
    scores: Path | None = None,
    rollouts: Path | None = None,
    settings: Selection = Selection(),
    seed: int = 0,
    fallback: Mapping[str, Any] | None = None,
    belief: Path | None = None,
    targets: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Write the selection table of a pool.

    Args:
        out: Parquet file to write; it is published in one step.
        prompts: Parquet file of the pool; None takes the ids of ``scores``.
        scores: Scores table; ``influence`` and ``grad_norm`` need it.
        rollouts: Directory of ``part-*.parquet``, or one file; ``learnability`` and ``pass_rate`` need it or
            scores.
        settings: Strategy and ratio.
        seed: Seed of the random draw and of the order among equal values.
        fallback: Why a draw is random: ``strategy``, which it replaces, and ``limits``, the rules of
            ``diagnostics`` that its scores violate. Included in every reason and in the summary.
        belief: Belief table of the stage before; its pass rates replace those of the rollouts.
        targets: Prompts tables of the validation sets, by name; ``text_similarity`` needs them.

    Returns:
        A summary in JSON types; ``short_by`` is the number of prompts missing because too few are eligible, ``shares``
        the number of prompts that `selection.shares` asks for, by source.

    Raises:
        ConfigError: The strategy is unknown, or an input that it needs is missing.
        DataError: A table does not have the columns of its format.
        SelectionError: Scores or rollouts belong to other prompts than the pool, or no prompt is eligible, or the pool
            has no prompt of a source in `selection.shares`.
    """
    check_inputs(settings.strategy, scores, rollouts, prompts if targets else None)
    if settings.strategy != "random":  # a rerun may replace the random strategy
        fallback = None
    pool = _pool(prompts, scores)
    evidence = gather(pool.column("prompt_id").to_pylist(), scores, rollouts)
    if belief is not None:
        evidence = with_expected_rates(evidence, read_belief(belief))
    keys = tie_keys(evidence.prompt_ids, seed)
    if settings.reads_targets and prompts is not None:
        evidence = replace(evidence, similarity=similarity_to_targets(prompts, targets or {}))
    values = worth(evidence, settings)
    best = positions(evidence, values, settings, keys)
    if not len(best):
        raise SelectionError(
            f"no prompt of {prompts or scores} can be selected by {settings.strategy} ({_counted(evidence.status)}). "
            "Collect more samples a prompt, raise the temperature, or choose another pool"
        )
    n = len(keys)
    size = subset_size(settings.ratio, n) if settings.strategy != "full" else n
    chosen = take(best, pool.column("source").to_pylist(), size, settings.shares)
    selected, rank = _marked(best, chosen, n)
    explanations = reasons(evidence, settings, rank, selected, fallback)
    write_parquet(_table(evidence, values, rank, selected, explanations), out)
    return {
        "strategy": settings.strategy,
        **({"fallback": dict(fallback)} if fallback else {}),
        "ratio": settings.ratio,
        "pool": n,
        "eligible": len(best),
        "selected": int(selected.sum()),
        "short_by": size - int(selected.sum()),
        **({"shares": share_sizes(settings.shares, size)} if settings.shares else {}),
        **_counts(evidence, pool, selected),
    }


def _marked(best: np.ndarray, chosen: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mark the chosen positions; return ``(n,)`` selected, and ranks from 1 of the eligible ones, 0 for the rest."""
    selected, rank = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int32)
    selected[chosen] = True
    rank[best] = np.arange(1, len(best) + 1)
    return selected, rank


def _counts(evidence: Evidence, pool: pa.Table, selected: np.ndarray) -> dict[str, Any]:
    """Count statuses, sources, levels and pass rates in the pool and in the subset."""
    return {
        "status": dict(sorted(Counter(evidence.status).items())),
        "sources": _group_counts(pool.column("source").to_pylist(), selected),
        "levels": _group_counts([x or "none" for x in pool.column("level").to_pylist()], selected),
        "pass_rate": _histogram(evidence.pass_rate, selected),
    }


def _table(
    evidence: Evidence, values: np.ndarray, rank: np.ndarray, selected: np.ndarray, explanations: list[str]
) -> pa.Table:
    """Build the selection table; a prompt that is not eligible has no rank."""
    columns = [
        pa.array(evidence.prompt_ids, pa.string()),
        pa.array(selected),
        pa.array(rank, mask=rank == 0),
        pa.array(values, mask=np.isnan(values)),
        pa.array(evidence.status, pa.string()),
        pa.array(explanations, pa.string()),
    ]
    return pa.table(columns, schema=SELECTION)


def check_inputs(
    strategy: str, scores: Path | None, rollouts: Path | None, prompts_with_targets: Path | None = None
) -> None:
    """Check that the inputs of a strategy are given.

    Raises:
        ConfigError: The strategy needs a scores table, or one of scores and rollouts, or prompts of the pool and of
            validation sets.
    """
    if strategy == "auto":
        raise ConfigError(
            "selection.strategy=auto follows the verdict of a run's stage (`cropi run`); a single selection needs "
            "influence, pass_rate or random"
        )
    if strategy == "text_similarity" and prompts_with_targets is None:
        raise ConfigError(
            "selection.strategy=text_similarity compares the texts of the pool with those of the validation sets, and "
            "a prompts table of one of them was not given"
        )
    if strategy in ("influence", "grad_norm") and scores is None:
        raise ConfigError(f"selection.strategy={strategy} needs a scores table, and none was given")
    if strategy in ("learnability", "pass_rate") and scores is None and rollouts is None:
        raise ConfigError(
            f"selection.strategy={strategy} needs rollouts or a scores table, and neither was given"
        )


def subset_size(ratio: float, pool: int) -> int:
    """Return the number of prompts in a ratio of the pool: rounded half up, at least 1.

    The arithmetic is decimal: 0.29 · 50 is 14.5, and 14.499… in floating point.
    """
    return max(1, math.floor(Fraction(str(ratio)) * pool + Fraction(1, 2)))


def worth(evidence: Evidence, settings: Selection) -> np.ndarray:
    """Value every prompt under a strategy, ``(n,)`` float32; NaN for a prompt without a value.

    * ``influence``: the fused score.
    * ``grad_norm``: ‖∇J‖ of prompts with a gradient.
    * ``learnability``: p(1 − p), the variance of a reward of 0 or 1, and an upper bound with partial credit;
      no value where it is zero.
    * ``pass_rate``: −|p − target|.
    * ``text_similarity``: the similarity of the text to the most alike validation prompts.
    * ``random``, ``full``: no values; their order needs none.

    Raises:
        ConfigError: The strategy is unknown.
        SelectionError: ``learnability`` or ``pass_rate`` with rewards outside [0, 1].
    """
    p = evidence.pass_rate
    status = np.array(evidence.status)
    pass_rate = np.where(status == TOO_FEW, np.nan, p)
    if settings.strategy in ("learnability", "pass_rate") and ((p < 0) | (p > 1)).any():
        raise SelectionError(
            f"selection.strategy={settings.strategy} needs rewards between 0 and 1; the mean rewards range from "
            f"{np.nanmin(p):.3g} to {np.nanmax(p):.3g}"
        )
    if settings.strategy == "influence":
        values = np.where(np.isnan(evidence.rank), np.nan, evidence.score)
    elif settings.strategy == "grad_norm":
        values = np.where(status == "ok", evidence.grad_norm, np.nan)
    elif settings.strategy == "learnability":
        values = np.where(pass_rate * (1 - pass_rate) > 0, pass_rate * (1 - pass_rate), np.nan)
    elif settings.strategy == "pass_rate":
        values = -np.abs(pass_rate - settings.pass_rate_target)
    elif settings.strategy == "text_similarity":
        values = evidence.similarity
    elif settings.strategy in ("random", "full"):
        values = np.full(len(evidence.prompt_ids), np.nan)
    else:
        raise ConfigError(f"selection.strategy={settings.strategy!r} is unknown")
    # Ranked as stored: 0.3 and 0.7 are equally far from 0.5 only after rounding.
    return values.astype(np.float32)


def positions(evidence: Evidence, values: np.ndarray, settings: Selection, keys: np.ndarray) -> np.ndarray:
    """Return the positions of the eligible prompts, best first, equal ones in seeded order.

    ``influence`` follows the rank of the scores table, ``full`` the order of the pool.
    """
    if settings.strategy == "random":
        return np.argsort(keys, kind="stable")
    if settings.strategy == "full":
        return np.arange(len(keys))
    eligible = np.flatnonzero(~np.isnan(values))
    if settings.strategy == "influence":
        values = -evidence.rank
    return eligible[order(values[eligible], keys[eligible])]


def reasons(
    evidence: Evidence,
    settings: Selection,
    rank: np.ndarray,
    selected: np.ndarray,
    fallback: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the reason for every prompt's rank, as a fragment of a sentence."""
    values, p = worth(evidence, settings), evidence.pass_rate
    reason = f" instead of {fallback['strategy']}: {', '.join(fallback['limits'])}" if fallback else ""
    explanations = []
    for i, status in enumerate(evidence.status):
        if settings.strategy == "full":
            explanations.append("the whole pool")
        elif settings.strategy == "random":
            explanations.append(f"{'random draw' if selected[i] else 'not drawn'}{reason}")
        elif not rank[i]:
            explanations.append(
                f"dead: {status}" if status != "ok" else f"nothing to learn: pass rate {p[i]:.3f}"
            )
        elif settings.strategy == "influence":
            inferred = "" if status == "ok" else f"no gradient ({status}), scored like its neighbours; "
            explanations.append(inferred + evidence.votes[i])
        elif settings.strategy == "grad_norm":
            explanations.append(f"gradient norm {values[i]:.3g}")
        elif settings.strategy == "learnability":
            explanations.append(f"pass rate {p[i]:.3f}, p(1-p) {values[i]:.3f}")
        elif settings.strategy == "text_similarity":
            explanations.append(f"similarity {values[i]:.3f} to the most alike validation prompts")
        else:
            explanations.append(f"pass rate {p[i]:.3f}, {-values[i]:.3f} from {settings.pass_rate_target:g}")
    return explanations


def _pool(prompts: Path | None, scores: Path | None) -> pa.Table:
    """Read the pool from a prompts table, or at least the ids that were scored."""
    if prompts is not None:
        return read_columns(prompts, ["prompt_id", "source", "level"])
    if scores is None:
        raise ConfigError(
            "a selection needs a prompts table or a scores table to define the pool, and neither was given"
        )
    ids = read_columns(scores, ["prompt_id"])
    nulls = pa.nulls(len(ids), pa.string())
    return ids.append_column("source", nulls.fill_null("unknown")).append_column("level", nulls)


def _counted(status: list[str]) -> str:
    """Format the counts by status."""
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(status).items()))


def _group_counts(groups: list[str], selected: np.ndarray) -> dict[str, dict[str, int]]:
    """Count the prompts of each group in the pool and in the subset."""
    taken = Counter(group for group, chosen in zip(groups, selected, strict=True) if chosen)
    return {name: {"pool": n, "selected": taken[name]} for name, n in sorted(Counter(groups).items())}


def _histogram(p: np.ndarray, selected: np.ndarray) -> dict[str, list] | None:
    """Count pass rates in ten bins, in the pool and in the subset; None if no pass rate is known."""
    if np.isnan(p).all():
        return None
    finite = ~np.isnan(p)
    return {
        "edges": [i / 10 for i in range(11)],
        "pool": pass_rate_counts(p[finite]),
        "selected": pass_rate_counts(p[finite & selected]),
    }
