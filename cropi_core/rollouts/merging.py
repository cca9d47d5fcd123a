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

    Args:
        stored: Rollouts of the whole pool.
        fresh: Rollouts of some of its prompts.
        out: Directory of the parts; existing ones are written again.
        sources: Source by prompt id.
        keep_stored: Whether stored completions keep their rewards.

    Returns:
        The summary of the merged rollouts; ``sampled_tokens`` is 0, because nothing was sampled for it, and
        ``not_gradable`` does not count completions that were set aside.

    Raises:
        DataError: Fresh prompts are missing in the stored rollouts, or both were sampled from other distributions.
    """
    new, old = read_rollouts(fresh), read_rollouts(stored)
    first, second = (sampling_of(table).model_copy(update={"samples": 1}) for table in (old, new))
    if first != second:
        raise DataError(
            f"{fresh} was sampled from another distribution ({second}) than {stored} ({first}). Sample both alike"
        )
    renewed = set(new["prompt_id"].to_pylist())
    if missing := sorted(renewed - set(old["prompt_id"].to_pylist())):
        raise DataError(f"{stored} lacks {len(missing)} prompts of {fresh}, such as {missing[0]!r}")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(new["prompt_id"].to_pylist()):
        rows.setdefault(name, []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    parts = sorted(stored.glob("part-*.parquet")) if stored.is_dir() else [stored]
    for index, part in enumerate(parts):
        table = read_part(part).replace_schema_metadata(None)
        names = list(dict.fromkeys(table["prompt_id"].to_pylist()))
        kept = table.filter(pa.array([name not in renewed for name in table["prompt_id"].to_pylist()]))
        if not keep_stored:
            place = kept.schema.get_field_index("reward")
            field = kept.schema.field(place)
            kept = kept.set_column(place, field, pa.nulls(kept.num_rows, field.type))
        taken = new.take(pa.array([row for name in names for row in rows.get(name, [])], pa.int64()))
        joined = join_rollouts([kept, taken.replace_schema_metadata(None)])
        places = {name: place for place, name in enumerate(names)}
        order = pa.array([places[name] for name in joined["prompt_id"].to_pylist()], pa.int64())
        keys = [("place", "ascending"), ("sample", "ascending")]
        joined = joined.append_column("place", order).sort_by(keys).drop_columns("place")
        metadata = {**(old.schema.metadata or {}), b"cropi.policy": SEVERAL}
        write_parquet(joined.replace_schema_metadata(metadata), part_path(out, index))
    summary = summarise_rollouts(read_rollouts(out), sources)
    summary |= {"sampled_tokens": 0, "prompts_sampled_again": len(renewed)}
    if keep_stored:
        return summary
    return summary | {
        "not_gradable": new["reward"].null_count,
        "prompts_set_aside": summary["prompts"] - len(renewed),
    }
