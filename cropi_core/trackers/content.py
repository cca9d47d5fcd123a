"""What a tracker gets of a finished run: parameters, metrics by stage and by optimizer step, and files.

Everything is read from the record of the run and its artifacts, in a fixed order, so that two collections of one run
are equal.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cropi_core.artifacts import METRICS_FILE, SELECTION_FILE, Store
from cropi_core.errors import ConfigError
from cropi_core.report import MissingExtraError, write_report
from cropi_core.runs import Run, RunSummary, ancestors, spending
from data_schemas import Manifest, canonical_json

CONTENT = "content.json"
FILES = "files"
SELECTION_COLUMNS = ("rank", "prompt_id", "score", "status", "reason")


@dataclass(frozen=True)
class Row:
    """Values at one point of an axis: ``stage``, or ``step``, the optimizer steps of the whole run."""

    axis: str
    at: int
    values: dict[str, float]


@dataclass(frozen=True)
class Content:
    """What is logged.

    Attributes:
        run: Id of the run.
        started: When it started, ISO 8601.
        finished: When it ended.
        tags: Short texts about it.
        parameters: Its configuration without the section `runtime`, by dotted name.
        rows: Metrics in the order in which the run measured them.
        notes: What is missing, for the user.
        digest: SHA-256 over all of this but notes, and over the digests of the artifacts.
    """

    run: str
    started: str
    finished: str
    tags: dict[str, str]
    parameters: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    digest: str = ""


def collect(store: Store, name: str, out: Path) -> Content:
    """Collect a finished run into ``out``: ``content.json``, and the directory ``files``.

    Files are ``record.json``, ``configuration.yaml``, ``lineage.json`` (every artifact that the run was made from, with
    its digest), ``selection/stage-M.csv`` (the selected prompts in the order of their rank) and ``report.html``.

    Raises:
        ArtifactError: The run does not exist, or an artifact of it can no longer be read.
        ConfigError: The run is not finished.
    """
    run = Run(name, store.url)
    record = run.record
    if record.status != "done":
        raise ConfigError(
            f"run {name} is {record.status}, and only a finished run is logged: run the same command again to finish it"
        )
    summary = run.summary()
    manifests = {slot: run[slot].manifest for slot in run}
    settings = {key: value for key, value in record.config.items() if key != "runtime"}
    notes = _write_files(store, run, manifests, out / FILES)
    content = Content(
        run=name,
        started=record.started,
        finished=record.finished or record.started,
        tags={
            "status": record.status,
            "strategy": str(record.config["selection"]["strategy"]),
            "stages": str(record.config["stages"]),
            "artifacts": str(len(record.slots)),
        },
        parameters=dict(_flat(settings)),
        rows=[row for row in _rows(run, summary, manifests) if row.values],
        notes=notes,
    )
    digested = asdict(content) | {"artifacts": [slot.digest for slot in summary.slots], "notes": None}
    content = replace(content, digest=hashlib.sha256(canonical_json(digested).encode()).hexdigest())
    (out / CONTENT).write_text(json.dumps(asdict(content)), encoding="utf-8")
    return content


def _write_files(store: Store, run: Run, manifests: Mapping[str, Manifest], files: Path) -> list[str]:
    """Write the files; return a note for each that is omitted."""
    lineage = list(_lineage(store, manifests))
    texts = {
        "record.json": run.record.model_dump_json(indent=1) + "\n",
        "configuration.yaml": yaml.safe_dump(run.record.config, sort_keys=False, allow_unicode=True),
        "lineage.json": json.dumps(lineage, indent=1) + "\n",
    }
    for stage in range(1, run.record.config["stages"] + 1):
        if f"selection@{stage}" in run:
            texts[f"selection/stage-{stage}.csv"] = selection_csv(run, stage)
    (files / "selection").mkdir(parents=True)
    for name, text in texts.items():
        (files / name).write_text(text, encoding="utf-8")
    try:
        write_report(store, run.record.run, files / "report.html")
    except MissingExtraError as error:
        return [f"the report was omitted: {error}"]
    return []


def read_content(out: Path) -> Content:
    """Read what :func:`collect` wrote."""
    stored = json.loads((out / CONTENT).read_text(encoding="utf-8"))
    return Content(**stored | {"rows": [Row(**row) for row in stored["rows"]]})


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings by dotted name; lists are JSON."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str | int | float | bool):
        yield name, value
    else:
        yield name, json.dumps(value)


def _rows(run: Run, summary: RunSummary, manifests: Mapping[str, Manifest]) -> Iterator[Row]:
    """Yield the metrics: training by step and everything else by stage, in the order of the stages."""
    steps = 0
    stages = run.record.config["stages"]
    for stage in range(stages + 1):
        trained = manifests.get(f"policy@{stage}")
        if stage and trained is not None and trained.step == "training":
            yield from _training(run, stage, steps)
            steps += int(trained.summary.get("steps", 0))
        values = _stage(summary, manifests, stage)
        if stage == stages:
            values |= _cost(summary)
        yield Row("stage", stage, _finite(values))


def _training(run: Run, stage: int, before: int) -> Iterator[Row]:
    """Yield the metrics of each optimizer step of a stage; steps are numbered over the whole run."""
    for row in run[f"policy@{stage}"].table(METRICS_FILE).to_pylist():
        values = {f"training/{metric_name(key)}": value for key, value in row.items() if key != "step"}
        yield Row("step", before + int(row["step"]), _finite(values))


def _stage(summary: RunSummary, manifests: Mapping[str, Manifest], stage: int) -> dict[str, Any]:
    """Return the metrics of a stage: accuracy, reliability of the scores, the selection, seconds by step."""
    values: dict[str, Any] = {}
    for row in (one for one in summary.accuracy if one.stage == stage):
        values |= {f"accuracy/{row.set}": row.accuracy}
        values |= {f"accuracy_low/{row.set}": row.low, f"accuracy_high/{row.set}": row.high}
    for row in (one for one in summary.details if one.stage == stage):
        values[f"accuracy_by_part/{row.set}/{metric_name(row.part)}"] = row.accuracy
    for check in (one for one in summary.checks if one.stage == stage):
        values |= {f"reliability/{metric_name(one.figure)}": one.value for one in check.findings}
    if (selection := manifests.get(f"selection@{stage}")) is not None:
        values |= {f"selection/{name}": selection.summary.get(name) for name in ("selected", "pool")}
        for source, counts in selection.summary.get("sources", {}).items():
            values[f"selection/source/{metric_name(source)}"] = counts["selected"]
    seconds: dict[str, float] = defaultdict(float)
    for slot, manifest in manifests.items():
        if slot.endswith(f"@{stage}"):
            seconds[f"seconds/{manifest.step}"] += manifest.seconds
    return values | seconds


def _cost(summary: RunSummary) -> dict[str, float]:
    """Return tokens and seconds of the whole run by purpose."""
    return {
        f"cost/{purpose}/{name}": value
        for purpose, one in spending(summary.slots).items()
        for name, value in (vars(one.tokens) | {"seconds": one.seconds}).items()
    }


def metric_name(text: str) -> str:
    """Return a text as part of a metric's name: letters, digits and ``_-. /``; a changed text ends with a checksum."""
    cleaned = re.sub(r"[^A-Za-z0-9_\-. /]+", "_", text).strip("/. ")
    if cleaned == text:
        return text
    return f"{cleaned}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _lineage(store: Store, manifests: Mapping[str, Manifest]) -> Iterator[dict[str, Any]]:
    """Yield every artifact that the run used or that those were made from, each once."""
    slots: dict[str, list[str]] = defaultdict(list)
    for slot, manifest in manifests.items():
        slots[manifest.key].append(slot)
    for manifest in ancestors(store, *slots, complete=True):
        yield {
            "key": manifest.key,
            "kind": manifest.kind,
            "digest": manifest.digest,
            "slots": slots.get(manifest.key, []),
            "made_from": {name: one.key for name, one in manifest.inputs.items()},
            "created": manifest.created,
            "versions": manifest.versions,
        }


def selection_csv(run: Run, stage: int) -> str:
    """Return the selected prompts of a stage as CSV, in the order of their rank."""
    rows = [row for row in run[f"selection@{stage}"].table(SELECTION_FILE).to_pylist() if row["selected"]]
    rows.sort(key=lambda row: (row["rank"] is None, row["rank"] or 0))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SELECTION_COLUMNS)
    writer.writerows(["" if row[name] is None else row[name] for name in SELECTION_COLUMNS] for row in rows)
    return buffer.getvalue()
