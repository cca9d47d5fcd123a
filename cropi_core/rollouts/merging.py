"""Rollouts of a pool in which some prompts were sampled again: fresh completions replace the stored ones.

Every completion keeps the log-probabilities of the policy that sampled it, which importance ratios read. Stored
completions say what an earlier policy could do. They may be set aside: they then have no reward, so that their prompts
have no gradient and no pass rate, and cannot be selected.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.errors import DataError
from cropi_core.rollouts.table import (
    join_rollouts,
    part_path,
    read_part,
    read_rollouts,
    sampling_of,
    summarise_rollouts,
)

SEVERAL = b"several"
"""Policy of rollouts that several policies sampled, in the metadata of their parts."""


def merge_rollouts(
    stored: Path, fresh: Path, out: Path, sources: dict[str, str], *, keep_stored: bool = True
) -> dict[str, Any]:
    """Write the stored rollouts part by part, with the completions of the fresh ones where there are any.

    Fresh completions of prompts that were never sampled form a last part.

    Args:
        stored: Rollouts of the pool, or of a share of it.
        fresh: Rollouts of some of its prompts.
        out: Directory of the parts; existing ones are written again.
        sources: Source by prompt id, of the whole pool in its order.
        keep_stored: Whether stored completions keep their rewards.

    Returns:
        The summary of the merged rollouts; ``sampled_tokens`` is 0, because nothing was sampled for it, and
        ``not_gradable`` does not count completions that were set aside.

    Raises:
        DataError: Fresh prompts are not in the pool, or both were sampled from other distributions.
    """
    new, old = read_rollouts(fresh), read_rollouts(stored)
    first, second = (sampling_of(table).model_copy(update={"samples": 1}) for table in (old, new))
    if first != second:
        raise DataError(
            f"{fresh} was sampled from another distribution ({second}) than {stored} ({first}). Sample both alike"
        )
    renewed = set(new["prompt_id"].to_pylist())
    if unknown := sorted(renewed - sources.keys()):
        raise DataError(f"the pool lacks {len(unknown)} prompts of {fresh}, such as {unknown[0]!r}")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(new["prompt_id"].to_pylist()):
        rows.setdefault(name, []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {**(old.schema.metadata or {}), b"cropi.policy": SEVERAL}
    parts = sorted(stored.glob("part-*.parquet")) if stored.is_dir() else [stored]
    for index, part in enumerate(parts):
        table = read_part(part).replace_schema_metadata(None)
        if not keep_stored:
            table = _without_rewards(table)
        joined = _renewed(table, new, rows)
        write_parquet(joined.replace_schema_metadata(metadata), part_path(out, index))
    known = set(old["prompt_id"].to_pylist())
    if added := [row for name in sources if name not in known for row in rows.get(name, [])]:
        write_parquet(new.take(pa.array(added)).replace_schema_metadata(metadata), part_path(out, len(parts)))
    summary = summarise_rollouts(read_rollouts(out), sources)
    summary |= {"sampled_tokens": 0, "prompts_sampled_again": len(renewed)}
    if keep_stored:
        return summary
    return summary | {
        "not_gradable": new["reward"].null_count,
        "prompts_set_aside": summary["prompts"] - len(renewed),
    }


def _without_rewards(table: pa.Table) -> pa.Table:
    """Return stored completions without rewards."""
    place = table.schema.get_field_index("reward")
    field = table.schema.field(place)
    return table.set_column(place, field, pa.nulls(table.num_rows, field.type))


def _renewed(table: pa.Table, new: pa.Table, rows: dict[str, list[int]]) -> pa.Table:
    """Replace the completions of a stored part by fresh ones where there are any, in the order of its prompts."""
    names = list(dict.fromkeys(table["prompt_id"].to_pylist()))
    kept = table.filter(pa.array([name not in rows for name in table["prompt_id"].to_pylist()]))
    taken = new.take(pa.array([row for name in names for row in rows.get(name, [])], pa.int64()))
    joined = join_rollouts([kept, taken.replace_schema_metadata(None)])
    places = {name: place for place, name in enumerate(names)}
    order = pa.array([places[name] for name in joined["prompt_id"].to_pylist()], pa.int64())
    keys = [("place", "ascending"), ("sample", "ascending")]
    return joined.append_column("place", order).sort_by(keys).drop_columns("place")
