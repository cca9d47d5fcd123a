"""Open files below a directory without following symbolic links; all names inside stored artifacts are opened here.

    with opened(root, "prompts/prompts-v1-0123456789abcdef/manifest.json") as stream:
        text = stream.read(limit)

A root may come from an untrusted source. Each part of a name is opened relative to the directory before it (``openat``
with ``O_NOFOLLOW``), so that a link is refused even if it is created between a check and its use.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cropi_core.errors import ArtifactError

LINK = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
"""Error numbers that mean a link, or a file in place of a directory."""


def checked_name(name: str) -> PurePosixPath:
    """Return a name as a path; refuse a name that leaves its root.

    Raises:
        ArtifactError: It is absolute or empty, or contains ``..`` or a NUL.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ArtifactError(
            f"{name!r} is not the name of a file below the root; it may hold no `..` or leading slash"
        )
    return path


@contextlib.contextmanager
def directory_below(root: Path, name: str, *, create: bool = False) -> Iterator[int]:
    """Open a directory below ``root``, or ``root`` itself for the name ``.``.

    Args:
        root: A directory that the user chose; only this directory may be a link.
        name: Relative name with forward slashes.
        create: Create missing directories.

    Yields:
        The descriptor of the directory.

    Raises:
        ArtifactError: The name leaves the root, or a part of it is a link or a file.
        FileNotFoundError: It does not exist.
    """
    parts = () if name == "." else checked_name(name).parts
    if create:
        root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
            following = _open(root, name, part, os.O_RDONLY | os.O_DIRECTORY, handle)
            os.close(handle)
            handle = following
        yield handle
    finally:
        os.close(handle)


def _open(root: Path, name: str, part: str, flags: int, handle: int) -> int:
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=handle)
    except OSError as error:
        if error.errno not in LINK:
            raise
        raise ArtifactError(
            f"{root / name}: {part!r} is a symbolic link or not a directory; links below a root are not followed, put "
            "the files themselves there"
        ) from error


@contextlib.contextmanager
def descriptor(root: Path, name: str, flags: int, *, create: bool = False) -> Iterator[int]:
    """Open a regular file below ``root``.

    Args:
        root: As for :func:`directory_below`.
        name: Relative name with forward slashes.
        flags: Flags of :func:`os.open`.
        create: Create missing directories.

    Raises:
        ArtifactError: The name leaves the root, passes through a link, or is not a regular file.
        FileNotFoundError: It does not exist.
    """
    path = checked_name(name)
    with directory_below(root, str(path.parent), create=create) as directory:
        handle = _open(root, name, path.name, flags | os.O_NONBLOCK, directory)  # a pipe must not block
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ArtifactError(f"{root / name} is not a regular file")
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(root: Path, name: str) -> Iterator[io.BufferedReader]:
    """Open a regular file below ``root`` for reading; see :func:`descriptor`."""
    with descriptor(root, name, os.O_RDONLY) as handle, os.fdopen(handle, "rb", closefd=False) as stream:
        yield stream


def read_below(root: Path, name: str, most: int) -> bytes:
    """Read a small file below ``root``.

    Raises:
        ArtifactError: As for :func:`descriptor`, or the file has more than ``most`` bytes.
        FileNotFoundError: It does not exist.
    """
    with opened(root, name) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ArtifactError(f"{root / name} has more than {most} bytes; a file of this kind is small")
    return data


def write_below(root: Path, name: str, content: str | bytes) -> Path:
    """Write a small file below ``root`` atomically; a link with that name is replaced, not followed."""
    path = checked_name(name)
    with directory_below(root, str(path.parent), create=True) as directory:
        temporary = f".{path.name}.{os.getpid()}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o666, dir_fd=directory), "wb") as stream:
                stream.write(content.encode("utf-8") if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
    return root / path


def make_below(root: Path, name: str) -> Path:
    """Create a directory below ``root`` if it is missing, and return its path."""
    with directory_below(root, name, create=True):
        return root / name


def size_below(root: Path, name: str) -> int | None:
    """Return the size of a regular file below ``root`` in bytes; None for anything else, including links."""
    try:
        with descriptor(root, name, os.O_RDONLY) as handle:
            return os.fstat(handle).st_size
    except (ArtifactError, OSError):
        return None


def entries_below(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """List all entries below a directory except directories, by relative name; links are not followed."""
    pending: list[str] = [""]
    while pending:
        place = pending.pop()
        with os.scandir(directory / place) as listing:
            children: list[Any] = sorted(listing, key=lambda entry: entry.name)
        for entry in children:
            name = f"{place}/{entry.name}" if place else entry.name
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
            else:
                yield name, entry.stat(follow_symlinks=False)


def without_links(root: Path, name: str) -> Path:
    """Create a directory below ``root`` and remove all links in it.

    Programs that fill the directory write by path and would follow links: a root from an untrusted source could have
    them overwrite a file of its user.
    """
    directory = make_below(root, name)
    for entry, status in list(entries_below(directory)):
        if stat.S_ISLNK(status.st_mode):
            (directory / entry).unlink(missing_ok=True)
    return directory
