"""The layout of the gradient store on disk: arrays, codec, attributes, and checks of what is written and read."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import ZstdCodec

from cropi_core.errors import ArtifactError, DataError, foreign_errors
from cropi_core.gradients.reader import ABSENT, ShardLayout, content_size, widen
from data_schemas import STATUSES

log = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "cropi-gradients", 2
RESERVED = ("format", "format_version", "finished")
FLOATS = ("scale", "norm", "ess", "max_ratio", "clip_fraction", "kl", "kl_k1", "entropy", "mean_reward")
COLUMNS: dict[str, np.dtype] = {
    **{name: np.dtype(np.float32) for name in FLOATS},
    "status": np.dtype(np.uint8),
    "tokens": np.dtype(np.int32),
}
CHUNK_BYTES = 2 << 20
ROWS_FREE, ROWS_A_BYTE = 1 << 16, 16
"""Most rows of a store: the first number, plus the second for each byte of its compressed ids."""
MAGIC = bytes.fromhex("28b52ffd")
"""First bytes of a zstd frame."""
IDS_FREE, IDS_RATIO = 64 << 20, 256
"""Most bytes of the decompressed ids: the first number, plus the second for each byte of their file."""
# Normalised features are nearly incompressible: level 1 saves 8 % of live rows, and higher levels are not worth their
# time. The codec removes the zeros of rows without a gradient, and its checksum detects a flipped bit, which would be a
# wrong score otherwise. Figures: docs/reference/gradient-store.md.
CODEC = ZstdCodec(level=1, checksum=True)
ENCODER = Zstd(level=CODEC.level, checksum=CODEC.checksum)


def check_settings(
    prompt_ids: list[str], k: int, dtype: str, rows_per_shard: int, attributes: Mapping[str, Any]
) -> None:
    """Refuse invalid ids, shapes and attributes of a new store."""
    if not prompt_ids:
        raise DataError("a gradient store needs at least one prompt")
    if len(set(prompt_ids)) != len(prompt_ids):
        raise DataError(
            f"{len(prompt_ids) - len(set(prompt_ids))} ids occur twice, and rows are identified by id"
        )
    if dtype not in ("float16", "float32"):
        raise DataError(f"dtype={dtype!r} must be float16 or float32")
    if k < 1 or rows_per_shard < 1:
        raise DataError(f"k={k} and rows_per_shard={rows_per_shard} must be at least 1")
    if taken := [name for name in RESERVED if name in attributes]:
        raise DataError(f"the attributes {taken} are reserved; give them other names")


def canonical(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes as JSON reads them back, with sorted keys."""
    return json.loads(json.dumps(attributes, sort_keys=True, allow_nan=False))


def chunk_rows(rows_per_shard: int, k: int, itemsize: int) -> int:
    """Return the rows of an inner chunk: the largest divisor of a shard's rows within ``CHUNK_BYTES``, or 1."""
    fits = max(1, CHUNK_BYTES // (k * itemsize))
    return max(d for d in range(1, rows_per_shard + 1) if rows_per_shard % d == 0 and d <= fits)


def lay_out(
    path: Path, prompt_ids: list[str], k: int, dtype: str, rows_per_shard: int, attributes: Mapping[str, Any]
) -> None:
    """Create the group, its arrays and its attributes; only the prompt ids are written."""
    n = len(prompt_ids)
    state = {"format": FORMAT, "format_version": FORMAT_VERSION, "finished": False}
    group = zarr.create_group(path, zarr_format=3, attributes={**state, **canonical(attributes)})
    group.create_array(
        "features",
        shape=(n, k),
        dtype=dtype,
        chunks=(chunk_rows(rows_per_shard, k, np.dtype(dtype).itemsize), k),
        shards=(rows_per_shard, k),
        compressors=[CODEC],
        fill_value=0,
        dimension_names=("prompt", "feature"),
        config={"write_empty_chunks": False},  # a shard of prompts without a gradient has no file
    )
    # A column is one chunk that is always written: `open` detects a lost column by its missing file.
    for name, kind in COLUMNS.items():
        fill = float("nan") if kind == np.float32 else 0
        column(group, name, n, kind.name, fill)
    # Strings are zarr's `string` type with the vlen-utf8 codec, which is registered in zarr-extensions. zarr 3.1 warns
    # that the fixed-length types have no specification.
    column(group, "prompt_id", n, "string", "")[:] = np.array(prompt_ids, dtype=np.dtypes.StringDType())


def column(group: zarr.Group, name: str, n: int, dtype: str, fill: float | str) -> zarr.Array:
    """Create the array of one column: a single chunk, always written."""
    return group.create_array(
        name,
        shape=(n,),
        dtype=dtype,
        chunks=(n,),
        compressors=[CODEC],
        fill_value=fill,
        dimension_names=("prompt",),
        config={"write_empty_chunks": True},
    )


def restore_metadata(path: Path, fresh: Path, *, readable: bool) -> bool:
    """Replace files of an unfinished store that differ from those of a fresh one with the same settings.

    Args:
        path: The store.
        fresh: The new store that :func:`lay_out` has written; missing if it has become the store itself.
        readable: Replace all files that differ; the caller has checked that the settings are the same. Otherwise only
            metadata that is missing or not JSON.

    Returns:
        Whether a file was replaced.
    """
    restored = False
    for file in sorted(p for p in fresh.rglob("*") if p.is_file()):
        target = path / file.relative_to(fresh)
        kept = target.read_bytes() if target.is_file() else b""
        if kept == file.read_bytes() or not (readable or (file.suffix == ".json" and not _is_json(kept))):
            continue
        log.warning("%s was damaged before the gradients were finished, and is written again", target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        restored = True
    return restored


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def open_group(path: Path, mode: Any) -> zarr.Group:
    """Open a group and check its format and its arrays.

    Raises:
        ArtifactError: The group is not a gradient store, has another version, or is damaged.
    """
    if not (path / "zarr.json").is_file():
        raise ArtifactError(f"{path} is not a gradient store: it has no zarr.json")
    with foreign_errors(f"{path} cannot be opened as a Zarr group", ArtifactError, "Compute it again"):
        group = zarr.open_group(path, mode=mode, zarr_format=3)
    name, version = group.attrs.get("format"), group.attrs.get("format_version")
    if (name, version) != (FORMAT, FORMAT_VERSION):
        raise ArtifactError(
            f"{path} has format {name} version {version}; this program reads {FORMAT} version {FORMAT_VERSION}. "
            "Compute the gradients again"
        )
    arrays = ("features", "prompt_id", *COLUMNS)
    if missing := [name for name in arrays if not (path / name / "zarr.json").is_file()]:
        raise ArtifactError(f"{path} is damaged: it lacks the arrays {missing}. Compute the gradients again")
    with foreign_errors(f"{path} has damaged metadata of an array", ArtifactError, "Compute it again"):
        check_declared(path, group)
    return group


def check_declared(path: Path, group: zarr.Group) -> None:
    """Compare the declared shapes of a group with each other and with its files, before memory is allocated.

    A column is one chunk of ``n`` values, so its file states its decompressed size. Ids are all different, so ``n`` ids
    take some bytes even when compressed.

    Raises:
        ArtifactError: The shapes contradict each other, or the files are too small for them.
    """
    features: Any = group["features"]
    if (
        len(features.shape) != 2
        or features.shards is None
        or str(features.dtype) not in ("float16", "float32")
    ):
        raise ArtifactError(
            f"{path} was not written by cropi: its features are not sharded rows of float16 or float32"
        )
    (n, k), shards, chunks = features.shape, features.shards, features.chunks
    if min(n, k, *shards, *chunks) < 1 or shards[1] != k or chunks[1] != k or shards[0] % chunks[0]:
        raise ArtifactError(
            f"{path} is damaged: features of shape {(n, k)} cannot have shards of {shards} and chunks of {chunks}"
        )
    for name, kind in {**COLUMNS, "prompt_id": None}.items():
        _check_column(path, name, group[name], n, kind)


def _check_column(path: Path, name: str, array: Any, n: int, kind: np.dtype | None) -> None:
    """Compare one column with the number of rows and with its file; ``kind`` is None for the ids.

    Raises:
        ArtifactError: See :func:`check_declared`.
    """
    if array.shape != (n,) or array.chunks != (n,) or (kind is not None and array.dtype != kind):
        raise ArtifactError(
            f"{path} is damaged: {name} is {array.dtype} of shape {array.shape} in chunks of {array.chunks}, and "
            f"features have {n} rows. Compute the gradients again"
        )
    file = path / name / "c" / "0"
    if not file.is_file():
        return  # an unfinished store; GradientStore.open() requires the file
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(18)
    declared = content_size(head)
    if size >= len(head) and (not head.startswith(MAGIC) or (declared is None and len(head) == 18)):
        raise ArtifactError(
            f"{path} is damaged: {name} is not one zstd frame that states its size. Compute the gradients again"
        )
    if kind is None:
        fits = declared is None or 4 * n + 4 <= declared <= IDS_FREE + IDS_RATIO * size
        fits = fits and n <= ROWS_FREE + ROWS_A_BYTE * size
    else:
        fits = declared is None or declared == n * kind.itemsize
    if not fits:
        raise ArtifactError(
            f"{path} is damaged: {name} declares {n:,} rows, and its file of {size:,} bytes holds {declared} bytes"
        )


def checked_columns(rows: range, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Check a shard's columns and add the omitted ones; the store itself sets ``scale``."""
    if unknown := sorted(set(columns) - (set(COLUMNS) - {"scale"})):
        raise DataError(f"the columns {unknown} are unknown; a shard has {sorted(set(COLUMNS) - {'scale'})}")
    if "status" not in columns:
        raise DataError("a shard needs the column status")
    checked = {}
    for name, kind in COLUMNS.items():
        default = np.nan if kind == np.float32 else 0
        values = np.asarray(columns.get(name, np.full(len(rows), default)))
        if values.shape != (len(rows),):
            raise DataError(f"column {name} has shape {values.shape}, and the shard has {len(rows)} rows")
        checked[name] = values.astype(kind)
    if (checked["status"] >= len(STATUSES)).any():
        raise DataError(f"status {checked['status'].max()} is unknown; valid are {dict(enumerate(STATUSES))}")
    return checked


def pack(features: np.ndarray, ok: np.ndarray, dtype: str, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Convert features to the form in which they are stored.

    float16 spans 6e-8 to 65504. The coordinates of a gradient of norm 1e-3 are at the lower end of this range, and a
    plain cast would lose most of their precision. Divided by the norm first, they keep 11 bits at any norm.

    Args:
        features: ``(m, k)`` float32.
        ok: ``(m,)`` bool; other rows become zeros.
        dtype: ``float16`` or ``float32``.
        first: Number of the first row, for error messages.

    Returns:
        The rows ``(m, k)``, and ``scale`` ``(m,)`` float32, features = rows · scale; 0 for a row of zeros.

    Raises:
        DataError: A row with status ``ok`` is not finite.
    """
    if not ok.all():
        features = np.where(ok[:, None], features, 0)
    features = features.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.square(features, dtype=np.float64).sum(axis=1)).astype(np.float32)
    if not np.isfinite(norms).all():
        bad = first + int(np.flatnonzero(~np.isfinite(norms))[0])
        raise DataError(
            f"row {bad} has status ok and a feature that is not finite; its status must be not_finite"
        )
    if dtype == "float32":
        return features, (norms > 0).astype(np.float32)
    divisor = np.where(norms > 0, norms, np.float32(1))
    return (features / divisor[:, None]).astype(np.float16), norms


def write_rows(file: Path, stored: np.ndarray, layout: ShardLayout) -> None:
    """Write a shard, byte for byte as zarr would, without zarr's overhead (docs/reference/gradient-store.md).

    The file is renamed into place when it is complete. A shard of zeros has no file.

    Args:
        file: The shard.
        stored: ``(m, k)``; the missing rows of the last shard are zeros.
        layout: Layout of the array.
    """
    index = np.full((layout.chunks, 2), ABSENT, dtype="<u8")
    frames: list[bytes] = []
    for chunk in range(-(-len(stored) // layout.chunk_rows)):
        part = stored[chunk * layout.chunk_rows : (chunk + 1) * layout.chunk_rows]
        if not part.view(np.uint8).any():  # bits, not values: as in zarr, -0.0 is stored
            continue
        if len(part) < layout.chunk_rows:
            part = np.concatenate(
                [part, np.zeros((layout.chunk_rows - len(part), part.shape[1]), part.dtype)]
            )
        frame = ENCODER.encode(np.ascontiguousarray(part))
        index[chunk] = sum(map(len, frames)), len(frame)
        frames.append(frame)
    if not frames:
        file.unlink(missing_ok=True)
        return
    table = index.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")  # finish() removes what a kill leaves
    with temporary.open("wb") as stream:
        stream.writelines([*frames, table, google_crc32c.value(table).to_bytes(4, "little")])
    temporary.replace(file)


def unpack(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the features that :func:`pack` stored: ``(m, k)`` float32.

    Args:
        stored: ``(m, k)`` of either type; float32 is returned unchanged.
        scale: ``(m,)`` float32.
    """
    if stored.dtype == np.float32:
        return stored
    features = np.empty(stored.shape, dtype=np.float32)
    widen(stored, features)
    return np.multiply(features, scale[:, None], out=features)


def sync(path: Path) -> None:
    """Force a file to disk before its marker is written; a shard of zeros has no file."""
    if path.exists():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
