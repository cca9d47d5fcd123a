"""Source files of the user's reward functions. This module does not execute them.

A function is named in the configuration, never in data: ``package.module:function``, importable where the steps run,
or ``path/to/file.py:function``. The text of that file identifies the function: its digest is in the keys of what it
graded, and a verifier's process refuses to grade with a different text
(:func:`cropi_core.rewards.worker.load_function`).
"""

import hashlib
import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path

from cropi_core.errors import ConfigError, foreign_errors
from cropi_core.rewards.worker import SUFFIX

ALLOWED = "CROPI_FUNCTIONS"
"""Environment variable: directories, separated as in `PATH`, that functions may come from; `*` allows all.

If it is unset, everything is allowed: a user of the command line may execute any code. For a run submitted through a
server it is always set, to an empty list unless the operator configures it (docs/guides/security.md).
"""
ANYWHERE = "*"


def check_allowed(path: str, file: Path) -> None:
    """Check that this machine's operator allows functions from this file, with links resolved.

    Raises:
        ConfigError: The operator does not allow it.
    """
    allowed = os.environ.get(ALLOWED)
    if allowed is None:
        return
    places = [place for place in allowed.split(os.pathsep) if place]
    real = file.resolve()
    if ANYWHERE in places or any(real.is_relative_to(Path(p).expanduser().resolve()) for p in places):
        return
    raise ConfigError(
        f"{path}: {real} lies in no directory that this machine takes functions from ({ALLOWED} is {allowed!r}). The "
        "operator of the server or worker sets it; a run cannot"
    )


def source_digest(path: str) -> str:
    """Return the sha256 of a function's source file, without executing the file.

    Raises:
        ConfigError: The file or module does not exist, it has no source, or the operator does not allow it.
    """
    place, _, function = path.rpartition(":")
    if not place or not function:
        raise ConfigError(
            f"{path!r} names no function; write package.module:function or path/to/file.py:function"
        )
    file = Path(place).expanduser() if place.endswith(SUFFIX) else _module_file(place)
    check_allowed(path, file)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path}: {file} cannot be read ({error.strerror}); relative paths are taken from {Path.cwd()}"
        ) from error


def _module_file(name: str) -> Path:
    """Find a module's file as an import would, without importing its parent packages."""
    parts = name.split(".")
    with foreign_errors(f"the module {name!r} cannot be looked for", ConfigError):
        spec = importlib.util.find_spec(parts[0])
        for part in parts[1:]:
            places = spec.submodule_search_locations if spec else None
            # By its last name: the spec of a namespace package looks for its parent in the imported modules.
            spec = PathFinder.find_spec(part, list(places)) if places else None
    if spec is None:
        raise ConfigError(
            f"there is no module {name!r} where this program runs; install it, put its directory into PYTHONPATH, or "
            "name a file: path/to/file.py:function"
        )
    if spec.origin is None or not spec.origin.endswith(SUFFIX):
        raise ConfigError(f"the module {name!r} has no Python source ({spec.origin}): its content has no key")
    return Path(spec.origin)
