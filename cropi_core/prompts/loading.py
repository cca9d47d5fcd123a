"""Loading of prompts from a source (embedded world, file, hub dataset) into one table; disjointness checks.

    source = TableSource(kind="file", path="gsm8k.jsonl", columns=Columns())
    table, dropped = load_source(source, "pool", None)
    write_prompts(table, Path("prompts.parquet"))

An invalid table is refused completely; one error lists every fault with its rows. Only duplicates of rows without an
id in the file are dropped, and these are counted.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.artifacts import (
    BATCH,
    Batch,
    Faults,
    arrow_batch,
    check_field_names,
    read_batches,
    read_parquet,
    table_files,
    table_format,
    write_parquet,
)
from cropi_core.errors import ConfigError, DataError, foreign_errors
from cropi_core.prompts.decontamination import overlaps, summary_of
from cropi_core.prompts.mapping import Mapper, chosen_columns, has_cell, row_names, schema_has, schema_names
from cropi_core.prompts.rows import Row, asked_text, check_settings, checked_rows
from data_schemas import PROMPTS, Columns, ReasoningGymSource, TableSource, WorldSource


def load_source(
    source: WorldSource | TableSource | ReasoningGymSource, split: str, path: str | None
) -> tuple[pa.Table, dict[str, int]]:
    """Read or generate a set of prompts.

    Args:
        source: Source of the prompts, and its settings.
        split: ``pool``, ``validation`` or ``test``; the embedded world generates disjoint tasks for each.
        path: Path of a file source; default ``source.path``, relative to the current directory.

    Returns:
        The table (``data_schemas.tables.PROMPTS``), and the number of dropped rows by reason.

    Raises:
        ConfigError: The source's settings cannot be met: a limit greater than the number of rows, a template without
            ``{prompt}``, a file with an unknown suffix.
        DataError: Rows violate the format, or there are none.
    """
    if isinstance(source, WorldSource):
        from cropi_core.world import build  # imported late: only generation needs it, reading does not

        table = build(source.families, split, source.seed)
        if source.verifier != "exact":
            place = table.schema.get_field_index("verifier")
            named = pa.array([source.verifier] * table.num_rows, pa.string())
            table = table.set_column(place, table.schema.field(place), named)
        return table, {}
    if isinstance(source, ReasoningGymSource):
        from cropi_core.prompts import reasoning_gym as gym_tasks

        return gym_tasks.build(source, split)
    check_settings(source)
    if source.columns is None:
        drawn, dropped, title = _native_rows(source, path)
    else:
        drawn, dropped, title = _mapped(source, source.columns, path)
    kept = _draw(drawn, source, title)
    return pa.Table.from_pylist(kept, schema=PROMPTS), dropped


Drawn = list[tuple[str, Row]]
"""Prompts, each with the normalised text that identifies it."""


def _native_rows(source: TableSource, path: str | None) -> tuple[Drawn, dict[str, int], str]:
    """Read a table in the prompts format."""
    title = f"{source.path} ({source.split})" if source.kind == "hub" else str(Path(path or source.path))
    faults = Faults(title, drop=source.on_bad_rows == "drop")
    rows = [row for batch in _batches(source, path, None, faults) for row in batch.values]
    faults.check()
    if not rows:
        raise DataError(f"{title} holds no rows{_fault_lines(faults)}")
    checked = checked_rows(rows, title, faults)
    if not checked:
        raise DataError(f"{title} holds no usable row{_fault_lines(faults)}")
    return [(asked_text(row), row) for row in checked], faults.dropped(), title


def _mapped(source: TableSource, columns: Columns, path: str | None) -> tuple[Drawn, dict[str, int], str]:
    """Read a foreign table, batch by batch; memory holds only distinct prompts, even of a million repetitive rows."""
    title = f"{source.path} ({source.split})" if source.kind == "hub" else str(Path(path or source.path))
    faults = Faults(title, drop=source.on_bad_rows == "drop")
    once = columns.prompt_id is None
    wanted = columns.model_dump(exclude={"tags"}).values()
    used = [
        one for name in wanted if name is not None for one in ((name,) if isinstance(name, str) else name)
    ]
    names, same = [*used, *columns.tags], used if once else None
    mapper: Mapper | None = None
    for batch in _batches(source, path, names, faults, same):
        if mapper is None:
            chosen = _chosen(source, path, columns, batch, title)
            mapper = Mapper(source, columns, chosen, faults)
        mapper.add(batch.rows())
    if mapper is None:
        faults.check()
        raise DataError(f"{title} holds no rows{_fault_lines(faults)}")
    mapped = mapper.finish()
    dropped = faults.dropped()
    if once:
        dropped |= {"duplicates": mapped.duplicates, "duplicates_with_another_answer": mapped.conflicting}
    if source.unanswered == "drop":
        dropped["unanswered"] = mapped.unanswered
    if mapped.several_boxes:
        # not dropped: the last box is the answer, as in the datasets' own scripts; the count informs the user
        dropped["kept_with_the_last_of_several_boxes"] = mapped.several_boxes
    if not mapped.prompts:
        raise DataError(f"{title} holds no row with an answer{_fault_lines(faults)}")
    return mapped.prompts, dropped, title


def _fault_lines(faults: Faults) -> str:
    """Describe the dropped rows if no row is left."""
    return ":\n  " + "\n  ".join(faults.lines()) if faults else ""


def _batches(
    source: TableSource,
    path: str | None,
    columns: list[str] | None,
    faults: Faults,
    same: list[str] | None = None,
) -> Iterator[Batch]:
    """Read a source's rows; see :func:`cropi_core.artifacts.table_files.read_batches`."""
    if source.kind == "file":
        yield from read_batches(Path(path or source.path).expanduser(), columns, faults, same)
        return
    start = 0
    for rows in _hub_table(source).to_batches(BATCH):
        yield arrow_batch(rows, start, "", faults, same)
        start += rows.num_rows


def _chosen(
    source: TableSource, path: str | None, columns: Columns, batch: Batch, title: str
) -> dict[str, str]:
    """Choose the columns: for Parquet from the schema, for text files and hub datasets from the first batch of rows."""
    if source.kind == "file":
        first = table_files(Path(path or source.path).expanduser())[0]
        if table_format(first) == "parquet":
            with foreign_errors(f"{first} cannot be read as Parquet"):
                schema = pq.read_schema(first)
            return chosen_columns(lambda name: schema_has(schema, name), schema_names(schema), columns, title)
    present = lambda name: any(has_cell(row, name) for row in batch.values)  # noqa: E731
    return chosen_columns(present, row_names(batch.values), columns, title)


def _hub_table(source: TableSource) -> pa.Table:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source.path}: hub datasets need the package `datasets`: pip install 'cropi[train]'"
        ) from error
    with foreign_errors(
        f"hub dataset {source.path!r} (subset {source.subset}, split {source.split}) cannot be loaded",
        remedy="Offline, export it to Parquet elsewhere and use kind: file",
    ):
        data = datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
        table: pa.Table = data.with_format("arrow")[:]  # pyright: ignore[reportAttributeAccessIssue]
    check_field_names(table.schema, source.path)
    return table


def _draw(drawn: list[tuple[str, Row]], source: TableSource, title: str) -> list[Row]:
    """Take ``limit`` rows after ``skip``, in an order that depends only on the seed and each row's content."""
    if source.limit is None and source.skip == 0:
        return [row for _, row in drawn]
    if source.skip + (source.limit or 1) > len(drawn):
        raise ConfigError(
            f"{title} has {len(drawn)} prompts; skip={source.skip} and limit={source.limit} ask for more"
        )

    def place(item: tuple[str, Row]) -> tuple[bytes, str]:
        # uses the text before template and system message, so that sets with other wording are disjoint too
        return hashlib.sha256(f"{source.sample_seed}/{item[0]}".encode()).digest(), item[1]["prompt_id"]

    ordered = sorted(drawn, key=place)
    end = None if source.limit is None else source.skip + source.limit
    return [row for _, row in ordered[source.skip : end]]


def write_prompts(table: pa.Table, path: Path) -> None:
    """Write a prompts table; equal tables give equal bytes, and the file appears atomically."""
    combined = pa.Table.from_pylist(table.to_pylist(), schema=PROMPTS)  # one chunk, and only cropi's metadata
    write_parquet(combined, path, row_group_size=65536)


def read_prompts(path: Path) -> pa.Table:
    """Read a table written by :func:`write_prompts`.

    Raises:
        DataError: It is not in the prompts format, or its ids are not unique.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a prompts table")
    rows = checked_rows(read_parquet(path).to_pylist(), str(path))
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def summarise(table: pa.Table) -> dict[str, Any]:
    """Count prompts by source, level and verifier, and measure their lengths."""
    levels = Counter(level for level in table["level"].to_pylist() if level is not None)
    messages = table["messages"].to_pylist()
    lengths = sorted(sum(len(turn["content"]) for turn in turns) for turns in messages) or [0]
    return {
        "prompts": table.num_rows,
        "by_source": dict(sorted(Counter(table["source"].to_pylist()).items())),
        "by_level": dict(sorted(levels.items())),
        "by_verifier": dict(sorted(Counter(table["verifier"].to_pylist()).items())),
        "characters": {"least": lengths[0], "median": lengths[len(lengths) // 2], "most": lengths[-1]},
        "turns": max(map(len, messages), default=0),
    }


def check_verifiers(sets: dict[str, Path], known: Sequence[str]) -> frozenset[str]:
    """Refuse prompts with unknown verifiers before anything is sampled.

    Args:
        sets: As in :func:`check_disjoint`.
        known: Names of the existing verifiers.

    Returns:
        Names of the verifiers that the sets use.

    Raises:
        ConfigError: A set names unknown verifiers; the message lists every such set with these names.
    """
    faults: list[str] = []
    used: set[str] = set()
    for name, path in sets.items():
        table = read_parquet(path / "prompts.parquet" if path.is_dir() else path)
        names = set(table["verifier"].to_pylist())
        used |= names
        if strangers := sorted(names - set(known)):
            faults.append(f"{name}: verifier {', '.join(map(repr, strangers))} is none of {', '.join(known)}")
    if faults:
        raise ConfigError(
            "; ".join(faults)
            + "; define it in grading.functions, grading.http or grading.sums, or map the column"
        )
    return frozenset(used)


def decontaminated(
    table: pa.Table, others: Mapping[str, Path], settings: Mapping[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """Find prompts that overlap other sets, and apply the action in ``settings`` to them.

    Args:
        table: The set to check.
        others: Prompts tables of the sets that must be kept clean, by name.
        settings: ``ngram`` and ``action`` of ``data.decontaminate``.

    Returns:
        The table, without the overlapping prompts if the action is ``remove``, and a summary of the overlaps.

    Raises:
        DataError: The action is ``refuse`` and prompts overlap, or ``remove`` and no prompt is left.
    """
    rows = table.to_pylist()
    overlap = overlaps(rows, {n: read_prompts(p).to_pylist() for n, p in others.items()}, settings["ngram"])
    summary = summary_of(overlap, rows, settings)
    details = "".join(
        f"\n  {e['prompt_id']} = {e['set']} {e['other']} ({e['reason']}): {e['words']}"
        for e in summary["examples"]
    )
    if settings["action"] == "refuse" and overlap.prompts:
        raise DataError(
            f"{len(overlap.prompts)} of {len(rows)} prompts overlap {', '.join(summary['by_set'])}; "
            f"data.decontaminate.action=remove drops them{details}"
        )
    if settings["action"] == "remove":
        table = table.filter(pa.array([i not in overlap.prompts for i in range(len(rows))], pa.bool_()))
        if not table.num_rows:
            raise DataError(
                f"all {len(rows)} prompts overlap {', '.join(summary['by_set'])}, none is left{details}"
            )
    return table, summary


def check_disjoint(sets: dict[str, Path]) -> None:
    """Refuse pool, validation and test sets that share a prompt's text.

    Args:
        sets: Name to prompts artifact (a directory with ``prompts.parquet``) or Parquet file.

    Raises:
        DataError: Sets overlap; the message lists every pair, with counts and the first few prompt ids.
    """
    texts: dict[str, dict[str, str]] = {}
    for name, path in sets.items():
        table = read_prompts(path / "prompts.parquet" if path.is_dir() else path)
        texts[name] = {asked_text(row): row["prompt_id"] for row in table.to_pylist()}
    faults = []
    for one, other in combinations(texts, 2):
        if shared := [text for text in texts[one] if text in texts[other]]:
            pairs = ", ".join(f"{texts[one][t]} = {texts[other][t]}" for t in shared[:3])
            faults.append(
                f"{one} and {other} share {len(shared)} prompts ({pairs}{', …' if len(shared) > 3 else ''})"
            )
    if faults:
        raise DataError(
            "sets that choose, train and test must not share a prompt:\n  "
            + "\n  ".join(faults)
            + "\n  take other rows (skip and limit draw disjointly from one file) or remove them"
        )
