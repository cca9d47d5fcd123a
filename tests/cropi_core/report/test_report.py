"""A report matches the artifacts of any run, and its content cannot act on its reader."""

import html
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("jinja2", reason="reports need the extra `report`")
pytest.importorskip("matplotlib", reason="reports need the extra `report`")
pytest.importorskip("trl", reason="training needs the extra `train`")

from markupsafe import escape
from typer.testing import CliRunner

from cropi_core.analysis import read_chosen
from cropi_core.artifacts.layout import (
    EVALUATION_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    ROLLOUTS,
    SCORES_FILE,
    SELECTION_FILE,
)
from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.config.loading import load_config
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import StepResult, publish_import, run_step
from cropi_core.errors import ArtifactError, ConfigError, StepError
from cropi_core.formatting import number, percent, points, signed
from cropi_core.report import text, write_comparison, write_report
from cropi_core.report.baselines import baselines, progress
from cropi_core.report.plots import spread
from cropi_core.report.prompts import examples
from cropi_core.report.stages import overlap, read_choice, shares
from cropi_core.runs.artifacts import Artifacts, read_pool
from cropi_core.runs.records import load_run, remove_run, run_id, save_run
from cropi_core.runs.summary import spending, summarise
from data_schemas.records import Kind, RunRecord
from data_schemas.steps import StepSpec
from tests.support.paths import CHECKOUT

DEMO = CHECKOUT / "configs" / "demo.yaml"
TINY = [
    "data.pool.families={reverse: 16, shift: 10, copy: 6, add3: 8}",
    "data.validation.reverse.families={reverse: 6}",
    "data.validation.shift.families={shift: 6}",
    "data.test={sort_test: {kind: world, families: {sort: 6}}}",
    "rollouts.validation.samples=8",
    "training.steps=2",
    "training.prompts_per_step=4",
    "training.sampling.samples=4",
    "evaluation.sampling.samples=2",
    "projection.k=128",
    "selection.ratio=0.2",
    "runtime.threads=1",
]
SECTIONS = ("accuracy", "selection", "chosen", "scores", "trust", "prompts", "cost", "timings", "lineage")
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}&lt;$x$"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(store: Store) -> RunRecord:
    return run_curriculum(
        load_config(str(DEMO), [*TINY, "stages=2"]), store, lambda spec: run_step(spec, store)
    )


@pytest.fixture(scope="module")
def page(store: Store, finished: RunRecord) -> str:
    return write_report(store, finished.run).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects the elements and attributes that a browser would see, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def assert_harmless(page: str) -> None:
    seen = Elements(page)
    assert not {"script", "img", "iframe", "link", "object", "embed", "form", "base", "x"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:text/csv;charset=utf-8;base64,")), (name, value)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">" in page
    )


def edited(
    store: Store,
    finished: RunRecord,
    slot: str,
    file: str,
    change: Callable[[list[dict[str, Any]]], None],
    **more: Any,
) -> Any:
    """Import a changed copy of one table of the run; return its slot record."""
    old = finished.slots[slot]
    source = store.path(old.ref) / file
    parts = sorted(source.glob("part-*")) if source.is_dir() else [source]
    tables = [pq.read_table(part) for part in parts]

    def fill(directory: Path) -> None:
        for part, table in zip(parts, tables, strict=True):
            rows = table.to_pylist()
            change(rows)
            target = directory / part.relative_to(store.path(old.ref))
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), target)

    kind: Kind = old.ref.kind
    summary = store.manifest(old.ref).summary | more
    return old.model_copy(update={"ref": publish_import(store, kind, {}, summary, fill), "origin": "pinned"})


def record_of(store: Store, base: RunRecord, name: str, **changes: Any) -> str:
    record = base.model_copy(update={"run": name, **changes})
    save_run(store, record)
    return record.run


# -- content -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_section_is_there_and_every_stage_in_it(page: str, finished: RunRecord) -> None:
    assert_harmless(page)
    for section in SECTIONS:
        assert f'<section id="{section}">' in page
    parts = dict(zip(SECTIONS, page.split("<section ")[1:], strict=True))
    for section in ("accuracy", "selection", "chosen", "scores", "trust", "prompts"):
        for stage in (1, 2):
            assert re.search(f"stage {stage}\\b", parts[section], re.IGNORECASE), (section, stage)
    for slot, used in finished.slots.items():
        assert slot in parts["timings"]
        assert slot in parts["lineage"]
        assert used.ref.key in parts["lineage"]
        assert used.ref.digest[:12] in parts["lineage"]


def test_the_table_holds_the_evaluations(page: str, store: Store, finished: RunRecord) -> None:
    table = page[page.index("Before and after each stage") : page.index("<h3>Training</h3>")]
    rows = re.findall(r"<tr><th>(base|stage \d+)</th>(.*?)</tr>", table, re.DOTALL)
    assert [label for label, _ in rows] == ["base", "stage 1", "stage 2"]
    before: dict[str, float] = {}
    for stage, (_, row) in enumerate(rows):
        accuracy = store.manifest(finished.slots[f"evaluation@{stage}"].ref).summary["accuracy"]
        cells = re.findall(r'<td class="r">(.*?)</td>', row, re.DOTALL)
        assert len(cells) == len(accuracy) + 2
        for name, cell in zip(("reverse", "shift", "sort_test"), cells, strict=False):
            found = accuracy[name]
            assert f"{percent(found['accuracy'])}<br>" in cell
            assert f"{percent(found['low'])} – {percent(found['high'])}" in cell
            if name in before:
                assert f">{signed(100 * (found['accuracy'] - before[name]), 1)}<" in cell
            before[name] = found["accuracy"]
        assert cells[-2] == str(2 * stage)


def test_the_prompts_whose_reward_changed_are_counted_and_the_largest_changes_shown(
    page: str, store: Store, finished: RunRecord
) -> None:
    def rewards(stage: int) -> dict[str, list[float]]:
        path = store.path(finished.slots[f"evaluation@{stage}"].ref.key) / EVALUATION_FILE
        found: dict[str, list[float]] = {}
        for row in pq.read_table(path).to_pylist():
            if row["set"] == "reverse":
                found.setdefault(row["prompt_id"], []).append(row["reward"])
        return found

    before, after = rewards(0), rewards(2)
    changes = {name: np.mean(after[name]) - np.mean(before[name]) for name in before}
    counts = [sum(c > 0 for c in changes.values()), sum(c < 0 for c in changes.values())]
    part = page[page.index('<h3 id="changed">') : page.index("<h3>Training</h3>")]
    row = re.search(r"<th>reverse</th>(.*?)</tr>", part, re.DOTALL)
    assert row is not None
    cells = re.findall(r'<td class="r">(\d+)</td>', row[1])
    assert cells == [str(n) for n in [*counts, len(changes) - sum(counts)]]
    assert "sort_test (test)" in part
    best = max(changes, key=lambda name: changes[name])
    if changes[best] > 0:
        assert best in part


def test_the_first_sentence_is_the_result(page: str, store: Store, finished: RunRecord) -> None:
    start = page.index('<p class="lead">')
    lines = re.sub("<[^b>][^>]*>", "", page[start : page.index("</p>", start)]).split("<br>")
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "sort_test (test)",
        "reverse (validation)",
        "shift (validation)",
    ]
    for line in lines[:-1]:
        name = line.partition(" ")[0]
        first, last = (
            store.manifest(finished.slots[f"evaluation@{m}"].ref).summary["accuracy"][name] for m in (0, 2)
        )
        before, after = (
            f"{percent(s['accuracy'])} ({points(s['low'])}–{points(s['high'])})" for s in (first, last)
        )
        assert f": {before} → {after}, " in line
        chance = first["low"] <= last["high"] and last["low"] <= first["high"]
        assert line.endswith("may be chance") == chance
    assert lines[-1] == "after 4 steps on 2 × 8 of 40 prompts"


def test_shares_count_what_the_selection_table_selects(store: Store, finished: RunRecord) -> None:
    artifacts = Artifacts(store, finished)
    pool = read_pool(artifacts)
    assert pool is not None
    for stage in (1, 2):
        choice = read_choice(artifacts, pool, stage)
        assert choice is not None
        assert choice.selected is not None
        summary = store.manifest(finished.slots[f"selection@{stage}"].ref).summary
        rows = shares(pool.sources, choice.selected)
        counted = {row.name: {"pool": row.pool, "selected": row.selected} for row in rows}
        assert counted == summary["sources"]
        assert overlap(choice, choice) == 1.0
        best, worst = examples(artifacts, pool, choice)
        assert [e.rank for e in best] == [1, 2, 3, 4, 5]
        assert min(e.score for e in best) >= max(e.score for e in worst)
        assert all(len(e.completions) == 8 and e.messages for e in (*best, *worst))
    assert artifacts.problems == []


def test_many_small_groups_are_counted_in_one_line() -> None:
    groups = [f"s{i}" for i in range(100)] + ["big"] * 5
    rows = shares(groups, np.ones(len(groups), dtype=bool))
    assert rows[0].name == "big"
    assert sum(r.pool for r in rows) == len(groups)
    assert len(rows) < 30


def test_the_same_run_gives_the_same_bytes(
    page: str, store: Store, finished: RunRecord, tmp_path: Path
) -> None:
    again = write_report(store, finished.run, tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page


def cells(page: str, label: str) -> list[str]:
    """Return the cells of one row of the table of score reliability."""
    table = page[page.index('<table id="reliability">') :]
    row = re.search(f"<tr[^>]*><th>{re.escape(label)}</th>(.*?)</tr>", table, re.DOTALL)
    assert row is not None, label
    return [
        html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", row[1], re.DOTALL)
    ]


@pytest.mark.slow
def test_the_panel_shows_what_was_measured_against_which_limit_and_what_was_done(
    store: Store, finished: RunRecord, page: str
) -> None:
    assert cells(page, "action") == ["scores used", "scores used", ""]
    assert cells(page, "trajectories") == ["of the current policy", "of an earlier policy", ""]
    assert cells(page, "KL(β‖π) a token")[2] == "–"
    assert "No limit is set" in page
    limits = ["diagnostics.spot_check=20", "diagnostics.max_kl=1e-5", "diagnostics.max_dead_share=0.01"]
    config = load_config(str(DEMO), [*TINY, *limits, "diagnostics.max_dead_share_action=random", "stages=2"])
    record = run_curriculum(config, store, lambda spec: run_step(spec, store))
    told = write_report(store, record.run).read_text(encoding="utf-8")
    assert_harmless(told)
    kl, done = cells(told, "KL(β‖π) a token"), cells(told, "action")
    assert [c.action for c in record.checks] == ["random", "refresh", "random"]
    assert kl[3] == "≤ 1e-05, else refresh"
    assert float(kl[1]) == pytest.approx(record.checks[1].findings[0].value, rel=0.01)
    again = "trajectories collected again"
    assert done == ["random selection instead", again, "random selection instead", ""]
    assert (
        told.count('<span class="tag failed">random selection</span> instead of influence: max_dead_share')
        == 2
    )
    assert "Spot check, stage 1: of 20 prompts" in told
    assert all(str(escape(note)) in told for note in record.notes)


# -- untrusted content ---------------------------------------------------------------------------------------


def test_the_selected_prompts_are_shown_next_to_the_pool(
    store: Store, finished: RunRecord, page: str
) -> None:
    found = read_chosen(store, finished.run)
    table = page[page.index('id="compared"') :]
    for name, label in (("entropy", "entropy of a token, nats"), ("difficulty", "1 − pass rate of the base")):
        row = re.search(f"<tr[^>]*><th>{label}</th>(.*?)</tr>", table, re.DOTALL)
        assert row is not None
        cells = re.findall(r"<td.*?</td>", row[1], re.DOTALL)
        for cell, one in zip(cells, found.stages, strict=True):
            figure = one.figures[name]
            assert f">{number(figure.selected_mean)}</span>" in cell
            assert f"pool {number(figure.pool_mean)}, chance" in cell
            assert ("unclear" in cell) == (figure.side == "like chance")
    for said in [verdict.sentence for verdict in found.verdicts] + found.notes:
        assert str(escape(said)) in page


def test_without_the_embedding_the_page_says_what_to_install(
    store: Store, finished: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cropi_core.analysis.sentences.PACKAGE", "not_there_at_all")
    page = write_report(store, finished.run, tmp_path / "x.html").read_text(encoding="utf-8")
    assert "pip install &#34;cropi[analysis]&#34;" in page
    assert "they are closer to the validation sets: not measured" in page
    assert "entropy of a token, nats" in page


def test_untrusted_text_is_shown_not_obeyed(store: Store, finished: RunRecord, tmp_path: Path) -> None:
    nasty = HOSTILE[0] + HOSTILE[1] + HOSTILE[2]

    def prompts(rows: list[dict[str, Any]]) -> None:
        for i, row in enumerate(rows):
            row |= {"source": HOSTILE[i % 3], "level": HOSTILE[(i + 1) % 3], "answer": nasty}
            row["messages"] = [{"role": HOSTILE[1], "content": nasty + "\x00\x1b[31m\n\u202eend"}]

    def completions(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row |= {"text": f"{nasty}\r\n\x07" + "long " * 2000, "finish_reason": HOSTILE[1]}
            row["reward"] = None if row["sample"] == 0 else row["reward"]

    def reasons(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["reason"] = nasty

    def answered(reward: float) -> Callable[[list[dict[str, Any]]], None]:
        def change(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                row |= {"text": f"changed {nasty}" + "long " * 2000, "reward": reward}

        return change

    slots = dict(finished.slots)
    slots["prompts/pool"] = edited(store, finished, "prompts/pool", PROMPTS_FILE, prompts)
    slots["rollouts/pool@1"] = edited(store, finished, "rollouts/pool@1", ROLLOUTS, completions)
    slots["selection@2"] = edited(store, finished, "selection@2", SELECTION_FILE, reasons)
    slots["evaluation@0"] = edited(store, finished, "evaluation@0", EVALUATION_FILE, answered(0))
    slots["evaluation@2"] = edited(store, finished, "evaluation@2", EVALUATION_FILE, answered(1))
    terms = {"reward_terms": {"brief": [0.125, 0.25], "exact": [None, 1.0]}}
    slots["policy@1"] = edited(store, finished, "policy@1", METRICS_FILE, lambda rows: None, **terms)
    run = record_of(store, finished, "hostile", slots=slots, notes=[nasty], error=nasty, status="failed")
    page = write_report(store, run, tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert_harmless(page)
    words = "".join(Elements(page).words)
    for sign in HOSTILE:
        assert sign in words
    assert "49" not in re.findall(r"alert\(1\)>(\d+)", words)
    assert "␀␛[31m↵\n⟨U+202E⟩end" in words
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
    assert "Cut: the first 1,200 of" in words
    assert f"changed {nasty}"[:30] in words
    assert "The reward is a weighted sum" in words
    assert re.search(r"stage 1\s*brief\s*0\.125\s*0\.250", words)
    assert "not gradable" in page
    assert len(page) < 3_000_000


def test_hostile_set_names_in_figures_are_text() -> None:
    from cropi_core.report.data import Curve
    from cropi_core.report.plots import learning
    from cropi_core.runs.accuracy import Accuracy

    for name in HOSTILE:
        svg = learning(
            [Curve(name, "test", [Accuracy(name, "test", 0, 0.5, 0.4, 0.6)], {0: 0})],
            (0, 1),
            "test",
            {name: 0},
        )
        assert set(Elements(svg).tags) <= {
            "svg",
            "g",
            "path",
            "text",
            "use",
            "defs",
            "style",
            "clippath",
            "rect",
        }
        assert name[:10] in "".join(Elements(svg).words)


@pytest.mark.parametrize(
    ("raw", "shown"), [("a\tb", "a⇥\tb"), ("\x7f\x85", "␡⟨U+0085⟩"), ("é 👩‍💻", "é 👩‍💻")]
)
def test_signs_without_a_glyph_get_one_and_others_stay(raw: str, shown: str) -> None:
    assert text.visible(raw, lines=True) == shown


def test_a_lone_surrogate_can_be_written() -> None:
    assert text.line("\ud800") == "⟨U+D800⟩"


# -- any run -------------------------------------------------------------------------------------------------


def test_a_failed_random_run_says_what_is_missing(store: Store, finished: RunRecord) -> None:
    def execute(spec: StepSpec) -> StepResult:
        if spec.step == "training":
            raise StepError("policy@1 failed in its process: out of <memory>")
        return run_step(spec, store)

    config = load_config(str(DEMO), [*TINY, "stages=2", "selection.strategy=random"])
    with pytest.raises(StepError):
        run_curriculum(config, store, execute)
    run = run_id(config)
    assert load_run(store, run).status == "failed"
    page = write_report(store, run).read_text(encoding="utf-8")
    assert_harmless(page)
    assert "The run failed." in page
    assert "0 of 2 stages finished; the last artifact is selection@1" in page
    assert "out of &lt;memory&gt;" in page
    assert "The strategy random uses no trajectories" in page
    assert "By source" in page
    assert ">cached<" in page  # the prompts of the other run


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 8, 14, 17])
def test_a_run_under_way_has_a_report_at_every_point(
    store: Store, finished: RunRecord, tmp_path: Path, kept: int
) -> None:
    slots = dict(list(finished.slots.items())[:kept])
    run = record_of(store, finished, f"underway{kept}", slots=slots, status="running", finished=None)
    page = write_report(store, run, tmp_path / "x.html").read_text(encoding="utf-8")
    assert_harmless(page)
    assert "in progress" in page
    assert all(slot in page for slot in slots)


def test_a_lost_artifact_is_named(store: Store, finished: RunRecord, tmp_path: Path) -> None:
    lost = finished.slots["scores@2"].ref.model_copy(update={"key": "scores-v1-0000000000000000"})
    slots = finished.slots | {"scores@2": finished.slots["scores@2"].model_copy(update={"ref": lost})}
    torn = edited(store, finished, "scores@1", SCORES_FILE, lambda rows: None)
    with (store.path(torn.ref) / SCORES_FILE).open("ab") as stream:
        stream.write(b"more")
    run = record_of(store, finished, "lossy", slots=slots | {"scores@1": torn})
    page = write_report(store, run, tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Missing from this report" in page
    assert "no artifact scores-v1-0000000000000000" in page
    assert f"{SCORES_FILE} of {torn.ref.key} is missing or damaged" in page


def test_an_unknown_run_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run 'nobody'"):
        write_report(store, "nobody", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_missing_package_is_named_with_what_to_install(
    store: Store, finished: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "cropi_core.report.page", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "cropi\[report\]"') as caught:
        write_report(store, finished.run)
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "jinja2"


def test_labels_keep_their_order_and_do_not_touch() -> None:
    heights = [0.5, 0.5, 0.51, 0.1]
    placed = spread(heights, 0.05)
    ordered = sorted(placed)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert placed[3] < min(placed[:3]) <= max(placed[:3]) == placed[2]


def test_the_page_and_the_list_of_runs_tell_the_same_cost_by_purpose(page, store, finished):
    listed = CliRunner().invoke(app, ["runs", "--costs", "--json", "--root", str(store.root)])
    rows = {row["purpose"]: row for row in json.loads(listed.stdout) if row["run"] == finished.run}
    assert set(rows) == {"selection", "training", "evaluation"}
    sampled = [s for s in finished.slots if s.startswith("rollouts/")]
    tokens = sum(store.manifest(finished.slots[s].ref).summary["tokens"] for s in sampled)
    assert rows["selection"]["generated"] == tokens
    words = " ".join(Elements(page).words)
    assert f"selection {tokens:,}" in " ".join(words.split())
    assert f"{rows['selection']['in_training_steps']:.1f} steps: it has paid for itself" in " ".join(
        words.split()
    )


def test_a_run_without_influence_in_the_store_is_a_baseline(store: Store, finished: RunRecord) -> None:
    def variant(name: str, strategy: str, **changes: Any) -> str:
        config = json.loads(json.dumps(finished.config))
        config["selection"]["strategy"] = strategy
        return record_of(store, finished, name, config=config, **changes)

    own = Artifacts(store, finished)
    assert baselines(own) == []
    other_pool = {**finished.slots, "prompts/pool": finished.slots["prompts/sort_test"]}
    names = [
        variant("of-random", "random"),
        variant("of-random-failed", "random", status="failed"),
        variant("of-another-pool", "random", slots=other_pool),
        variant("of-influence", "influence"),
    ]
    try:
        (found,) = baselines(own)
        points = progress(own)
        page = write_report(store, finished.run).read_text(encoding="utf-8")
    finally:
        for name in names:
            remove_run(store, name)
    assert (found.run, found.trained_on, found.end) == ("of-random", "a random share of the pool", points[-1])
    first = next(point for point in points[1:] if point.accuracy >= points[-1].accuracy)
    assert found.reached == first
    assert found.ratio == points[-1].cost / first.cost
    assert [point.steps for point in points] == [0, 2, 4]
    assert points[0].cost == 0
    total = sum(
        one.tokens.forwards
        for name, one in spending(summarise(finished, store.manifest).slots).items()
        if name != "evaluation"
    )
    assert points[-1].cost == total
    assert "of-random" in page[page.index('<h3 id="baselines">') : page.index('<h3 id="changed">')]


def test_two_runs_are_compared_on_a_page(store: Store, finished: RunRecord, tmp_path: Path) -> None:
    config = json.loads(json.dumps(finished.config))
    config["seed"] = 7
    config["policy"]["path"] = HOSTILE[0]
    other = record_of(store, finished, "another", config=config, status="failed", error=HOSTILE[1])
    out = tmp_path / "compare.html"
    arguments = ["compare", finished.run, other, "--root", str(store.root), "--html", str(out)]
    try:
        told = CliRunner().invoke(app, arguments, catch_exceptions=False)
        with pytest.raises(ArtifactError, match="nosuch"):
            write_comparison(store, finished.run, "nosuch", tmp_path / "none.html")
    finally:
        remove_run(store, other)
    assert told.exit_code == 0
    assert f"page {out}" in told.stdout
    page = out.read_text(encoding="utf-8")
    assert_harmless(page)
    words = "".join(Elements(page).words)
    for expected in (
        "seed",
        HOSTILE[0],
        "sort_test (test)",
        "rank correlation of the scores",
        "Cost by purpose",
    ):
        assert expected in words
    assert page.count("<figure>") == 3  # the sets of both
    assert not (tmp_path / "none.html").exists()
