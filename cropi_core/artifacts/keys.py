"""Keys, digests, checksums and the manifest file of artifacts.

A key hashes what an artifact is computed from, a digest hashes its content; a manifest records both and lists the
files.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from cropi_core.artifacts.below import write_below
from cropi_core.artifacts.layout import MANIFEST, SCRATCH
from cropi_core.errors import ArtifactError, in_one_line
from data_schemas import SCHEMA_VERSION, FileEntry, Manifest, canonical_json

MOST_BYTES = 64 << 20
"""Maximum bytes of a manifest or a record; a manifest of 100,000 files has about 15 MB."""
DEEPEST = 64
"""Maximum nesting depth of lists and objects in a manifest or a record."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or an exhausted quota."""


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a full disk; Rust libraries report it in the message only."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entries(directory: Path) -> list[FileEntry]:
    """List every file below ``directory`` except the manifest and scratch, sorted by path, with size and sha256."""
    entries = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if relative.split("/", 1)[0] == SCRATCH:
            continue
        if path.is_symlink():
            raise ArtifactError(f"{path} is a symbolic link; artifacts hold plain files only")
        if not path.is_file() or relative == MANIFEST:
            continue
        entries.append(FileEntry(path=relative, size=path.stat().st_size, sha256=file_sha256(path)))
    return entries


def content_digest(entries: list[FileEntry]) -> str:
    """Hash the names, sizes and checksums of an artifact's files: equal contents have equal digests."""
    text = canonical_json([[e.path, e.size, e.sha256] for e in sorted(entries, key=lambda e: e.path)])
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_checksum(raw: Mapping[str, Any]) -> str:
    """Hash the content of a manifest except its own checksum: its summary decides how a run continues."""
    text = canonical_json({name: value for name, value in raw.items() if name != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON.

    Raises:
        ValueError: It is not JSON, is not UTF-8, nests deeper than ``DEEPEST``, or has a number that is not finite or
            half of a surrogate pair: neither can be written again, as a checksum of the content needs.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return _writable(value)
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


def _writable(value: Any) -> Any:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair") from None
    except ValueError:
        raise ValueError("it has a number that is not finite") from None
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file atomically: a reader sees the old content or the new content."""
    write_below(path.parent, path.name, content)


def read_manifest(text: str | bytes, where: object) -> Manifest:
    """Parse the text of a manifest.

    Args:
        text: JSON.
        where: Path or address that it was read from, for error messages.

    Raises:
        ArtifactError: It is not a manifest, or has another schema version.
    """
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{where} is not JSON ({error}); the artifact is damaged") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            "use the program that wrote it, or another root"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{where} is not a manifest: {in_one_line(error)}") from error


def manifest_faults(manifest: Manifest, text: str | bytes, key: str, where: object) -> list[str]:
    """Check a manifest against the key it is stored under and for consistency; return one line per contradiction."""
    faults = []
    if manifest.key != key:
        faults.append(f"{where} names {manifest.key}")
    for entry in manifest.files:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            faults.append(f"{where} names {entry.path!r}, a file outside the artifact")
    if content_digest(manifest.files) != manifest.digest:
        faults.append(f"{where} has a digest that is not that of its files")
    if manifest.checksum and manifest.checksum != manifest_checksum(json.loads(text)):
        faults.append(f"{where} does not match its checksum; it was changed")
    return faults
