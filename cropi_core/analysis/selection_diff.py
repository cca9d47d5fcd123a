"""Compare two selections: common prompts, agreement of their rankings, prompts added and removed.

diff = selection_diff(Store(".cropi"), "selection-v1-…", "mine")        # keys, tags or RUN:slot
diff.jaccard, diff.spearman, diff.added[0].prompt_id
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import PROMPTS_FILE, SELECTION_FILE, Store, read_parquet
from cropi_core.errors import ArtifactError, SelectionError
from cropi_core.runs import resolve_key
from cropi_core.statistics import spearman
from data_schemas import Manifest

LEAST_SCORED = 3
"""Minimum number of prompts for a rank correlation."""


@dataclass(frozen=True)
class Moved:
    """A prompt that only one of the two selections contains.

    Attributes:
        prompt_id: Its id.
        source: Its source; None if no prompts table contains it.
        level: Its level, if it has one.
        before: Its rank in the first selection; None if it is not ranked or not in that pool.
        after: Its rank in the second selection.
    """

    prompt_id: str
    source: str | None
    level: str | None
    before: int | None
    after: int | None


@dataclass(frozen=True)
class SelectionDiff:
    """The comparison of two selections.

    Attributes:
        pools: Numbers of prompts in the two pools.
        common: Number of prompts in both pools.
        selected: Number of prompts in each selection.
        both: Number of prompts in both selections.
        jaccard: ``|A ∩ B| / |A ∪ B|``; None if both selections are empty.
        scored: Number of prompts with a score in both.
        spearman: Rank correlation of those scores; None with fewer than three, or if one selection's are all equal.
        added: Prompts only in the second selection, best rank first.
        removed: Prompts only in the first selection, best rank first.
    """

    pools: tuple[int, int]
    common: int
    selected: tuple[int, int]
    both: int
    jaccard: float | None
    scored: int
    spearman: float | None
    added: list[Moved]
    removed: list[Moved]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        fields = asdict(self)
        return fields | {"came": fields.pop("added"), "went": fields.pop("removed")}


def compare_selections(
    one: pa.Table, other: pa.Table, origins: Mapping[str, tuple[str, str | None]] | None = None
) -> SelectionDiff:
    """Compare two selection tables; prompts are matched by id, not by position.

    Args:
        one: The first table, with the schema `data_schemas.tables.SELECTION`.
        other: The second table.
        origins: Source and level by prompt id.

    Raises:
        SelectionError: The tables have no prompt in common, or one contains an id twice.
    """
    a, b = _rows_by_id(one, "the first"), _rows_by_id(other, "the second")
    common = a.keys() & b.keys()
    if not common:
        raise SelectionError(
            f"the two selections have no prompt in common (pools of {len(a)} and {len(b)}): they are of "
            "different pools, and nothing can be compared"
        )
    taken_a = {name for name, row in a.items() if row["selected"]}
    taken_b = {name for name, row in b.items() if row["selected"]}
    either = taken_a | taken_b
    scored = sorted(n for n in common if a[n]["score"] is not None and b[n]["score"] is not None)
    scores = [np.array([rows[name]["score"] for name in scored], dtype=np.float64) for rows in (a, b)]

    def moved(names: set[str], rows: dict[str, dict[str, Any]]) -> list[Moved]:
        ordered = sorted(names, key=lambda n: (rows[n]["rank"] is None, rows[n]["rank"], n))
        return [Moved(n, *(origins or {}).get(n, (None, None)), _rank(a, n), _rank(b, n)) for n in ordered]

    return SelectionDiff(
        pools=(len(a), len(b)),
        common=len(common),
        selected=(len(taken_a), len(taken_b)),
        both=len(taken_a & taken_b),
        jaccard=len(taken_a & taken_b) / len(either) if either else None,
        scored=len(scored),
        spearman=spearman(*scores) if len(scored) >= LEAST_SCORED else None,
        added=moved(taken_b - taken_a, b),
        removed=moved(taken_a - taken_b, a),
    )


def selection_diff(store: Store, one: str, other: str) -> SelectionDiff:
    """Compare two selections of a store.

    Args:
        store: Store that contains both.
        one: Key, prefix of a key, tag, or `RUN:slot`.
        other: The same for the second selection.

    Raises:
        ArtifactError: A name matches no artifact, or an artifact of another kind.
        SelectionError: The selections are of different pools.
    """
    manifests = [_selection(store, name) for name in (one, other)]
    tables = [read_parquet(store.directory(m.key) / SELECTION_FILE) for m in manifests]
    origins: dict[str, tuple[str, str | None]] = {}
    for manifest in manifests:
        prompts = manifest.inputs.get("prompts")
        # An imported selection names no pool, and a pool may have been collected: both can still be compared.
        if prompts is not None and store.has(prompts):
            table = read_parquet(store.directory(prompts) / PROMPTS_FILE)
            ids, sources, levels = (table[name].to_pylist() for name in ("prompt_id", "source", "level"))
            for prompt_id, source, level in zip(ids, sources, levels, strict=True):
                origins[prompt_id] = (source, level)
    return compare_selections(tables[0], tables[1], origins)


def _selection(store: Store, name: str) -> Manifest:
    manifest = store.manifest(resolve_key(store, name))
    if manifest.kind != "selection":
        raise ArtifactError(
            f"{name} is {manifest.key}, of kind {manifest.kind}; selections are what is compared: "
            "`cropi artifacts ls selection` lists them"
        )
    return manifest


def _rows_by_id(table: pa.Table, which: str) -> dict[str, dict[str, Any]]:
    rows = {
        row["prompt_id"]: row for row in table.select(["prompt_id", "selected", "rank", "score"]).to_pylist()
    }
    if len(rows) != table.num_rows:
        raise SelectionError(f"{table.num_rows - len(rows)} prompt ids of {which} selection occur twice")
    return rows


def _rank(rows: dict[str, dict[str, Any]], name: str) -> int | None:
    return rows[name]["rank"] if name in rows else None
