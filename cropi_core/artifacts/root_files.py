"""Small files of a root outside of artifacts: run records, tags, reports. The last of several writers wins."""

import contextlib
import json
import os
from pathlib import Path

from cropi_core.artifacts.below import checked_name, directory_below, read_below, write_below
from cropi_core.artifacts.keys import MOST_BYTES, parse_json
from cropi_core.artifacts.remote_store import Remote
from cropi_core.errors import ArtifactError


class RootFiles:
    """The small files of one root.

    Args:
        root: The directory; for an address, its cache.
        remote: The store shared with other machines; None for a directory.
        url: Name of the root, for messages.
    """

    def __init__(self, root: Path, remote: Remote | None, url: str) -> None:
        self.root, self.remote, self.url = root, remote, url

    def read(self, name: str) -> str | None:
        """Read a small file of the root; return None if it does not exist."""
        checked_name(name)
        if self.remote and not self.remote.fetch(name):
            return None
        try:
            return read_below(self.root, name, MOST_BYTES).decode("utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.url}/{name} is not UTF-8: {error}") from error

    def write(self, name: str, text: str) -> Path:
        """Write a small file of the root atomically, and return its local path."""
        path = write_below(self.root, name, text)
        if self.remote:
            self.remote.write(name, text)
        return path

    def remove(self, name: str) -> None:
        """Remove a small file of the root; a missing file is not an error."""
        path = checked_name(name)
        with contextlib.suppress(FileNotFoundError), directory_below(self.root, str(path.parent)) as handle:
            os.unlink(path.name, dir_fd=handle)
        if self.remote:
            self.remote.objects.remove(name)

    def names(self, directory: str) -> list[str]:
        """List the files of one of the root's directories, oldest first, without files that are being written."""
        if self.remote:
            return self.remote.names(directory)
        times: dict[str, int] = {}
        with (
            contextlib.suppress(FileNotFoundError),
            directory_below(self.root, directory) as handle,
            os.scandir(handle) as listing,
        ):
            for entry in listing:
                if entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # replaced in the meantime
                        times[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
        return sorted(times, key=lambda name: (times[name], name))

    def tags(self) -> dict[str, str]:
        """Return the key of each tag."""
        if not (text := self.read("tags.json")):
            return {}
        try:
            tags = parse_json(text)
        except ValueError as error:
            tags = error
        if not isinstance(tags, dict) or not all(isinstance(key, str) for key in tags.values()):
            raise ArtifactError(
                f"{self.url}/tags.json is not a JSON object of names and keys ({str(tags)[:80]}); move it away"
            )
        return tags

    def tag(self, name: str, key: str) -> None:
        """Tag an artifact; an existing tag is moved."""
        self.write("tags.json", json.dumps(self.tags() | {name: key}, indent=1, sort_keys=True))

    def untag(self, name: str) -> str:
        """Remove a tag, and return the key that it named.

        Raises:
            ArtifactError: There is no such tag.
        """
        tags = self.tags()
        if name not in tags:
            raise ArtifactError(
                f"no tag {name!r} under {self.url}; there are: {', '.join(sorted(tags)) or 'none'}"
            )
        key = tags.pop(name)
        self.write("tags.json", json.dumps(tags, indent=1, sort_keys=True))
        return key
