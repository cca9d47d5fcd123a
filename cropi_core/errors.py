"""Exceptions of the package. A message states what failed, the values, the reason, and what to do next.

Every error that a user can cause is a :class:`CropiError`. Each subclass also derives from the builtin exception that a
caller would expect, so ``except ValueError`` works in a notebook. The command line maps them to exit codes: 2 for a
wrong command or configuration, 1 for a failure of the work itself.
"""

import contextlib
from collections.abc import Callable, Iterator

from pydantic import ValidationError

LIBRARIES = (
    *(
        "botocore",
        "datasets",
        "fsspec",
        "huggingface_hub",
        "jinja2",
        "json",
        "pyarrow",
        "s3fs",
        "safetensors",
    ),
    *("safetensors_rust", "tokenizers", "tomllib", "transformers", "yaml", "zarr"),
)
"""Packages that raise their own exception types for the content of a file or the answer of a server."""
MOST_REASON = 400
"""Characters of a library's message that are shown; some list every class they know."""


class CropiError(Exception):
    """Base class of every error that cropi raises on purpose."""

    exit_code = 1


class ConfigError(CropiError, ValueError):
    """The configuration or the command is wrong; nothing was run."""

    exit_code = 2


class DataError(CropiError, ValueError):
    """An input table, file or dataset does not match its format."""


class PolicyError(CropiError, ValueError):
    """A checkpoint is missing, has an unsupported format, or cannot be used."""


class ArtifactError(CropiError, RuntimeError):
    """A stored artifact is missing, damaged or has an unknown schema version."""


class ProjectionError(CropiError, ArithmeticError):
    """The projection's self-test failed, or a parameter is outside the supported range."""


class SelectionError(CropiError, ValueError):
    """A subset cannot be chosen from these scores."""


class DeclinedError(CropiError, RuntimeError):
    """A reviewer declined a selection; nothing was trained on it."""


class WaitingError(CropiError, RuntimeError):
    """A run is suspended until a reviewer has answered; it resumes from there."""


class StepError(CropiError, RuntimeError):
    """A step failed in its own process; contains the last output of that process."""


class ServerError(CropiError, RuntimeError):
    """A sampling server failed, serves another model, or returned an unusable response; names the server and fault."""


@contextlib.contextmanager
def foreign_errors(
    what: object, kind: type[CropiError] = DataError, remedy: str | Callable[[Exception], str] = ""
) -> Iterator[None]:
    """Turn any exception of the block, in which a library reads an untrusted file, into an error of cropi.

    Libraries raise exceptions of many classes for a damaged file: pyarrow alone ``ArrowInvalid``, ``OSError``,
    ``ValueError`` and ``UnicodeDecodeError``. All of them mean that the file cannot be used.

    Args:
        what: The file and what was tried: ``pool.parquet cannot be read as Parquet``.
        kind: Class of the error.
        remedy: What the user can do, if that is known; a function, where it depends on the exception.

    Raises:
        CropiError: Of the class ``kind``; one that the block raises passes unchanged.
    """
    try:
        yield
    except CropiError:
        raise
    except Exception as error:
        advice = remedy(error) if callable(remedy) else remedy
        raise kind(f"{what}: {reason(error)}{'. ' if advice else ''}{advice}") from error


@contextlib.contextmanager
def recorded_errors(what: object, record: Callable[[str], object]) -> Iterator[None]:
    """Record any exception of the block, in which a library reads an untrusted file, and continue after the block.

    Args:
        what: The file and what was tried.
        record: Receives the message.
    """
    try:
        with foreign_errors(what):
            yield
    except CropiError as error:
        record(str(error))


def reason(error: BaseException) -> str:
    """Return the message of a library's exception, with its class where the message alone says nothing."""
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())[:MOST_REASON]
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"the field {text} is missing"
    explained = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    explained |= type(error).__module__.startswith("yaml.")
    named = explained and len(text) > 10
    return text if named else f"{type(error).__name__}: {text}" if text else type(error).__name__


def outer_error(error: Exception) -> str | None:
    """Describe an exception that reached the command line although it comes from a file, the disk or a library.

    Returns:
        One line, or None for a fault of cropi itself, whose traceback is wanted.
    """
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, MemoryError):
        return "memory ran out; lower the sizes in the section runtime, or use a machine with more memory"
    if isinstance(error, OSError | UnicodeError | RecursionError) or package in LIBRARIES:
        return (
            f"{type(error).__name__}: {reason(error)}. Check the file or address that the command was given"
        )
    return None


def in_one_line(error: ValidationError) -> str:
    """Format the faults that Pydantic found as ``field.field: what is wrong``, without its links and hints."""
    faults = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
    return "; ".join(f"{field}: {text}" if field else text for field, text in faults)
