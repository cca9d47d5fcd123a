"""Notes that a person attaches to runs: one line of text a run, in a file of its own below ``runs``.

The record of a run is rewritten by the process that executes it; a note is not part of it, so that both can be written
at any time.
"""

from cropi_core.artifacts import Store
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.runs.records import load_run
from cropi_core.visible import visible

LONGEST = 500
"""Characters of a note, at most."""


def write_note(store: Store, run: str, text: str) -> str:
    """Attach a note to a run, in place of an earlier one; an empty text removes it. Returns the note.

    Raises:
        ArtifactError: There is no such run.
        ConfigError: The text is too long, or has control characters or line breaks.
    """
    load_run(store, run)
    note = text.strip()
    if len(note) > LONGEST:
        raise ConfigError(f"the note has {len(note)} characters, {LONGEST} are allowed; shorten it")
    if (safe := visible(note, lines=False)) != note:
        at = next(place for place, sign in enumerate(note) if visible(sign, lines=False) != sign)
        raise ConfigError(
            f"the note has a control character or a line break (U+{ord(note[at]):04X} at character {at + 1}: "
            f"{safe[:60]}); write one line of printable text"
        )
    if note:
        store.write(_name(run), note)
    else:
        store.remove(_name(run))
    return note


def read_note(store: Store, run: str) -> str:
    """Return the note of a run, empty if it has none; text from an untrusted root is cut and made printable."""
    try:
        text = store.read(_name(run)) or ""
    except ArtifactError as error:
        text = f"(the note cannot be read: {error})"
    return visible(text[:LONGEST].strip(), lines=False)


def _name(run: str) -> str:
    return f"runs/{run}.note"
