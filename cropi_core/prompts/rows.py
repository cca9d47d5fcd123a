"""Checks of prompt rows in cropi's format and of the settings that make them, and the comparison of prompts.

All faults of a table are reported together, each with its first few rows; no row is repaired or left out.
"""

import json
import re
import unicodedata
from collections import Counter
from typing import Any

from cropi_core.artifacts import Faults
from cropi_core.errors import ConfigError, foreign_errors
from data_schemas import PROMPTS, VERIFIERS, TableSource

VERIFIER_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")
"""Syntax of a verifier name; :func:`cropi_core.prompts.loading.check_verifiers` checks that it exists."""
ROLES = ("system", "user", "assistant")
BOXED = "boxed"
"""Reserved ``answer_pattern``, not a regular expression: one that matches nested braces took 32 s for 21 kB of them."""
Row = dict[str, Any]


def check_settings(source: TableSource) -> None:
    """Refuse settings that cannot be met or would be ignored."""
    if "{prompt}" not in source.template:
        raise ConfigError(
            f"template={source.template!r} has no {{prompt}}: every prompt would be the same text"
        )
    if source.answer_pattern not in (None, BOXED):
        import regex

        with foreign_errors(
            f"answer_pattern={source.answer_pattern!r} is not a regular expression", ConfigError
        ):
            groups = regex.compile(source.answer_pattern).groups
        if groups < 1:
            raise ConfigError(
                f"answer_pattern={source.answer_pattern!r} has no group; group 1 is the answer (or it is {BOXED!r})"
            )
    if source.columns is None:
        idle = [n for n in ("answer_pattern", "system", "source") if getattr(source, n) is not None]
        idle += ["template"] if source.template != "{prompt}" else []
        idle += ["unanswered"] if source.unanswered != "refuse" else []
        idle += ["casts"] if source.casts is not None else []
        if idle:
            raise ConfigError(
                f"{', '.join(idle)} without columns: a table in the prompts format is used unchanged"
            )


def normalise(text: str) -> str:
    """Normalise a text for comparing prompts: canonical Unicode, single spaces.

    Case and compatibility forms are kept: `x²` is not `x2`, and in string tasks `A` is not `a`.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def asked_text(row: Row) -> str:
    """Join all turns except the system turn, which would hide that two sets have the same question."""
    turns = [[m["role"], normalise(m["content"])] for m in row["messages"] if m["role"] != "system"]
    return json.dumps(turns, ensure_ascii=False)


def checked_rows(rows: list[Row], what: str, faults: Faults | None = None) -> list[Row]:
    """Check rows of the ``prompts`` format; ``level`` and ``tags`` may be omitted.

    Args:
        rows: The rows.
        what: Name of the table, for messages.
        faults: Collects faults, and is checked; if it drops invalid rows, the result omits them.
    """
    faults = Faults(what) if faults is None else faults
    required = ("prompt_id", "source", "messages", "answer", "verifier")
    present = set().union(*rows)
    for name in required:
        if name not in present:
            faults.add(
                f"column {name!r} is missing; there are {', '.join(sorted(present))} (or set `columns`)"
            )
    for name in sorted(present - set(PROMPTS.names)):
        faults.add(f"column {name!r} is not of the prompts format (or set `columns`)")
    checked = []
    for number, row in enumerate(rows, 1):
        wrong = _row_faults(row, present)
        for fault in wrong[:1] if faults.drop else wrong:
            faults.add(fault, number)
        if not wrong or not faults.drop:
            checked.append({**row, "level": row.get("level"), "tags": row.get("tags") or []})
    check_unique(checked, "prompt_id", faults)
    faults.check()
    return checked


def _row_faults(row: Row, present: set[str]) -> list[str]:
    """Return the faults of a row in cropi's format; missing columns are faults of the table, not of the row."""
    named = [name for name in ("prompt_id", "source", "answer", "verifier") if name in present]
    wrong = [fault for name in named if (fault := text_fault(row.get(name), name))]
    if isinstance(verifier := row.get("verifier"), str) and not VERIFIER_NAME.fullmatch(verifier):
        wrong.append(f"verifier {verifier[:60]!r} is not a name; built in are {', '.join(VERIFIERS)}")
    if "messages" in present and (fault := messages_fault(row.get("messages"))):
        wrong.append(fault)
    if not isinstance(row.get("level"), str | None):
        wrong.append("level is neither a string nor null")
    tags = row.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append("tags is not a list of strings")
    texts = [row.get("level"), *tags] if isinstance(tags, list) else []
    if not wrong and any(isinstance(text, str) and surrogate_fault(text, "") for text in texts):
        wrong.append("level or tags hold half of a surrogate pair, which is not text")
    return wrong


def messages_fault(messages: Any) -> str | None:
    """Return why a prompt's messages are invalid, or None."""
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of {role, content}, or is empty"
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return "messages holds something that is not {role, content}"
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            return f"messages has the role {str(message['role'])[:40]!r}; roles are {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"messages has content that is {type_name(message['content'])}, not a string"
        if fault := surrogate_fault(message["content"], "content"):
            return fault
    if messages[-1]["role"] == "assistant" or not messages[-1]["content"].strip():
        return "messages ends with an assistant's turn or an empty one"
    return None


def text_fault(value: Any, name: str) -> str:
    """Return why a value is not a valid text, or an empty string."""
    if value is None:
        return f"{name} is null"
    if not isinstance(value, str):
        return f"{name} is {type_name(value)}, not a string"
    return surrogate_fault(value, name) if value.strip() else f"{name} is empty"


def surrogate_fault(text: str, name: str) -> str:
    """Return a message if a text has an unpaired surrogate, which cannot be written, otherwise an empty string."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair (\\ud800 to \\udfff alone), which is not text"
    return ""


def type_name(value: Any) -> str:
    """Return the name of a value's type, for messages."""
    return "NaN" if isinstance(value, float) and value != value else type(value).__name__


def check_unique(rows: list[Row], name: str, faults: Faults) -> None:
    """Record values that occur more than once in a column of ids."""
    counts = Counter(str(row[name]) for row in rows if row.get(name) is not None)
    twice = [value for value, count in counts.items() if count > 1]
    if twice:
        shown = ", ".join(twice[:5]) + (f", … {len(twice)} in all" if len(twice) > 5 else "")
        faults.add(f"{name} is not unique: {shown}")
