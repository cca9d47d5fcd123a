"""Checksums of the files that an interrupted step keeps to resume from.

A finished artifact has the sha256 of each file in its manifest. Until then, the checksum of ``DIR/NAME`` is kept in
``.scratch/DIR.sums/NAME.crc32c`` next to DIR, written before the file gets its name. A file that a power failure or a
failing disk has changed is removed, and the step computes it again. In a workspace the checksums stay until the
manifest is written: :meth:`cropi_core.artifacts.store.Store.finish` removes ``.scratch``.
"""

import contextlib
import shutil
from pathlib import Path

import google_crc32c

from cropi_core.artifacts.keys import write_atomic
from cropi_core.artifacts.layout import SCRATCH

CHUNK_BYTES = 1 << 22


def file_crc32c(path: Path) -> str:
    """Return the CRC-32C of a file, in hexadecimal; it is several times as fast as a sha256."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest().decode()


def keep_checksum(content: Path, path: Path) -> None:
    """Keep the checksum of ``content``, which will be renamed to ``path``."""
    kept = _checksum(path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, file_crc32c(content))


def remove_damaged(directory: Path, pattern: str, *, required: bool = False) -> list[Path]:
    """Remove the files that do not match their checksums; return their paths.

    Args:
        directory: Directory of the files.
        pattern: Names of the files.
        required: Without a directory of checksums remove all files, as in a workspace, which keeps them to its end;
            otherwise the files are finished, and remain.
    """
    removed = []
    shutil.rmtree(_ended(directory), ignore_errors=True)
    if not _sums(directory).is_dir() and not required:
        return removed
    for path in sorted(directory.glob(pattern)):
        kept = _checksum(path)
        if not kept.is_file() or kept.read_bytes() != file_crc32c(path).encode():
            path.unlink()
            removed.append(path)
    return removed


def forget_checksums(directory: Path) -> None:
    """Remove the checksums of a directory whose files are complete."""
    if _sums(directory).is_dir():
        _sums(directory).rename(_ended(directory))  # a kill leaves all of them or none
        shutil.rmtree(_ended(directory))
        with contextlib.suppress(OSError):
            _sums(directory).parent.rmdir()  # not empty where other directories have checksums


def _sums(directory: Path) -> Path:
    return directory.parent / SCRATCH / f"{directory.name}.sums"


def _checksum(path: Path) -> Path:
    return _sums(path.parent) / f"{path.name}.crc32c"


def _ended(directory: Path) -> Path:
    return _sums(directory).with_name(f"{directory.name}.sums.ended")
