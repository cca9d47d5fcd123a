"""The artifact store: directories named by a hash of their inputs, with a manifest written last.

``<root>/<kind>/<key>/`` contains the files of an artifact and ``manifest.json``. A key hashes the settings and the
content digests of the inputs: a run resumes by finding keys, and swaps an artifact by naming another key. An artifact
appears by one rename and is never overwritten. An artifact that does not match its manifest is reported, set aside
below ``<root>/.damaged`` and computed again. Work in progress is kept in ``<root>/.work/<key>``, where a step finds its
complete shards after an interruption.

If the root is an address (``s3://bucket/prefix``), all of this happens in a local directory, and finished artifacts are
passed to :class:`cropi_core.artifacts.remote_store.Remote`, which other machines share; docs/guides/s3-storage.md
describes the guarantees.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cropi_core.artifacts.below import (
    directory_below,
    make_below,
    read_below,
    size_below,
    without_links,
    write_below,
)
from cropi_core.artifacts.damaged import move_aside, moved_aside, note_aside
from cropi_core.artifacts.integrity import IntegrityCheck
from cropi_core.artifacts.keys import (
    FULL,
    MOST_BYTES,
    manifest_checksum,
    read_manifest,
)
from cropi_core.artifacts.layout import MANIFEST, SCRATCH
from cropi_core.artifacts.locks import exclusive_lock
from cropi_core.artifacts.object_storage import is_address
from cropi_core.artifacts.remote_store import Remote
from cropi_core.artifacts.root_files import RootFiles
from cropi_core.errors import ArtifactError, CropiError
from cropi_core.system import masked_values
from data_schemas import KINDS, ArtifactRef, Manifest


class Store:
    """Artifacts below one root: a directory, or an address with a local directory as its cache.

    Attributes:
        remote: The store shared with other machines; None for a directory.
        root: The directory; for an address, its cache.
        url: Name of the root: the directory, or the address.
    """

    def __init__(self, root: Path | str) -> None:
        self.remote = Remote(str(root)) if is_address(root) else None
        self.root = self.remote.cache if self.remote else Path(root).expanduser().resolve()
        self.url = self.remote.url if self.remote else str(self.root)
        self._integrity = IntegrityCheck(self.root)
        self._files = RootFiles(self.root, self.remote, self.url)

    def make_root(self) -> None:
        """Create a missing root with access for this user only; an existing root keeps its permissions."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Create the root, and check that it is writable.

        Raises:
            ArtifactError: It is not.
        """
        try:
            self.make_root()
            write_below(self.root, f".work/.probe.{os.getpid()}", "").unlink()
        except OSError as error:
            if error.errno in FULL:
                raise self.no_space("the run") from error
            raise ArtifactError(
                f"artifacts cannot be written below {self.root} ({error.strerror}): "
                "name another directory with --root"
            ) from error
        if self.remote:
            self.remote.prepare()

    def no_space(self, what: str) -> CropiError:
        """Return the error for a full disk, which states that complete work is kept."""
        free = shutil.disk_usage(self.root).free
        advice = "gc --cache` lists copies" if self.remote else "gc` lists what nothing needs"
        return CropiError(
            f"{what}: no space left below {self.root} ({free / 1e6:.1f} MB free); what is complete was kept: "
            f"free some space (`cropi artifacts {advice}) and run the same command again"
        )

    def path(self, ref: ArtifactRef | str) -> Path:
        """Return the directory of an artifact, which may not exist."""
        key = ref if isinstance(ref, str) else ref.key
        kind = key.split("-", 1)[0]
        if kind not in KINDS or "/" in key or ".." in key:
            raise ArtifactError(
                f"{key!r} is not an artifact key; keys look like gradients-v1-0123456789abcdef"
            )
        return self.root / kind / key

    def has(self, ref: ArtifactRef | str) -> bool:
        """Return whether an artifact with this key exists; it may be damaged."""
        return self._manifest_path(ref).exists()

    def _manifest_path(self, ref: ArtifactRef | str) -> Path:
        """Return the path of a manifest; for an address, that of the local copy of the shared manifest."""
        path = self.path(ref) / MANIFEST
        if self.remote is None:
            return path
        copy = self.remote.mirror(path.parent.name)
        if not copy.exists() and not path.exists():
            self.remote.pull(path.parent.name)
        return copy if copy.exists() else path

    def manifest(self, ref: ArtifactRef | str) -> Manifest:
        """Read the manifest of an artifact.

        Raises:
            ArtifactError: It does not exist, cannot be read, or has another schema version.
        """
        path = self._manifest_path(ref)
        try:
            return read_manifest(self._bytes(path), path)
        except FileNotFoundError as error:
            raise ArtifactError(f"no artifact {self.path(ref).name} under {self.url}") from error

    def _bytes(self, path: Path) -> bytes:
        """Read a manifest below the root without following links."""
        return read_below(self.root, path.relative_to(self.root).as_posix(), MOST_BYTES)

    def directory(self, ref: ArtifactRef | str) -> Path:
        """Return the directory of an artifact; download it first if it is not in the cache.

        Raises:
            ArtifactError: It does not exist, or the download does not match its manifest.
        """
        path = self.path(ref)
        if self.remote:
            if not path.exists():
                if not self.remote.pull(path.name):
                    raise ArtifactError(f"no artifact {path.name} under {self.url}")
                self.remote.download(path.name, path)
            os.utime(path)  # time of last use
        return path

    def where(self, ref: ArtifactRef | str) -> str:
        """Return the location of an artifact's files: a local directory or an address."""
        path = self.path(ref)
        return str(path) if self.remote is None or path.exists() else self.remote.where(path.name)

    def faults(self, key: str) -> list[str]:
        """Compare an artifact's directory with its manifest; return one line per missing, changed or unknown file."""
        return self._integrity.faults(key, self.path(key))

    def is_complete(self, key: str) -> bool:
        """Return whether the artifact exists and matches its manifest; see :meth:`find`."""
        if self.remote is None:
            return self.path(key).exists() and not self.faults(key)
        if not self.remote.pull(key) or self.remote.faults(key):
            return False
        return not self.path(key).exists() or not self.faults(key)

    def find(self, key: str) -> ArtifactRef | None:
        """Return a complete artifact; set a damaged one aside and return None.

        In a directory, every byte is compared with the manifest. At an address, names and sizes are compared, and every
        byte when the files are downloaded. An artifact that only this machine has is uploaded.
        """
        if self.path(key).exists() and (faults := self.faults(key)):
            self.set_aside(key, faults)
        local = self.path(key).exists()
        if self.remote is None:
            return self.manifest(key).ref if local else None
        if self.remote.pull(key):
            if not (faults := self.remote.faults(key)):
                return self._agreed(key)
            self._set_aside_remote(key, faults)
        return self._shared(key) if local else None

    def _shared(self, key: str) -> ArtifactRef:
        """Upload a finished artifact if the store is shared; the content that was uploaded first is used."""
        if self.remote is None:
            return self.manifest(key).ref
        self.remote.upload(self.path(key))
        return self._agreed(key)

    def _agreed(self, key: str) -> ArtifactRef:
        """Delete a local copy with other content than the shared one, and return the shared artifact."""
        ref = self.manifest(key).ref
        path = self.path(key)
        if path.exists() and read_manifest(self._bytes(path / MANIFEST), path).digest != ref.digest:
            shutil.rmtree(path)
        return ref

    def set_aside(self, key: str, faults: list[str]) -> Path:
        """Move a damaged artifact below ``.damaged``, together with a list of its faults; nothing is deleted."""
        return move_aside(self.root, self.path(key), faults)

    def _set_aside_remote(self, key: str, faults: list[str]) -> str:
        """Set the shared artifact aside, and leave a note below the local ``.damaged``."""
        assert self.remote is not None
        address = self.remote.set_aside(key, faults)
        note_aside(self.root, address, faults)
        return address

    def audit(self, key: str, *, repair: bool = False) -> tuple[list[str], str | None]:
        """Compare an artifact with its manifest byte by byte, both the local and the shared copy.

        Args:
            key: Key of the artifact.
            repair: Set damaged copies aside.

        Returns:
            The faults, one line each, and the new location of the damaged artifact.
        """
        faults, moved = [], None
        if self.remote is None or self.path(key).exists():
            faults = self.faults(key)
            moved = str(self.set_aside(key, faults)) if faults and repair else None
        if self.remote and self.remote.pull(key) and (remote_faults := self.remote.faults(key, read=True)):
            faults += remote_faults
            moved = self._set_aside_remote(key, remote_faults) if repair else None
        return faults, moved

    def damaged(self) -> list[Path]:
        """List the artifacts that were set aside."""
        return moved_aside(self.root)

    def require(self, ref: ArtifactRef) -> Path:
        """Return the directory of an input, which must be complete and match its digest.

        Raises:
            ArtifactError: It is missing or damaged, or its content does not match the requested digest.
        """
        if self.remote and self.path(ref).exists():
            if faults := self.faults(ref.key):
                self.set_aside(ref.key, faults)  # a local copy; the shared artifact still exists
            elif self.remote.pull(ref.key):
                self._agreed(ref.key)
        directory = self.directory(ref)
        if faults := self.faults(ref.key):
            raise ArtifactError(f"input {ref.key} cannot be used: " + "; ".join(faults[:5]))
        digest = read_manifest(self._bytes(directory / MANIFEST), directory).digest
        if digest != ref.digest:
            raise ArtifactError(f"input {ref.key} holds {digest[:16]}, {ref.digest[:16]} was requested")
        return directory

    @contextlib.contextmanager
    def in_use(self, refs: Iterable[ArtifactRef]) -> Iterator[None]:
        """Keep artifacts in the cache while a step reads them; the kernel releases the lock when the process dies."""
        with contextlib.ExitStack() as stack:
            for path in [self.path(ref) for ref in refs] if self.remote else []:
                opened = os.open(path, os.O_RDONLY)
                stack.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_SH)
            yield

    def workspace(self, key: str) -> Path:
        """Return the directory for work in progress on an artifact; create it if it is missing."""
        self.make_root()
        return make_below(self.root, f".work/{key}")

    def logs(self, key: str) -> Path:
        """Return the directory for logs of programs that compute the artifact; it may not exist.

        Raises:
            ArtifactError: It is a link.
        """
        name = f".logs/{key}"
        with contextlib.suppress(FileNotFoundError), directory_below(self.root, name):
            without_links(self.root, name)
        return self.root / name

    def folder(self, name: str) -> Path:
        """Create a directory of the root for files outside of artifacts, such as a study's; remove links in it."""
        return without_links(self.root, name)

    def sweep(self, key: str) -> None:
        """Remove links, and the partial files of a killed process, from a workspace.

        The names of partial files contain the id of that process: no other process would overwrite them, and they would
        become part of the artifact. The caller holds the claim.
        """
        for partial in without_links(self.root, f".work/{key}").rglob("*.tmp"):
            partial.unlink()

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[int]:
        """Hold the claim to compute ``key``; other processes wait. The kernel releases it when its owner dies.

        Yields:
            The file descriptor of the lock: a child that inherits it holds the claim as long as it lives.
        """
        self.make_root()
        with exclusive_lock(self.root, f".work/{key}.lock") as lock:
            yield lock

    def publish(self, manifest: Manifest) -> ArtifactRef:
        """Turn the workspace of ``manifest.key`` into the artifact: write the manifest, then rename once."""
        self.workspace(manifest.key)
        target = self.path(manifest.key)
        if target.exists():
            raise ArtifactError(f"{target} exists; artifacts are never overwritten")
        manifest = manifest.model_copy(update={"summary": masked_values(manifest.summary)})
        checksum = manifest_checksum(json.loads(manifest.model_dump_json()))
        checksummed = manifest.model_copy(update={"checksum": checksum})
        write_below(self.root, f".work/{manifest.key}/{MANIFEST}", checksummed.model_dump_json(indent=1))
        self.finish(manifest.key)
        return self._shared(manifest.key)

    def finish(self, key: str) -> None:
        """Move a workspace that has its manifest into place: the end of :meth:`publish`, or of an interrupted one.

        Does nothing if there is no such workspace. The caller holds the claim.
        """
        work, target = f".work/{key}", self.path(key)
        if target.exists() or size_below(self.root, f"{work}/{MANIFEST}") is None:
            return
        shutil.rmtree(self.root / work / SCRATCH, ignore_errors=True)
        with (
            directory_below(self.root, ".work") as work_fd,
            directory_below(self.root, target.parent.name, create=True) as target_fd,
        ):
            os.rename(key, key, src_dir_fd=work_fd, dst_dir_fd=target_fd)

    def discard(self, key: str) -> None:
        """Remove a finished artifact and its unfinished work, so that it is computed from scratch."""
        for path in (
            self.path(key),
            self.root / ".work" / key,
        ):  # links are not followed, in any part of the path
            with contextlib.suppress(FileNotFoundError), directory_below(self.root, path.parent.name):
                shutil.rmtree(path, ignore_errors=True)
        if self.remote:
            self.remote.discard(key)

    def keys(self, kind: str | None = None) -> list[str]:
        """List the existing keys, oldest first."""
        if self.remote:
            return [key for key in self.remote.listed() if kind in (None, key.partition("-")[0])]
        kinds = [kind] if kind else list(KINDS)
        paths = [p for k in kinds for p in (self.root / k).glob(f"{k}-v*") if (p / MANIFEST).exists()]
        return [p.name for p in sorted(paths, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p.name))]

    def resolve(self, name: str) -> str:
        """Resolve a key, an unambiguous prefix of a key, or a tag to a key.

        Raises:
            ArtifactError: No artifact or more than one matches.
        """
        tags = self.tags()
        if name in tags:
            return tags[name]
        matches = [key for key in self.keys() if key == name or key.startswith(name)]
        if name in matches:
            return name
        if len(matches) != 1:
            fault = (
                f"{len(matches)} artifacts begin so: {', '.join(matches[:5])}"
                if matches
                else "no artifact or tag"
            )
            raise ArtifactError(f"{name!r} under {self.url}: {fault}; `cropi artifacts ls` lists them")
        return matches[0]

    def tags(self) -> dict[str, str]:
        """Return the key of each tag."""
        return self._files.tags()

    def tag(self, name: str, key: str) -> None:
        """Tag an artifact; an existing tag is moved."""
        self._files.tag(name, key)

    def untag(self, name: str) -> str:
        """Remove a tag, and return the key that it named.

        Raises:
            ArtifactError: There is no such tag.
        """
        return self._files.untag(name)

    # -- small files: the last of several writers wins ---------------------------------------------------------

    def read(self, name: str) -> str | None:
        """Read a small file of the root; return None if it does not exist."""
        return self._files.read(name)

    def write(self, name: str, text: str) -> Path:
        """Write a small file of the root atomically, and return its local path."""
        return self._files.write(name, text)

    def remove(self, name: str) -> None:
        """Remove a small file of the root; a missing file is not an error."""
        self._files.remove(name)

    def names(self, directory: str) -> list[str]:
        """List the files of one of the root's directories, oldest first, without files that are being written."""
        return self._files.names(directory)
