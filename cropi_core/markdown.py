"""Write Markdown from untrusted text: escaping, code, tables."""

import html
import re
from collections.abc import Sequence

from cropi_core.visible import visible

LONGEST = 2000
"""Characters of one text that are shown; a line of 10 MB would be a page of 30 MB."""


def escaped(text: str) -> str:
    """Escape a text so that it is no markup, no HTML and no end of a cell; cut it, show its control characters."""
    text = html.escape(_one_line(text), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def code(text: str) -> str:
    """Write a path or a key as code; browsers block links to files."""
    return "`" + cell(_one_line(text.replace("`", "'"))) + "`"


def _one_line(text: str) -> str:
    """Cut a text, put it on one line, and make its control characters visible."""
    shown = visible(" ".join(text[:LONGEST].split()), lines=False)
    return shown if len(text) <= LONGEST else f"{shown} … ({len(text):,} characters)"


def cell(text: str) -> str:
    """Escape the pipes of a text that is otherwise trusted, so that it cannot end its table cell."""
    return text.replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = 50) -> str:
    """Write a Markdown table of at most ``most`` rows; cells must be escaped by the caller."""
    shown = rows[:most]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in shown]
    if len(rows) > len(shown):
        lines.append(f"\n… and {len(rows) - len(shown)} more")
    return "\n".join(lines)


def wide_table(header: Sequence[str], rows: Sequence[Sequence[str]], fixed: int = 1, widest: int = 8) -> str:
    """Write a table as one or several of at most ``widest`` columns each; a page cuts wider ones off.

    Args:
        header: Names of the columns.
        rows: Rows; cells must be escaped by the caller.
        fixed: Number of first columns that every part repeats.
        widest: Most columns of a part.
    """
    if len(header) <= widest:
        return markdown_table(header, rows)
    step = widest - fixed
    parts = []
    for begin in range(fixed, len(header), step):
        chosen = [*range(fixed), *range(begin, min(begin + step, len(header)))]
        parts.append(markdown_table([header[i] for i in chosen], [[row[i] for i in chosen] for row in rows]))
    return "\n\n".join(parts)
