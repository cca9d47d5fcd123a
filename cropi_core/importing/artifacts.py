"""Import of artifacts made by other programs into a store, and export of artifacts.

    ref = import_artifact(store, "rollouts", Path("mine.jsonl"), policy="unknown", sampling=Sampling(...))
    export_artifact(store, ref.key, Path("out"))

External input is not trusted: no pickle is read, no symbolic link followed, no code copied, and a table is accepted
only if every row satisfies its format.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
from pydantic import ValidationError

from cropi_core.artifacts import (
    CHECKPOINT,
    MANIFEST,
    PROMPTS_FILE,
    ROLLOUTS,
    SCORES_FILE,
    SELECTION_FILE,
    Store,
    file_sha256,
    opened,
    write_parquet,
)
from cropi_core.curriculum import publish_import
from cropi_core.errors import ArtifactError, ConfigError, DataError, PolicyError, foreign_errors, in_one_line
from cropi_core.importing.checks import Columns, check_rollouts, check_scores, check_selection, read_columns
from data_schemas import ArtifactRef, Kind, Sampling, TableSource

IMPORTABLE: tuple[Kind, ...] = ("prompts", "rollouts", "scores", "selection", "policy")
REFUSED = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".so", ".msgpack", ".h5")
"""Suffixes refused in a policy: files that are code, may contain pickles, or have formats that are not read."""

T = TypeVar("T")
POLICY_KEY, SAMPLING_KEY = b"cropi.policy", b"cropi.sampling"


def import_artifact(
    store: Store,
    kind: str,
    path: Path,
    *,
    source: TableSource | None = None,
    policy: str | None = None,
    sampling: Sampling | None = None,
) -> ArtifactRef:
    """Check the input at ``path`` and publish it; equal content gives the same artifact.

    Args:
        store: Target store.
        kind: ``prompts``, ``rollouts``, ``scores``, ``selection`` or ``policy``.
        path: A Parquet or JSONL file, for rollouts also a directory of parts, for a policy its directory.
        source: How to read prompts that are not in the prompts format.
        policy: Rollouts only: digest of the policy they were sampled from, or ``unknown``; for files that do not state
            it.
        sampling: Rollouts only: the sampling settings, for files that do not state them.

    Raises:
        ConfigError: The kind cannot be imported, the path does not exist, or an option is missing or contradicts the
            file.
        DataError: The table is invalid; all faults are reported together.
        PolicyError: The directory is not a checkpoint that can be trusted.
    """
    path = path.expanduser()
    if kind not in IMPORTABLE:
        raise ConfigError(f"kind {kind!r} cannot be imported, only {', '.join(IMPORTABLE)}")
    if (policy is not None or sampling is not None) and kind != "rollouts":
        raise ConfigError(f"policy and sampling describe rollouts, not {kind}")
    if source is not None and kind != "prompts":
        raise ConfigError(f"columns and the like describe prompts, not {kind}")
    if not path.exists() and not (kind == "prompts" and any(sign in str(path) for sign in "*?[")):
        raise ConfigError(f"{path} does not exist; relative paths are taken from {Path.cwd()}")
    if path.is_symlink():
        raise DataError(f"{path} is a symbolic link; give the file itself")
    if kind == "policy":
        return _import_policy(store, path)
    if kind == "prompts":
        return _import_prompts(
            store, source or TableSource.model_validate({"kind": "file", "path": str(path)}), path
        )
    if kind == "rollouts":
        return _import_rollouts(store, path, policy, sampling)
    if kind == "scores":
        return _import_scores(store, path)
    return _import_selection(store, path)


def _import_prompts(store: Store, source: TableSource, path: Path) -> ArtifactRef:
    from cropi_core.prompts import load_source, summarise, write_prompts

    table, dropped = load_source(source, "pool", str(path))
    summary = summarise(table) | {"dropped": dropped}
    return publish_import(store, "prompts", {}, summary, lambda out: write_prompts(table, out / PROMPTS_FILE))


def _import_rollouts(store: Store, path: Path, policy: str | None, sampling: Sampling | None) -> ArtifactRef:
    columns, metadata = _read_parts(path)
    policy = _agreed("policy", policy, metadata.get(POLICY_KEY, b"").decode() or None, path)
    try:
        raw = metadata.get(SAMPLING_KEY)
        stated = Sampling.model_validate_json(raw) if raw else None
    except ValidationError as error:
        raise DataError(f"{path}: metadata cropi.sampling is not valid: {in_one_line(error)}") from error
    sampling = _agreed("sampling", sampling, stated, path)
    table = check_rollouts(columns, str(path), sampling.max_new_tokens)
    table = table.replace_schema_metadata(
        {POLICY_KEY: policy.encode(), SAMPLING_KEY: sampling.model_dump_json().encode()}
    )
    from cropi_core.rollouts import summarise_rollouts  # late: imports torch, which delays errors

    def fill(out: Path) -> None:
        (out / ROLLOUTS).mkdir()
        write_parquet(table, out / ROLLOUTS / "part-00000.parquet")

    return publish_import(store, "rollouts", {}, summarise_rollouts(table, {}) | {"policy": policy}, fill)


def _agreed(name: str, given: T | None, stated: T | None, path: Path) -> T:
    """Return the value stated by the file or given by the caller; if both exist they must be equal."""
    if given is None and stated is None:
        raise ConfigError(
            f"{path} does not state its {name} (Parquet metadata cropi.{name}); give the option {name}: "
            "importance ratios are computed against exactly that distribution"
        )
    if given is not None and stated is not None and given != stated:
        raise ConfigError(f"{path} states {name} {stated}, {given} was given; remove the option")
    return cast(T, stated if given is None else given)


def _read_parts(path: Path) -> tuple[Columns, dict[bytes, bytes]]:
    """Read one file, or a directory of parts with the same metadata."""
    if not path.is_dir():
        return read_columns(path)
    files = sorted(path.glob("part-*.parquet"))
    if not files:
        raise DataError(f"{path} has no part-*.parquet; a file or a directory of such parts is wanted")
    if links := [p.name for p in files if p.is_symlink()]:
        raise DataError(f"{path}: {', '.join(links)} are symbolic links; give the files themselves")
    parts = [read_columns(file) for file in files]
    for name in (POLICY_KEY, SAMPLING_KEY):
        if len({metadata.get(name) for _, metadata in parts}) > 1:
            raise DataError(f"the parts of {path} differ in {name.decode()}; import them apart")
    names = list(parts[0][0])
    if any(list(columns) != names for columns, _ in parts):
        raise DataError(f"the parts of {path} differ in their columns")
    with foreign_errors(f"the parts of {path} differ in their types"):
        merged = {n: pa.chunked_array([c for columns, _ in parts for c in columns[n].chunks]) for n in names}
    return merged, parts[0][1]


def _import_scores(store: Store, path: Path) -> ArtifactRef:
    columns, metadata = read_columns(path)
    table = check_scores(columns, str(path))
    # keep the metadata on how scores were made; a selection reads from it which sets voted
    kept = {key: value for key, value in metadata.items() if key == b"cropi.scores"}
    scored = table.num_rows - table["score"].null_count
    summary = {"prompts": table.num_rows, "scored": scored}
    return publish_import(
        store, "scores", {}, summary, _writer(table.replace_schema_metadata(kept), SCORES_FILE)
    )


def _import_selection(store: Store, path: Path) -> ArtifactRef:
    columns, _ = read_columns(path)
    table = check_selection(columns, str(path))
    summary = {
        "prompts": table.num_rows,
        "selected": sum(table["selected"].to_pylist()),
        "strategy": "imported",
    }
    return publish_import(store, "selection", {}, summary, _writer(table, SELECTION_FILE))


def _writer(table: pa.Table, name: str) -> Callable[[Path], None]:
    return lambda out: write_parquet(table, out / name)


def _import_policy(store: Store, path: Path) -> ArtifactRef:
    if not path.is_dir():
        raise PolicyError(f"{path} is not a directory; a policy is a Hugging Face checkpoint directory")
    files = sorted(path.rglob("*"))
    links = [str(p.relative_to(path)) for p in files if p.is_symlink()]
    refused = [str(p.relative_to(path)) for p in files if p.suffix.lower() in REFUSED]
    faults = [f"symbolic links: {', '.join(links[:5])} (`cp -rL` makes files of them)"] if links else []
    if refused:
        faults.append(
            f"code or formats that can hold code: {', '.join(refused[:5])} (only *.safetensors is read)"
        )
    if faults:
        raise PolicyError(f"{path} is not imported: " + "; ".join(faults))
    from cropi_core.policy import copy_checkpoint

    summary: dict[str, Any] = {}

    def fill(out: Path) -> None:
        summary.update(copy_checkpoint(path, out / CHECKPOINT))

    return publish_import(store, "policy", {}, summary, fill)


def export_artifact(store: Store, key: str, out: Path) -> list[Path]:
    """Verify an artifact's files and copy them with its manifest to ``out``.

    Raises:
        ArtifactError: It is missing or damaged.
        ConfigError: ``out`` exists and is not an empty directory.
    """
    directory = store.directory(key)
    if faults := store.faults(key):
        raise ArtifactError(f"{key} is not exported, it is damaged: " + "; ".join(faults[:5]))
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; nothing is overwritten")
    sums = {entry.path: entry.sha256 for entry in store.manifest(key).files}
    for name in (*sums, MANIFEST):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened(directory, name) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
        if name in sums and file_sha256(target) != sums[name]:
            raise ArtifactError(f"{directory / name} changed while {key} was exported; {out} is not whole")
    return [out / name for name in (*sums, MANIFEST)]
