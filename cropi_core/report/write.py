"""Write the report of a run, or the page of two, to a file; the packages of the extra `report` are imported here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cropi_core.artifacts import Store, write_atomic
from cropi_core.errors import ConfigError
from cropi_core.runs import load_run


class MissingExtraError(ConfigError, ImportError):
    """A package of the extra `report` is not installed."""


def write_report(store: Store, run: str, out: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        store: Store with the run's record and artifacts; it is only read.
        run: Id of the run.
        out: File to write; default ``<root>/runs/<run>.html``. It is written atomically.

    Returns:
        The file written.

    Raises:
        ArtifactError: The run does not exist, or its record cannot be read.
        ConfigError: A package of the extra `report` is missing.
    """
    record = load_run(store, run)
    with _packages("a report"):
        from cropi_core.report.page import render
    page = render(store, record)
    if out is None:
        return store.write(f"runs/{record.run}.html", page)
    write_atomic(out, page)
    return out


def write_comparison(store: Store, one: str, other: str, out: Path) -> Path:
    """Write the page of two runs.

    Args:
        store: Store with the records and artifacts of both; it is only read.
        one: Id of the first run.
        other: Id of the second run.
        out: File to write, atomically.

    Returns:
        The file written.

    Raises:
        ArtifactError: A run does not exist, or its record cannot be read.
        ConfigError: A package of the extra `report` is missing.
    """
    with _packages("the page of two runs"):
        from cropi_core.report.compared import render_comparison
    write_atomic(out, render_comparison(store, one, other))
    return out


@contextmanager
def _packages(what: str) -> Iterator[None]:
    """Replace the error of a missing package of the extra `report` by one that says what to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        text = f'{what} needs {error.name}, which is not installed: pip install "cropi[report]"'
        missing = MissingExtraError(text)
        missing.name = error.name
        raise missing from error
