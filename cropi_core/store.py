"""The artifact store: directories named by what they were made from, with a manifest written last.

``<root>/<kind>/<key>/`` holds an artifact's files and ``manifest.json``. A key hashes the settings and the inputs'
content digests, so finding a key is resuming, and naming another one is swapping. An artifact appears by one rename
and is never overwritten; one that does not match its manifest is named, set aside under ``<root>/.damaged`` and
computed again. Work in progress lives in ``<root>/.work/<key>``, where a step finds its whole shards after a stop.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cropi_core.errors import ArtifactError, CropiError, in_one_line
from data_schemas.manifest import KINDS, SCHEMA_VERSION, ArtifactRef, FileEntry, Manifest

MANIFEST = "manifest.json"
SCRATCH = ".scratch"
"""Directory of a workspace for what only serves to go on after a stop; no part of the artifact."""


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that mean a full disk or quota."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, is a full disk; Rust libraries say so in their text only."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def canonical_json(value: Any) -> str:
    """Serialise to the one JSON text that equal values share: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def artifact_key(
    kind: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]
) -> str:
    """Name an artifact by what it is made from: ``<kind>-v<version>-<16 hex digits>``."""
    material = {"settings": settings, "inputs": {name: ref.digest for name, ref in inputs.items()}}
    text = f"{kind}/{version}/{canonical_json(material)}"
    return f"{kind}-v{version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def file_sha256(path: Path) -> str:
    """Hash a file's bytes; hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entries(directory: Path) -> list[FileEntry]:
    """List every file below ``directory`` but manifest and scratch, sorted by path, with size and sha256."""
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
    """Hash the names, sizes and checksums of an artifact's files: equal content, equal digest."""
    text = canonical_json([[e.path, e.size, e.sha256] for e in sorted(entries, key=lambda e: e.path)])
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_checksum(raw: Mapping[str, Any]) -> str:
    """Hash what a manifest says apart from its own checksum: its summary decides what a run does next."""
    text = canonical_json({name: value for name, value in raw.items() if name != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """Artifacts below one root directory."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().resolve()
        # A file is hashed again only when its time or size moved: a run reads the same artifact many times.
        self._hashed: dict[tuple[str, int, int], str] = {}

    def prepare(self) -> None:
        """Make the root, and see that it can be written to.

        Raises:
            ArtifactError: It cannot.
        """
        probe = self.root / ".work" / f".probe.{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in FULL:
                raise self.no_space("the run") from error
            raise ArtifactError(
                f"artifacts cannot be written below {self.root} ({error.strerror}): "
                "name another directory with --root"
            ) from error

    def no_space(self, what: str) -> CropiError:
        """Say that the disk is full, and that nothing is lost by it."""
        free = shutil.disk_usage(self.root).free
        return CropiError(
            f"{what}: no space left below {self.root} ({free / 1e6:.1f} MB free); what is whole was kept: "
            "free some space (`cropi artifacts gc` lists what nothing needs) and run the same command again"
        )

    def path(self, ref: ArtifactRef | str) -> Path:
        """Return the directory of an artifact, present or not."""
        key = ref if isinstance(ref, str) else ref.key
        kind = key.split("-", 1)[0]
        if kind not in KINDS or "/" in key or ".." in key:
            raise ArtifactError(f"{key!r} is no artifact key; keys look like gradients-v1-0123456789abcdef")
        return self.root / kind / key

    def manifest(self, ref: ArtifactRef | str) -> Manifest:
        """Read an artifact's manifest.

        Raises:
            ArtifactError: There is none, it cannot be read, or it has another schema version.
        """
        path = self.path(ref) / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(f"no artifact {path.parent.name} under {self.root}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is no JSON ({error}); the artifact is damaged") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "use the program that wrote it, or another root"
            )
        try:
            return Manifest.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"{path} is no manifest: {in_one_line(error)}") from error

    def faults(self, key: str) -> list[str]:
        """Compare an artifact with its manifest; every missing, changed or foreign file is one line."""
        directory = self.path(key)
        try:
            manifest = self.manifest(key)
        except ArtifactError as error:
            if "schema version" in str(error):
                raise
            return [str(error)]
        found = []
        if manifest.key != key:
            found.append(f"{directory / MANIFEST} names {manifest.key}")
        for entry in manifest.files:
            path = directory / entry.path
            if not path.resolve().is_relative_to(directory.resolve()):
                found.append(f"{directory / MANIFEST} names {entry.path!r}, a file outside the artifact")
            elif path.is_symlink() or not path.is_file():
                found.append(f"{path} is missing")
            elif path.stat().st_size != entry.size:
                found.append(f"{path} has {path.stat().st_size} bytes, its manifest says {entry.size}")
            elif self._sha256(path) != entry.sha256:
                found.append(f"{path} does not match its sha256; it was changed after it was written")
        known = {entry.path for entry in manifest.files} | {MANIFEST}
        for path in sorted(directory.rglob("*")):
            if not path.is_dir() and path.relative_to(directory).as_posix() not in known:
                found.append(f"{path} is not in the manifest")
        if content_digest(manifest.files) != manifest.digest:
            found.append(f"{directory / MANIFEST} has a digest that is not that of its files")
        raw = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest.checksum and manifest.checksum != manifest_checksum(raw):
            found.append(f"{directory / MANIFEST} does not match its checksum; it was changed")
        return found

    def _sha256(self, path: Path) -> str:
        stat = path.stat()
        token = (str(path), stat.st_mtime_ns, stat.st_size)
        if token not in self._hashed:
            self._hashed[token] = file_sha256(path)
        return self._hashed[token]

    def is_complete(self, key: str) -> bool:
        """Whether the artifact is there and matches its manifest, byte for byte."""
        return self.path(key).exists() and not self.faults(key)

    def find(self, key: str) -> ArtifactRef | None:
        """Return a whole artifact; set a damaged one aside and return None."""
        if not self.path(key).exists():
            return None
        if faults := self.faults(key):
            self.set_aside(key, faults)
            return None
        return self.manifest(key).ref

    def set_aside(self, key: str, faults: list[str]) -> Path:
        """Move a damaged artifact under ``.damaged`` with its faults beside it; nothing is deleted."""
        target = self.root / ".damaged" / f"{key}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(key).rename(target)
        (target.parent / f"{target.name}.txt").write_text("\n".join(faults) + "\n", encoding="utf-8")
        return target

    def damaged(self) -> list[Path]:
        """List what was set aside."""
        return sorted(p for p in (self.root / ".damaged").glob("*") if p.is_dir())

    def require(self, ref: ArtifactRef) -> Path:
        """Return the directory of an input that must be whole and hold what its name says.

        Raises:
            ArtifactError: It is missing, damaged, or its content is not the digest asked for.
        """
        if faults := self.faults(ref.key):
            raise ArtifactError(f"input {ref.key} cannot be used: " + "; ".join(faults[:5]))
        if (digest := self.manifest(ref).digest) != ref.digest:
            raise ArtifactError(f"input {ref.key} holds {digest[:16]}, {ref.digest[:16]} was asked for")
        return self.path(ref)

    def workspace(self, key: str) -> Path:
        """Return the directory in which the artifact's work in progress lives, created when absent."""
        directory = self.root / ".work" / key
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def logs(self, key: str) -> Path:
        """Return the directory for the logs of programs that compute the artifact; it may not exist."""
        return self.root / ".logs" / key

    def sweep(self, key: str) -> None:
        """Remove the half-written files that a killed process left in a workspace.

        Their names hold that process's id: nobody would write over them, and they would enter the artifact.
        The caller holds the claim.
        """
        for partial in (self.root / ".work" / key).rglob("*.tmp"):
            partial.unlink()

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[int]:
        """Hold the right to compute ``key``; another process waits. The system frees it when its owner dies.

        Yields:
            The lock's file descriptor: a child that inherits it holds the claim as long as it lives.
        """
        path = self.root / ".work" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            # Freed by closing, not by LOCK_UN: that would take the claim from a child that inherited it.
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream.fileno()

    def publish(self, manifest: Manifest) -> ArtifactRef:
        """Turn the workspace of ``manifest.key`` into the artifact: manifest last, then one rename."""
        work, target = self.workspace(manifest.key), self.path(manifest.key)
        if target.exists():
            raise ArtifactError(f"{target} exists; artifacts are never overwritten")
        checksum = manifest_checksum(json.loads(manifest.model_dump_json()))
        whole = manifest.model_copy(update={"checksum": checksum})
        write_atomic(work / MANIFEST, whole.model_dump_json(indent=1))
        self.finish(manifest.key)
        return manifest.ref

    def finish(self, key: str) -> None:
        """Move a workspace that has its manifest into place; the end of :meth:`publish`, or of a killed one.

        Nothing to do if there is no such workspace. The caller holds the claim.
        """
        work, target = self.root / ".work" / key, self.path(key)
        if target.exists() or not (work / MANIFEST).exists():
            return
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.rename(target)

    def discard(self, key: str) -> None:
        """Remove a finished artifact and its unfinished work, so that it is computed from the start."""
        shutil.rmtree(self.path(key), ignore_errors=True)
        shutil.rmtree(self.root / ".work" / key, ignore_errors=True)

    def keys(self, kind: str | None = None) -> list[str]:
        """List the keys present, oldest first."""
        kinds = [kind] if kind else list(KINDS)
        paths = [p for k in kinds for p in (self.root / k).glob(f"{k}-v*") if (p / MANIFEST).exists()]
        return [p.name for p in sorted(paths, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p.name))]

    def resolve(self, name: str) -> str:
        """Turn a key, an unambiguous beginning of one, or a tag into a key.

        Raises:
            ArtifactError: Nothing or more than one artifact has that name.
        """
        tags = self.tags()
        if name in tags:
            return tags[name]
        matches = [key for key in self.keys() if key == name or key.startswith(name)]
        if name in matches:
            return name
        if len(matches) != 1:
            what = (
                f"{len(matches)} artifacts begin so: {', '.join(matches[:5])}"
                if matches
                else "no artifact or tag"
            )
            raise ArtifactError(f"{name!r} under {self.root}: {what}; `cropi artifacts ls` lists them")
        return matches[0]

    def tags(self) -> dict[str, str]:
        """Return the names people gave to artifacts."""
        path = self.root / "tags.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def tag(self, name: str, key: str) -> None:
        """Give an artifact a name, moving it if it was taken."""
        write_atomic(self.root / "tags.json", json.dumps(self.tags() | {name: key}, indent=1, sort_keys=True))
