"""Mapping of foreign table rows to prompts: choice of columns, nested columns, prompts that are conversations.

    mapper = Mapper(source, source.columns, chosen, faults)
    mapper.add(batch.rows())
    mapped = mapper.finish()

All faults of a table are reported together, each with its first few rows. No row is repaired, and none is dropped
unless the source's settings request it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cropi_core.artifacts import Faults, printable
from cropi_core.prompts.rows import Row, asked_text, check_unique, normalise, surrogate_fault, text_fault
from cropi_core.prompts.values import Turns, cast_answer, cast_text, extract_answer, turns_of
from data_schemas import ALTERNATIVE, Columns, TableSource


def cell(row: Row, name: str) -> Any:
    """Return a row's value for a column name or for a path into a nested column; None if it does not exist."""
    if name in row:  # a flattened table may have a column called `reward_model.ground_truth`
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def has_cell(row: Row, name: str) -> bool:
    """Return whether a row has a column of this name, or a nested field at this path."""
    head, _, field = name.rpartition(".")
    above = cell(row, head) if head else None
    return name in row or (isinstance(above, dict) and field in above)


def schema_has(schema: pa.Schema, name: str) -> bool:
    """Return whether an Arrow schema has a column of this name, or a nested field at this path."""
    if name in schema.names:
        return True
    head, *parts = name.split(".")
    kind = schema.field(head).type if head in schema.names else None
    for part in parts:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return bool(parts)


def schema_names(schema: pa.Schema) -> list[str]:
    """List an Arrow schema's columns, nested ones with their fields."""
    nested = [
        f"{field.name}.{field.type.field(i).name}"
        for field in schema
        if pa.types.is_struct(field.type)
        for i in range(field.type.num_fields)
    ]
    return sorted([*schema.names, *nested])[:100]


def chosen_columns(
    present: Callable[[str], bool], names: list[str], columns: Columns, what: str
) -> dict[str, str]:
    """Choose for each role the first alternative that the table has; unset columns are omitted.

    Args:
        present: Returns whether the table has a column, or a path into a nested one.
        names: Existing column names, for messages.
        columns: Requested columns.
        what: Name of the table, for messages.

    Raises:
        DataError: Columns are missing; the message lists all of them and the existing ones.
    """
    faults, chosen = Faults(what), {}
    for role, given in columns.model_dump(exclude={"tags"}).items():
        wanted = (given,) if isinstance(given, str) else given or ()
        existing = [name for name in wanted if present(name)]
        if existing:
            chosen[role] = existing[0]
        elif wanted:
            text = " or ".join(map(repr, wanted))
            similar = [name for name in names if name.strip().lower() in {each.lower() for each in wanted}]
            hint = f"; set columns.{role} to {similar[0]!r}" if similar else ""
            faults.add(f"column {text} (columns.{role}) is missing; there are {', '.join(names)}{hint}")
    faults.check()
    return chosen


def row_names(rows: Sequence[Row]) -> list[str]:
    """List a table's columns, and the fields of nested ones."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            names.setdefault(name)
            if isinstance(value, dict) and len(names) < 100:
                names.update(dict.fromkeys(f"{name}.{field}" for field in value))
    return sorted(names)


@dataclass
class Mapped:
    """Result of mapping a table's rows.

    Attributes:
        prompts: Prompts, each paired with the normalised text that identifies it.
        unanswered: Number of rows dropped because they have no answer.
        several_boxes: Number of answers from a text with several boxes; the last box was used.
        duplicates: Number of rows dropped because an earlier row has the same prompt.
        conflicting: Number of duplicates with a different answer.
    """

    prompts: list[tuple[str, Row]]
    unanswered: int = 0
    several_boxes: int = 0
    duplicates: int = 0
    conflicting: int = 0


class Mapper:
    """Maps foreign rows to prompts, batch by batch.

    Integers become their decimal text. Floats are refused unless a cast defines their form, since 18.0 could mean 18
    or 18.0. A prompt that is a list of messages keeps its turns; one with a single user turn is the same prompt as its
    text alone. If ids are derived from the prompts, a repeated prompt is counted and left out.

    Args:
        source: How to read the rows.
        columns: The source's columns.
        chosen: Role to column name; see :func:`chosen_columns`.
        faults: Collects rows that violate the format.
    """

    def __init__(self, source: TableSource, columns: Columns, chosen: dict[str, str], faults: Faults) -> None:
        self.source, self.columns, self.chosen, self.faults = source, columns, chosen, faults
        self.origin = source.source or (_slug(source.path) if source.kind == "hub" else "file")
        self.made_ids = "prompt_id" not in chosen
        self.result = Mapped([])
        self._answers: dict[str, str] = {}  # answers of the prompts so far, by content

    def add(self, rows: Iterable[tuple[int | str, int, Row]]) -> None:
        """Map rows, each given with its place and its number of occurrences."""
        result = self.result
        for place, count, original in rows:
            row = {role: cell(original, name) for role, name in self.chosen.items()}
            answer, fault, several = self._answer(row["answer"])
            if fault and self.source.unanswered == "drop" and isinstance(row["answer"], str | None):
                result.unanswered += count
                continue
            turns, misread = turns_of(row["prompt"], self.chosen["prompt"])
            texts, wrong = self._texts(row)
            wrong = [text for text in (fault, misread, *wrong) if text]
            for text in wrong[:1] if self.faults.drop else wrong:
                self.faults.add(text, place, count)
            if wrong:
                continue
            result.several_boxes += count if several else 0
            content = _content(turns)
            if self.made_ids:
                earlier = self._answers.get(content)
                result.duplicates += count - (earlier is None)
                if earlier is not None:
                    result.conflicting += count if earlier != answer else 0
                    continue
                self._answers[content] = answer
            result.prompts.append((content, self._prompt(original, turns, answer, texts, content)))

    def _answer(self, value: Any) -> tuple[str, str, bool]:
        """Return the answer, its fault, and whether it comes from a text with several boxes."""
        text, fault = cast_answer(value, self.chosen["answer"], self.source.casts)
        if fault:
            return "", fault, False
        if ALTERNATIVE not in text:
            return extract_answer(text, self.chosen["answer"], self.source.answer_pattern)
        if not isinstance(value, list):
            return "", f"{self.chosen['answer']} holds the control character U+001E", False
        pattern = self.source.answer_pattern
        answers = [extract_answer(one, self.chosen["answer"], pattern) for one in text.split(ALTERNATIVE)]
        wrong = next((fault for _, fault, _ in answers if fault), "")
        return (
            ALTERNATIVE.join(answer for answer, _, _ in answers),
            wrong,
            any(several for _, _, several in answers),
        )

    def _texts(self, row: Row) -> tuple[dict[str, Any], list[str]]:
        """Return id, source and level of a row, and their faults."""
        casts, texts, wrong = self.source.casts, {}, []
        for role in ("prompt_id", "source", "level"):
            if role not in self.chosen:
                continue
            cast = getattr(casts, role, None) if casts else None
            texts[role], fault = cast_text(row[role], self.chosen[role], cast)
            if not fault and (role != "level" or texts[role] is not None):
                fault = text_fault(texts[role], self.chosen[role]) if role != "level" else ""
                fault = fault or surrogate_fault(texts[role], self.chosen[role])
            wrong.append(fault)
        return texts, wrong

    def _prompt(self, original: Row, turns: Turns, answer: str, texts: dict[str, Any], content: str) -> Row:
        named = "source" in texts and self.source.source is None
        return {
            "prompt_id": texts.get("prompt_id") or hashlib.sha256(content.encode()).hexdigest()[:16],
            "source": texts["source"] if named else self.origin,
            "messages": _worded(turns, self.source),
            "answer": answer,
            "verifier": self.source.verifier,
            "level": texts.get("level"),
            "tags": [printable(tag) for tag in _tags(original, self.columns.tags)],
        }

    def finish(self) -> Mapped:
        """Check ids and faults, and return the result.

        Raises:
            DataError: Rows violate the format, or ids are not unique.
        """
        if not self.made_ids:
            check_unique([prompt for _, prompt in self.result.prompts], "prompt_id", self.faults)
        self.faults.check()
        return self.result


def _content(turns: Turns) -> str:
    """Return the normalised text by which two prompts are compared."""
    questions = [turn for turn in turns if turn["role"] != "system"]
    if len(questions) == 1:
        return normalise(questions[0]["content"])
    return asked_text({"messages": turns})


def _worded(turns: Turns, source: TableSource) -> Turns:
    """Apply the source's template to the last turn, and put its system message before the first."""
    if source.system is not None:
        turns = [
            {"role": "system", "content": source.system},
            *[turn for turn in turns if turn["role"] != "system"],
        ]
    # replace and not format: prompts and templates in mathematics contain many braces
    last = source.template.replace("{prompt}", turns[-1]["content"])
    return [*turns[:-1], {"role": turns[-1]["role"], "content": last}]


def _tags(row: Row, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (value := cell(row, name)) is not None:
            yield f"{name.rpartition('.')[2]}={value}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower().rstrip("/").rsplit("/", 1)[-1]).strip("_")[:40] or "hub"
