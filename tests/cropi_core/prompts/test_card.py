"""The card of a set of prompts lists its sources, and untrusted content of a dataset cannot inject anything into it."""

import json
import os
import sys

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import run_step
from cropi_core.curriculum.slots import source_settings
from cropi_core.prompts.card import data_card
from data_schemas.data import TableSource
from data_schemas.steps import StepSpec
from tests.support import processes
from tests.support.prompt_sets import prompts_of, sets_of


def made(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = TableSource.model_validate({"kind": "file", "path": str(path), **settings})
    at = source_settings(source, "pool")
    spec = StepSpec(step="prompts", slot="prompts/pool", settings=at[0].for_key(), location=at[1], runtime={})
    store = Store(tmp_path / "root")
    store.prepare()
    return store, store.manifest(run_step(spec, store).ref)


def test_it_says_what_went_in_and_what_was_left_out(tmp_path):
    rows = [
        {"problem": "one", "solution": "\\boxed{1}", "level": "Level 1"},
        {"problem": "one", "solution": "\\boxed{2}", "level": "Level 1"},
        {"problem": "three", "solution": "no box", "level": "Level 5"},
        {"problem": "four!", "solution": "\\boxed{4}", "level": "Level 5"},
    ]
    _, manifest = made(tmp_path, rows, preset="math")
    text = data_card(manifest)
    for line in (
        "| prompts | 2 |",
        "| dropped: duplicates | 1 |",
        "| dropped: duplicates with another answer | 1 |",
        "| dropped: unanswered | 1 |",
        "| characters of a prompt | 3 to 5, median 5 |",
        "| graded by | `math` (2) |",
        "| `Level 1` | 1 |",
        "| answer pattern | `boxed` |",
        f"| path | `{manifest.settings['source']['path']}` |",
    ):
        assert line in text.splitlines(), f"{line}\n{text}"
    assert manifest.settings["source"]["path"].startswith("sha256:")


def test_text_of_a_dataset_is_not_markup(tmp_path):
    evil = "`<script>alert(1)</script>| a |\n# x"
    rows = [{"question": "q", "answer": "1", "kind": evil}]
    _, manifest = made(tmp_path, rows, columns={"level": "kind"}, system=evil)
    text = data_card(manifest)
    assert "\n# x" not in text
    for line in text.splitlines():
        plain = line.replace("\\|", "")
        if "script" in line:
            assert plain.count("|") == 3
            assert plain.count("`") == 2
            assert plain.index("`") < plain.index("<script>") < plain.rindex("`")


def test_overlaps_and_the_sets_they_are_with_are_shown(tmp_path):
    store, sets = prompts_of(sets_of(tmp_path, "remove"), tmp_path / "root")
    text = data_card(store.manifest(sets["pool"]))
    assert "2 prompts overlap (13 words in a row), dropped: `held` 1, `val` 1" in text or "dropped: `" in text
    assert "| made from `against.held` |" in text
    assert "a farmer counts his sheep" in text


def test_a_hub_dataset_has_its_licence_and_says_that_it_is_not_pinned(tmp_path):
    _, manifest = made(tmp_path, [{"question": "q", "answer": "#### 1"}], preset="gsm8k")
    hub = TableSource.model_validate({"kind": "hub", "preset": "gsm8k"})
    text = data_card(manifest.model_copy(update={"settings": source_settings(hub, "pool")[0].for_key()}))
    assert "| licence | MIT, as its publisher states |" in text
    assert "| revision | not pinned: what the hub had when it was read |" in text


def test_the_command_writes_it_and_refuses_other_kinds(tmp_path):
    _, manifest = made(tmp_path, [{"question": "q", "answer": "1"}], columns={})
    command = [sys.executable, "-m", "cropi_core", "artifacts", "card", manifest.key]
    done = processes.run(
        [*command, "--root", str(tmp_path / "root")], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == data_card(manifest)
