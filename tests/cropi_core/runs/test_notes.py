"""Notes of runs: bounded printable text, found by `cropi runs`, in the report and in `cropi compare`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts import Store
from cropi_core.cli.app import app
from cropi_core.report import write_comparison, write_report
from cropi_core.runs import new_run, read_note, save_run
from cropi_core.runs.notes import LONGEST
from tests.support.tiny import tiny

HOSTILE = '<script>alert(1)</script> & "half" [red]the rate'


def cropi(root: Path, *arguments: str):
    return CliRunner().invoke(app, [*arguments, "--root", str(root)])


@pytest.fixture
def runs(tmp_path: Path):
    records = [new_run(tiny(seed=seed)) for seed in (0, 1)]
    for record in records:
        save_run(Store(tmp_path), record)
    return tmp_path, records


def test_a_note_is_found_shown_escaped_and_removed(runs):
    root, (one, other) = runs
    assert cropi(root, "runs", "note", one.run).stdout == f"run {one.run} has no note\n"
    assert cropi(root, "runs", "note", one.run, f"  {HOSTILE} ").exit_code == 0
    assert cropi(root, "runs", "note", one.run).stdout == HOSTILE + "\n"
    save_run(Store(root), one)  # a run in progress writes its record again and again
    rows = json.loads(cropi(root, "runs", "--json", "--note", "HALF").stdout)
    assert [(row["run"], row["note"]) for row in rows] == [(one.run, HOSTILE)]
    assert HOSTILE.split()[0] in cropi(root, "runs").stdout
    compared = json.loads(cropi(root, "compare", one.run, other.run, "--json").stdout)
    assert compared["notes"] == [HOSTILE, ""]
    assert HOSTILE in cropi(root, "compare", one.run, other.run).stdout
    pages = [
        write_report(Store(root), one.run),
        write_comparison(Store(root), one.run, other.run, root / "two.html"),
    ]
    for page in pages:
        text = page.read_text()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script" not in text
    assert cropi(root, "runs", "note", one.run, "").exit_code == 0
    assert read_note(Store(root), one.run) == ""
    cropi(root, "runs", "note", other.run, "gone with its run")
    assert cropi(root, "runs", "rm", other.run, "--yes").exit_code == 0
    assert not list((root / "runs").glob("*.note"))


@pytest.mark.parametrize(
    "text", ["x" * (LONGEST + 1), "two\nlines", "a\x1b[2J", "a\u202eb", "a\x9bb", "nul\0"]
)
def test_a_long_note_and_control_characters_are_refused(runs, text: str):
    root, (one, _) = runs
    done = cropi(root, "runs", "note", one.run, text)
    assert done.exit_code != 0
    assert read_note(Store(root), one.run) == ""


def test_the_note_of_a_foreign_root_is_cut_and_printable(runs):
    root, (one, _) = runs
    (root / "runs" / f"{one.run}.note").write_text("a\x1b[2J" + "y" * 100_000)
    assert read_note(Store(root), one.run).startswith("a␛[2Jyy")
    assert len(read_note(Store(root), one.run)) <= LONGEST
    assert "\x1b" not in cropi(root, "runs").stdout
    (root / "runs" / f"{one.run}.note").write_bytes(b"\xff\xfe")
    assert "cannot be read" in read_note(Store(root), one.run)


def test_an_unknown_run_has_no_note(runs):
    root, _ = runs
    assert cropi(root, "runs", "note", "none", "text").exit_code != 0
    assert not list((root / "runs").glob("*.note"))
