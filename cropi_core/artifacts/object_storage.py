"""Objects below an address that fsspec supports, such as S3: list, get, put, move, remove, with errors that advise.

    objects = Objects("s3://bucket/prefix")
    objects.put("runs/demo.json", b"{}")
    objects.list("runs")                    # {"demo.json": Listed(size=2, modified=1764086400.0)}

This module does not depend on artifacts. Listings are never cached, since other machines write too. Credentials come
from the environment and the usual files: this module does not read, store or print them.
"""

import contextlib
import datetime
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cropi_core.artifacts.keys import is_full
from cropi_core.errors import ArtifactError, ConfigError, foreign_errors

AT_ONCE = 8
"""Number of files transferred at the same time; fsspec itself sends the parts of a large file in parallel."""
LARGE = 64 << 20
"""Size in bytes from which a file is transferred alone: s3fs holds up to 10 parts of 50 MB of each file in memory."""
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Names that file systems use for the time of the last change."""

T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """Entry of a listing: size in bytes, and time of the last change in seconds since 1970."""

    size: int
    modified: float


def is_address(root: object) -> bool:
    """Return whether a root is an address and not a directory.

    Raises:
        ConfigError: It is an address that was passed through :class:`pathlib.Path`, which removes a slash.
    """
    if isinstance(root, Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(root)):
        raise ConfigError(f"root {root}: give an address as text; a Path makes one slash of its two")
    text = str(root)
    if (match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)) and not (
        text.startswith(f"{match[1]}://") and match[1].islower()
    ):
        raise ConfigError(
            f"root {root} is neither a directory nor an address; an address is written s3://bucket/prefix, in lower "
            "case and with two slashes"
        )
    return "://" in text


def checked_address(url: str) -> str:
    """Return an address without its trailing slash.

    Raises:
        ConfigError: It contains a password, is the address of a directory, or is that of a memory file system, which
            ends with the process.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"root {parts.scheme}://…: an address is written into records and messages, so it holds no user, password "
            "or query; credentials come from the environment (docs/guides/s3-storage.md)"
        )
    if parts.scheme in ("file", "local"):
        raise ConfigError(f"root {url}: a directory needs no address, give its path: {parts.path or '/path'}")
    if parts.scheme == "memory":
        raise ConfigError(f"root {url} would end with its process, and a run has several")
    if not parts.netloc:
        raise ConfigError(f"root {url} names no bucket; an address is like s3://bucket/prefix")
    return url.rstrip("/")


class Objects:
    """The objects below one address."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def _fs(self) -> Any:
        """Return the file system; fsspec keeps one per process, and creates another after a fork."""
        with foreign_errors(
            f"root {self.url} needs a package that is not installed",
            ConfigError,
            "For s3:// install it with `pip install 'cropi[s3]'`",
        ):
            import fsspec

            return fsspec.filesystem(urlsplit(self.url).scheme, use_listings_cache=False)

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}".partition("://")[2]

    @contextlib.contextmanager
    def _converted_errors(self, action: str) -> Iterator[None]:
        """Convert the exceptions of a file system, which have no common base class, into an error with advice."""
        remedy = lambda error: f"{advice(error)} (docs/guides/s3-storage.md)"  # noqa: E731
        with foreign_errors(f"{action} at {self.url} failed", ArtifactError, remedy):
            yield

    def list(self, place: str) -> dict[str, Listed]:
        """List the objects below ``place`` by names relative to it; one request per thousand objects."""
        prefix = f"{self._path(place)}/"
        with self._converted_errors(f"listing {place}"):
            # The prefix saves s3fs two requests for an empty listing; a file system that ignores it lists more.
            entries = self._fs.find(self._path("").rstrip("/"), prefix=f"{place}/", detail=True)
        return {
            name.removeprefix(prefix): Listed(int(info.get("size") or 0), modified(info))
            for name, info in entries.items()
            if name.startswith(prefix) and info.get("type", "file") == "file"
        }

    def fetch(self, name: str, path: Path) -> bool:
        """Download an object to a file atomically; return False if the object does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with self._converted_errors(f"getting {name}"):
                try:
                    self._fs.get_file(self._path(name), str(partial))  # cat_file would request the size first
                except FileNotFoundError:
                    return False
            partial.replace(path)
            return True
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Open an object for reading in blocks; yield None if the object does not exist."""
        with self._converted_errors(f"reading {name}"):
            try:
                stream = self._fs.open(self._path(name), "rb", block_size=8 << 20)
            except FileNotFoundError:
                yield None
                return
            with stream:
                yield stream

    def send(self, path: Path, name: str) -> None:
        """Upload a file to an object, replacing an existing one."""
        with self._converted_errors(f"sending {name}"):
            self._fs.put_file(str(path), self._path(name))

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, replacing an existing one."""
        with self._converted_errors(f"writing {name}"):
            self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object unless it exists, in one request (``If-None-Match: *``); return False if it exists."""
        with self._converted_errors(f"writing {name}"):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def move(self, place: str, other: str) -> None:
        """Move all objects below ``place``; the server copies them."""
        for name in self.list(place):
            with self._converted_errors(f"moving {place}/{name}"):
                self._fs.mv(self._path(f"{place}/{name}"), self._path(f"{other}/{name}"))

    def remove(self, name: str) -> None:
        """Remove one object; a missing object is not an error."""
        with self._converted_errors(f"removing {name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def clear(self, place: str) -> None:
        """Remove all objects below ``place``.

        Raises:
            ArtifactError: Some objects could not be removed.
        """
        with self._converted_errors(f"removing {place}"):
            if names := [self._path(f"{place}/{name}") for name in self.list(place)]:
                self._fs.rm(names)
        if left := self.list(place):  # s3fs does not raise for objects that S3 refused to remove
            raise ArtifactError(f"{len(left)} objects below {self.url}/{place} could not be removed")


def modified(info: dict[str, Any]) -> float:
    """Return the time of the last change in seconds since 1970; 0 if the file system does not report it."""
    value = next((info[name] for name in TIMES if info.get(name) is not None), 0.0)
    return value.timestamp() if isinstance(value, datetime.datetime) else float(value)


def advice(error: Exception) -> str:
    """Return advice for an exception of a file system."""
    if is_full(error):
        return "This machine has no room for the copy: `cropi artifacts gc --cache --keep-gb 0` makes some"
    if isinstance(error, PermissionError):
        return "The credentials must be valid, and allowed to list, read, write and delete there"
    if isinstance(error, FileNotFoundError):
        return "Make the bucket first, or correct its name"
    if "Credential" in type(error).__name__:
        return "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return (
        "Check that the server answers there (AWS_ENDPOINT_URL, the network); complete files are kept; run the same "
        "command again to resume"
    )


def side_by_side(function: Callable[[T], Any], items: Iterable[T], at_once: int = AT_ONCE) -> None:
    """Call a function for every item in threads; raise the first error after the running calls have ended."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
