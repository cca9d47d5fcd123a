"""Export the prompts of a selection, or of a whole set, in another trainer's format, and import such a file again.

    export_prompts(store, "demo-1a2b3c4d:selection@1", Path("chosen"), "verl")

The prompts are in the order of their rank. Formats are in :mod:`cropi_core.prompts.formats`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import (
    PROMPTS_FILE,
    ROLLOUTS,
    SCORES_FILE,
    SELECTION_FILE,
    Store,
    floats,
    read_parquet,
)
from cropi_core.curriculum import publish_import
from cropi_core.errors import ArtifactError, ConfigError, DataError
from cropi_core.exporting.card import selection_card
from cropi_core.prompts import read_format, read_prompts, summarise, write_format, write_prompts
from cropi_core.runs import resolve_key
from cropi_core.selection import ranked_prompts, reward_sums
from data_schemas import PROMPTS, ArtifactRef, Manifest, PromptFormat

CARD = "README.md"
Row = dict[str, Any]


def export_prompts(
    store: Store, name: str, out: Path, layout: PromptFormat, *, prompts: str | None = None
) -> list[Path]:
    """Write the selected prompts in a format; a set of prompts is written whole.

    Args:
        store: Store of the artifacts.
        name: Key, tag or ``RUN:slot`` of a selection or a set of prompts.
        out: Directory to create.
        layout: The format; ``hf`` also gets a card.
        prompts: Key, tag or ``RUN:slot`` of the pool; only for a selection that was imported, which does not name it.

    Raises:
        ArtifactError: An artifact is missing or damaged.
        ConfigError: The artifact is of another kind, ``prompts`` is missing or not wanted, or ``out`` is not empty.
        DataError: The selection names prompts that the pool does not have.
        SelectionError: It selects none.
    """
    manifest = store.manifest(sound(store, resolve_key(store, name)))
    if manifest.kind not in ("selection", "prompts"):
        raise ConfigError(
            f"{manifest.key} is of kind {manifest.kind}; only a selection or a set of prompts has a format"
        )
    pool = _pool(store, manifest, prompts)
    rows = selected_prompts(store, manifest, pool)
    files = write_format(rows, out, layout)
    if layout == "hf":
        card = out.expanduser() / CARD
        card.write_text(selection_card(store, manifest, pool, rows), encoding="utf-8")
        files = sorted([*files, card])
    return files


def selected_prompts(store: Store, manifest: Manifest, pool: Manifest) -> list[Row]:
    """Read the selected prompts of a selection in the order of their rank, with rank, score and pass rate.

    Args:
        store: Store of the artifacts.
        manifest: The selection; of a set of prompts all rows are returned unchanged.
        pool: The set that it selects from.
    """
    prompts = store.directory(pool.key) / PROMPTS_FILE
    if manifest.kind == "prompts":
        return read_prompts(prompts).to_pylist()
    rows = ranked_prompts(prompts, store.directory(manifest.key) / SELECTION_FILE)
    rates = _pass_rates(store, manifest, [row["prompt_id"] for row in rows])
    return [
        row | {"pass_rate": None if np.isnan(rate) else float(rate)}
        for row, rate in zip(rows, rates, strict=True)
    ]


def sound(store: Store, key: str) -> str:
    """Return the key of an artifact whose files are unchanged."""
    if faults := store.faults(key):
        raise ArtifactError(f"{key} is not exported, it is damaged: " + "; ".join(faults[:5]))
    return key


def _pool(store: Store, manifest: Manifest, prompts: str | None) -> Manifest:
    """Find the set that a selection selects from."""
    if manifest.kind == "prompts":
        if prompts is not None:
            raise ConfigError(f"{manifest.key} is a set of prompts; remove --prompts")
        return manifest
    ref = manifest.inputs.get("prompts")
    if (ref is None) == (prompts is None):
        fault = (
            "does not name its pool; give --prompts" if ref is None else "names its pool; remove --prompts"
        )
        raise ConfigError(f"selection {manifest.key} {fault}")
    key = resolve_key(store, prompts) if prompts is not None else ref.key if ref else ""
    pool = store.manifest(sound(store, key))
    if pool.kind != "prompts":
        raise ConfigError(f"--prompts {prompts} is of kind {pool.kind}, not a set of prompts")
    return pool


def _pass_rates(store: Store, manifest: Manifest, ids: list[str]) -> np.ndarray:
    """Return ``(n,)`` mean rewards that the selection was made with; NaN where there is none."""
    rates = np.full(len(ids), np.nan)
    scores, rollouts = manifest.inputs.get("scores"), manifest.inputs.get("rollouts")
    if scores is not None and store.has(scores):
        table = read_parquet(store.directory(scores.key) / SCORES_FILE)
        if "mean_reward" in table.column_names:
            stored_rates = dict(
                zip(table["prompt_id"].to_pylist(), floats(table["mean_reward"]), strict=True)
            )
            rates = np.array([stored_rates.get(one, np.nan) for one in ids])
    elif rollouts is not None and store.has(rollouts):
        passed, graded = reward_sums(store.directory(rollouts.key) / ROLLOUTS, ids)
        rates[graded > 0] = passed[graded > 0] / graded[graded > 0]
    return rates


def import_exported(store: Store, path: Path, layout: PromptFormat) -> ArtifactRef:
    """Store prompts that were exported in a format; they have the ids and all fields that they were exported with.

    Raises:
        ConfigError: The path does not exist.
        DataError: The file has lost fields, or is a symbolic link.
    """
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{path} does not exist; relative paths are taken from {Path.cwd()}")
    if path.is_symlink():
        raise DataError(f"{path} is a symbolic link; give the file itself")
    table = pa.Table.from_pylist(read_format(path, layout), schema=PROMPTS)
    summary = summarise(table) | {"dropped": {}}
    return publish_import(store, "prompts", {}, summary, lambda out: write_prompts(table, out / PROMPTS_FILE))
