"""The gradient store: one Zarr v3 group of features and per-prompt statistics, written shard by shard.

    store = GradientStore.create(path, ids, k=8192, dtype="float16", rows_per_shard=128, attributes={...})
    for shard in range(store.shards):            # any order, any number of processes, one writer a shard
        if not store.done(shard):
            store.write_shard(shard, features, {"status": status, "norm": norm, ...})
    store.finish()
    store = GradientStore.open(path)             # read-only; an unfinished or damaged store is an error
    for rows, features in store.blocks():        # float32, bounded memory, read ahead in threads
        ...
    for rows, result in store.map_blocks(f):     # f(stored, scale) runs in the threads that read
        ...

A Zarr shard is ``rows_per_shard`` rows in one file. It is complete when its marker ``.done/<shard>.npz`` exists, which
holds the shard's columns and is renamed into place after the features are on disk. ``finish`` gathers the columns into
one array each and removes the markers, so a finished directory depends on its content alone, and not on the order of
the shards, the number of writers or interruptions.
"""

import fcntl
import logging
import os
import shutil
import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import zarr

from cropi_core.artifacts import file_crc32c
from cropi_core.errors import ArtifactError, DataError, foreign_errors
from cropi_core.gradients.layout import (
    COLUMNS,
    RESERVED,
    canonical,
    check_settings,
    checked_columns,
    lay_out,
    open_group,
    pack,
    restore_metadata,
    sync,
    unpack,
    write_rows,
)
from cropi_core.gradients.reader import direct_layout, in_order, read_rows, threads_here

Result = TypeVar("Result")
BLOCK_BYTES = 64 << 20
CHECKSUM = "crc32c"
"""Entry of a marker: the checksum of its shard's file."""

log = logging.getLogger(__name__)


class GradientStore:
    """Features ``(n, k)`` and per-prompt columns ``(n,)``, in the order of ``prompt_ids``."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        with foreign_errors(f"{path} cannot be opened as a Zarr group", ArtifactError, "Compute it again"):
            self._features = cast(zarr.Array, group["features"])
        self.n, self.k = (int(size) for size in self._features.shape)
        shards = self._features.shards
        if shards is None:
            raise ArtifactError(f"{path} was not written by cropi: its features are not sharded")
        self.rows_per_shard = int(shards[0])
        self.shards = -(-self.n // self.rows_per_shard)
        self._columns: dict[str, np.ndarray] = {}
        self._layout = direct_layout(self._features)
        self._dtype = str(self._features.dtype)  # zarr derives it at every access, 0.2 ms of a shard's 3

    @classmethod
    def create(
        cls,
        path: Path | str,
        prompt_ids: list[str],
        *,
        k: int,
        dtype: str,
        rows_per_shard: int,
        attributes: dict[str, Any],
    ) -> "GradientStore":
        """Create a store, or open the existing one to add its missing shards.

        Args:
            path: Directory of the group; several processes may call this at once.
            prompt_ids: One id per row, all different.
            k: Dimensions of a feature.
            dtype: ``float16`` (rows divided by their norm, which is stored as ``scale``) or ``float32``.
            rows_per_shard: Rows in a file.
            attributes: JSON description of the features: projection, objective, digests.

        Raises:
            DataError: The ids are empty or not unique, or a setting is invalid.
            ArtifactError: ``path`` holds a store with other ids, shape, type, layout or attributes.
        """
        check_settings(prompt_ids, k, dtype, rows_per_shard, attributes)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The parent directory itself is locked: a lock file would remain in the artifact.
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            staging = path.with_name(f".{path.name}.creating")
            shutil.rmtree(staging, ignore_errors=True)
            lay_out(staging, prompt_ids, k, dtype, rows_per_shard, attributes)
            if not path.exists():
                staging.rename(path)
            restore_metadata(path, staging, readable=False)
            same = (prompt_ids, k, dtype, rows_per_shard, attributes)
            try:
                store = cls._opened(path, *same)
            except ArtifactError as error:
                # Without a cause it is another store, or none.
                if error.__cause__ is None or not restore_metadata(path, staging, readable=True):
                    raise
                store = cls._opened(path, *same)
            if not store.finished:
                if restore_metadata(path, staging, readable=True):
                    store = cls(path, open_group(path, "r+"))
                store._forget_damaged_shards()
        finally:
            shutil.rmtree(path.with_name(f".{path.name}.creating"), ignore_errors=True)
            os.close(handle)
        return store

    @classmethod
    def _opened(cls, path: Path, *same: Any) -> "GradientStore":
        store = cls(path, open_group(path, "r+"))
        store._check_same(*same)
        return store

    @classmethod
    def join(cls, path: Path | str) -> "GradientStore":
        """Open a store that another process has created, to write shards of it.

        Raises:
            ArtifactError: The directory does not exist.
        """
        path = Path(path)
        if not path.is_dir():
            raise ArtifactError(
                f"{path} does not exist on {socket.gethostname()}. Every process that computes shards must reach the "
                "store under the same path; on several machines, put it on a shared file system"
            )
        return cls(path, open_group(path, "r+"))

    @classmethod
    def open(cls, path: Path | str) -> "GradientStore":
        """Open a finished store for reading.

        Raises:
            ArtifactError: The store is missing, unfinished or damaged, or has an unknown version.
        """
        path = Path(path)
        store = cls(path, open_group(path, "r"))
        if not store.finished:
            raise ArtifactError(
                f"{path} is unfinished: {store._missing() or 'finish() was not called'}. "
                "Run the gradients step again to complete it"
            )
        store._check_whole()
        return store

    @property
    def attributes(self) -> dict[str, Any]:
        """The description given to :meth:`create`."""
        return {name: value for name, value in self._group.attrs.asdict().items() if name not in RESERVED}

    @property
    def dtype(self) -> str:
        """The stored type, ``float16`` or ``float32``."""
        return self._dtype

    @property
    def finished(self) -> bool:
        """Whether the store was finished when this object was made, or by this object."""
        return bool(self._group.attrs["finished"])

    def shard_rows(self, shard: int) -> range:
        """Return the rows of a shard; the last one may be shorter."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"{self.path} has no shard {shard}; it has {self.shards}")
        # Python integers: rows times k exceeds 2**32 in stores of a few thousand unprojected gradients.
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.n))

    def done(self, shard: int) -> bool:
        """Return whether a shard is complete on disk."""
        return self.finished or self._marker(shard).exists()

    def write_shard(self, shard: int, features: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Write a shard, then its marker.

        Args:
            shard: Number of the shard; no other process may write it at the same time.
            features: ``(m, k)`` float32; rows whose status is not ``ok`` are stored as zeros.
            columns: ``status`` ``(m,)`` and any of ``norm``, ``ess``, ``max_ratio``, ``clip_fraction``,
                ``entropy``, ``mean_reward``, ``tokens``; an omitted column is NaN (0 for ``tokens``).

        Raises:
            DataError: A shape or a name is wrong, or a row with status ``ok`` is not finite.
            ArtifactError: The store is finished.
        """
        if self.finished:
            raise ArtifactError(
                f"{self.path} is finished, and a finished store is not changed. Use another path"
            )
        rows = self.shard_rows(shard)
        checked = checked_columns(rows, columns)
        if features.shape != (len(rows), self.k):
            raise DataError(
                f"shard {shard} takes features of shape {(len(rows), self.k)}, got {features.shape}"
            )
        if (ok := checked["status"] == 0).any():
            stored, checked["scale"] = pack(features, ok, self.dtype, rows.start)
            if self._layout is None:
                self._features[rows.start : rows.stop] = stored
            else:
                write_rows(self._shard_file(shard), stored, self._layout)
            sync(self._shard_file(shard))
        else:  # a missing file reads as zeros; an interrupted attempt may have left one
            checked["scale"] = np.zeros(len(rows), dtype=np.float32)
            self._shard_file(shard).unlink(missing_ok=True)
        marker = self._marker(shard)
        marker.parent.mkdir(exist_ok=True)
        checked[CHECKSUM] = np.array(self._checksum(shard))
        temporary = marker.with_name(f"{marker.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, **cast(dict[str, Any], checked))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(marker)

    def _checksum(self, shard: int) -> str:
        """Return a shard's number, so that a marker under another name is noticed, and the checksum of its file.

        A shard of zeros has no file.
        """
        file = self._shard_file(shard)
        return f"{shard} {file_crc32c(file) if file.exists() else ''}"

    def _forget_damaged_shards(self) -> None:
        """Remove the markers of shards that a power failure or a failing disk has changed; they are computed again."""
        for shard in range(self.shards):
            marker = self._marker(shard)
            if not marker.exists():
                continue
            try:
                with np.load(marker) as kept:
                    whole = all(len(kept[name]) for name in COLUMNS)
                    whole = whole and str(kept[CHECKSUM]) == self._checksum(shard)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError):
                whole = False
            if not whole:
                log.warning("shard %d of %s was damaged; it is computed again", shard, self.path)
                marker.unlink()

    def finish(self) -> None:
        """Gather the columns, mark the store as finished, and remove the markers. Repeated calls do nothing.

        Raises:
            ArtifactError: Shards are missing.
        """
        if not self.finished:
            if missing := self._missing():
                raise ArtifactError(f"{self.path} cannot be finished: {missing}")
            gathered: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
            for shard in range(self.shards):
                with np.load(self._marker(shard)) as marker:
                    for name, parts in gathered.items():
                        parts.append(marker[name])
            for name, parts in gathered.items():
                self._array(name).with_config({"write_empty_chunks": True})[:] = np.concatenate(parts)
            # A killed writer leaves zarr's temporary files, which are not part of the content.
            for partial in self.path.rglob("*.partial"):
                partial.unlink(missing_ok=True)
            self._group.attrs["finished"] = True
        shutil.rmtree(self.path / ".done", ignore_errors=True)

    def column(self, name: str) -> np.ndarray:
        """Read one column, ``(n,)``; ``prompt_id`` gives strings.

        Raises:
            ArtifactError: The store is unfinished, or the column cannot be read.
        """
        if name not in (*COLUMNS, "prompt_id"):
            raise KeyError(f"{name!r} is not a column; the columns are prompt_id, {', '.join(COLUMNS)}")
        if name != "prompt_id" and not self.finished:
            raise ArtifactError(f"{self.path} is unfinished; finish() gathers its columns")
        if name not in self._columns:
            # zarr returns numpy's StringDType; callers expect Python strings.
            values = self._read(self._array(name), slice(None))
            self._columns[name] = values.astype(object) if name == "prompt_id" else values
        return self._columns[name]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read features ``(stop - start, k)`` as float32, multiplied by ``scale``."""
        if not 0 <= start <= stop <= self.n:
            raise IndexError(f"{self.path} has {self.n} rows, and {start}:{stop} is outside")
        return unpack(self._stored(start, stop), self.column("scale")[start:stop])

    def blocks(
        self, rows: int | None = None, threads: int | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Stream the features in order, as :meth:`rows` returns them.

        Args:
            rows: Most rows of a block; by default a shard, or fewer if that would exceed 64 MiB.
            threads: Number of threads that read ahead; by default the cores, at most eight.
        """
        return self.map_blocks(unpack, rows, threads)

    def map_blocks(
        self,
        function: Callable[[np.ndarray, np.ndarray], Result],
        rows: int | None = None,
        threads: int | None = None,
    ) -> Iterator[tuple[slice, Result]]:
        """Stream a function of the features in order; several blocks are read and computed at once.

        Args:
            function: Takes the stored rows ``(m, k)`` and their scale ``(m,)``; features are the product. It is
                called from several threads and may change its arguments.
            rows: See :meth:`blocks`.
            threads: See :meth:`blocks`; one block more than threads is in memory.
        """
        size = min(self.rows_per_shard, max(1, BLOCK_BYTES // (4 * self.k))) if rows is None else rows
        if size < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        scale = self.column("scale")
        spans = (slice(start, min(start + size, self.n)) for start in range(0, self.n, size))

        def work(span: slice) -> Result:
            return function(self._stored(span.start, span.stop), scale[span])

        return in_order(work, spans, threads_here() if threads is None else threads)

    def _stored(self, start: int, stop: int) -> np.ndarray:
        """Read stored rows ``(stop - start, k)``, not multiplied by ``scale``."""
        if self._layout is None:
            return self._read(self._features, slice(start, stop))
        out = np.empty((stop - start, self.k), dtype=self.dtype)
        live = self.column("scale")[start:stop] != 0
        with self._readable("features"):
            read_rows(self._shard_file, start, live, self._layout, out)
        return out

    def _array(self, name: str) -> zarr.Array:
        with foreign_errors(f"{self.path}/{name} is damaged", ArtifactError, "Compute the gradients again"):
            return cast(zarr.Array, self._group[name])

    def _read(self, array: zarr.Array, rows: slice) -> np.ndarray:
        with self._readable(array.path):
            return np.asarray(array[rows])

    def _readable(self, name: str) -> AbstractContextManager[None]:
        return foreign_errors(f"{self.path}/{name} is damaged", ArtifactError, "Compute the gradients again")

    def _marker(self, shard: int) -> Path:
        self.shard_rows(shard)
        return self.path / ".done" / f"{shard}.npz"

    def _shard_file(self, shard: int) -> Path:
        return self.path.joinpath("features", "c", str(shard), "0")

    def _missing(self) -> str:
        """Describe the missing shards; empty if there are none."""
        missing = [shard for shard in range(self.shards) if not self._marker(shard).exists()]
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        named = ", ".join(map(str, missing[:10]))
        return f"{len(missing)} of {self.shards} shards are missing ({named}{more})" if missing else ""

    def _check_whole(self) -> None:
        """Refuse a store with a missing file: zarr would read zeros, and scores would be wrong in silence."""
        for name in (*COLUMNS, "prompt_id"):
            if not (self.path / name / "c" / "0").is_file():
                raise ArtifactError(
                    f"{self.path} is damaged: {name} has no file. Compute the gradients again"
                )
        live = np.flatnonzero(self.column("scale")) // self.rows_per_shard
        lost = [int(shard) for shard in np.unique(live) if not self._shard_file(int(shard)).is_file()]
        if lost:
            raise ArtifactError(
                f"{self.path} is damaged: shards {lost[:10]} have no file. Compute the gradients again"
            )

    def _check_same(
        self, prompt_ids: list[str], k: int, dtype: str, rows_per_shard: int, attributes: dict[str, Any]
    ) -> None:
        """Refuse to continue a store that was created with other arguments."""
        given: dict[str, Any] = {"k": k, "dtype": dtype, "rows_per_shard": rows_per_shard}
        given["attributes"] = canonical(attributes)
        pairs = [(name, getattr(self, name), value) for name, value in given.items()]
        different = [f"{name} is {stored}, not {value}" for name, stored, value in pairs if stored != value]
        if list(self.column("prompt_id")) != prompt_ids:
            different.append(f"its {self.n} prompt ids differ from the {len(prompt_ids)} given")
        if different:
            raise ArtifactError(f"{self.path} is another store: {'; '.join(different)}. Choose another path")
