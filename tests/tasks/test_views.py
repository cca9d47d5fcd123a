"""What the UI is shown of every step of a real tiny run: the figures that are asked for, and nobody's markup."""

import base64
import html
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.formatting import percent, points
from data_schemas.records import Manifest
from tasks.ui.pages import Shown, view
from tasks.ui.publish import KEYS
from tasks.ui.rows import figure
from tasks.ui.selection_page import first_votes
from tests.support.tiny import go, tiny

IMAGE = re.compile(r"!\[[^\n]*?\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)")
SHARED_SETS = {
    "data": {
        "pool": {"kind": "world", "families": {"reverse": 16, "copy": 8, "noise": 8, "lucky": 8}},
        "validation": {
            "goal": {"kind": "world", "families": {"reverse": 8}},
            "other": {"kind": "world", "families": {"copy": 8}},
        },
        "test": {"held_out": {"kind": "world", "families": {"reverse": 8}}},
    },
    "training": {"beta": 0.05},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store and a finished run of two stages, two validation sets, trained with a reference."""
    root = tmp_path_factory.mktemp("views") / "root"
    return Store(root), go(tiny(**SHARED_SETS), root)


@pytest.fixture(scope="module")
def pages(run):
    """The pages by step."""
    store, record = run
    shown: dict[str, list[Shown]] = {}
    for slot, entry in record.slots.items():
        manifest = store.manifest(entry.ref)
        if manifest.step in KEYS:
            shown.setdefault(manifest.step, []).append(Shown(slot, "cached", manifest, store.path(entry.ref)))
    return {step: view(step, found) for step, found in shown.items()}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["gradients", "scores", "selection", "training"])
def test_what_a_machine_has_no_copy_of_has_a_page_without_pictures(run, step):
    store, record = run
    slots = {slot: store.manifest(entry.ref) for slot, entry in record.slots.items()}
    nowhere = Path("/nowhere")
    shown = [Shown(slot, "cached", made, nowhere) for slot, made in slots.items() if made.step == step]
    page = view(step, shown)
    assert "No figures" in page
    assert not pictures(page)
    assert all(one.manifest.key in page for one in shown)


def pictures(page: str) -> list[list[str]]:
    """The texts of every picture, its title first."""
    found = []
    for encoded in IMAGE.findall(page):
        svg = ElementTree.fromstring(base64.b64decode(encoded).decode())
        found.append([e.text or "" for e in svg.iter() if e.tag.endswith("text")])
    return found


def titles(page: str) -> list[str]:
    return [texts[0] for texts in pictures(page)]


def plain(page: str) -> str:
    return html.unescape(IMAGE.sub("", page)).replace("\\", "")


def test_every_step_has_a_page_with_its_keys_and_place(run, pages):
    store, record = run
    assert set(pages) == set(KEYS) - {"diagnostics"}
    for slot, entry in record.slots.items():
        step = store.manifest(entry.ref).step
        if step in KEYS:
            assert f"| {slot} | cached |" in plain(pages[step])
            assert f"`{entry.ref.key}`" in pages[step]
    assert all(f"`{store.root}/" in page for page in pages.values())


def test_rollouts_show_pass_rates_lengths_and_what_could_not_be_graded(run, pages):
    store, record = run
    page = pages["rollouts"]
    assert "Prompts by pass rate, rollouts/pool@1" in titles(page)
    assert "Pass rate by source, rollouts/pool@1" in titles(page)
    assert "tokens each | truncated | not gradable" in page
    summary = store.manifest(record.slots["rollouts/pool@1"].ref).summary
    assert f"| {figure(summary['mean_reward'])} | {figure(summary['mean_tokens'])} |" in page


def test_rollouts_show_the_warnings_about_their_verifiers(run):
    store, record = run
    manifest = store.manifest(record.slots["rollouts/pool@1"].ref)
    text = "the verifier math gave none of the first 64 completions a reward"
    manifest = manifest.model_copy(update={"summary": manifest.summary | {"verifier_warnings": [text]}})
    shown = [Shown("rollouts/pool@1", "cached", manifest, store.path(record.slots["rollouts/pool@1"].ref))]
    assert text in plain(view("rollouts", shown))


def test_gradients_show_statuses_effective_samples_and_norms(pages):
    page = pages["gradients"]
    assert titles(page) == [
        "Prompts by status",
        "Gradient norm, gradients/pool@2",
        "Effective sample size, gradients/pool@2",
    ]
    assert {"ok", "zero_variance", "gradients/pool@1"} <= set(pictures(page)[0])
    assert "median ESS" in page


def test_scores_show_their_distribution_and_both_ends(run, pages):
    store, record = run
    page = pages["scores"]
    assert titles(page) == [
        "Score, scores@2",
        "Influence on goal, scores@2",
        "Influence on other, scores@2",
    ]
    table = pq.read_table(store.path(record.slots["scores@2"].ref) / "scores.parquet").to_pylist()
    ranked = sorted((row["rank"], row["prompt_id"]) for row in table if row["rank"])
    for rank, prompt in (ranked[0], ranked[-1]):
        assert f"| {rank} | {prompt} |" in plain(page)


def test_a_selection_shows_sources_levels_pass_rates_and_who_voted(run, pages):
    store, record = run
    page = pages["selection"]
    assert titles(page) == [
        "Share by source, selection@2",
        "Share by level, selection@2",
        "Share by pass rate, selection@2",
        "Selected prompts by the validation set that ranked them highest, selection@2",
    ]
    table = pq.read_table(store.path(record.slots["selection@2"].ref) / "selection.parquet").to_pylist()
    chosen = [row for row in table if row["selected"]]
    votes = first_votes([row["reason"] for row in chosen])
    assert sum(votes.values()) == len(chosen)
    assert set(votes) <= {"goal", "other"}
    for row in chosen:
        assert row["reason"] in plain(page)


def test_training_shows_reward_kl_and_lengths_over_the_steps_of_all_stages(pages):
    page = pages["training"]
    assert titles(page) == ["Mean reward", "KL to the reference", "Completion length, tokens"]
    assert "6" in pictures(page)[0]  # two stages of three steps
    assert "optimizer steps of policy@1 to policy@2" in pictures(page)[0]


def test_evaluations_show_accuracy_with_intervals_by_stage(run, pages):
    store, record = run
    page = pages["evaluation"]
    (texts,) = pictures(page)
    assert {"goal", "held_out", "0", "1", "2"} <= set(texts)
    found = store.manifest(record.slots["evaluation@2"].ref).summary["accuracy"]["held_out"]
    span = f"{percent(found['accuracy'])} ({points(found['low'])}–{points(found['high'])})"
    assert f"| evaluation@2 | held_out | {span} |" in plain(page)


def test_a_draw_without_votes_and_a_foreign_sentence_have_no_votes():
    assert (
        first_votes(["random draw", "dead: zero_variance", "rrf: no set voted", "because #1 (good)"])
        == Counter()
    )
    assert first_votes(["rrf: goal #3 (0.412), sort #87 (0.055)", "softmax: goal #1 (1.000)"]) == {"goal": 2}


def test_a_prompt_and_a_source_are_shown_as_they_are_and_not_as_markup(run, tmp_path: Path):
    store, record = run
    bad = "<img src=x onerror=alert(1)> | **x** `y` \n# [z](javascript:alert(1))"
    made = store.manifest(record.slots["selection@1"].ref)
    prompts = pq.read_table(store.path(made.inputs["prompts"]) / "prompts.parquet")
    rows = [
        {**row, "source": bad, "messages": [{"role": "user", "content": bad}]} for row in prompts.to_pylist()
    ]
    pool = tmp_path / "prompts" / made.inputs["prompts"].key
    pool.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=prompts.schema), pool / "prompts.parquet")
    path = tmp_path / "selection" / made.key
    path.mkdir(parents=True)
    table = pq.read_table(store.path(made) / "selection.parquet")
    pq.write_table(table, path / "selection.parquet")
    summary = made.summary | {"sources": {bad: {"pool": 40, "selected": 8}}}
    manifest = Manifest.model_validate(made.model_dump() | {"summary": summary})
    page = view("selection", [Shown("selection@1", "cached", manifest, path)])
    assert "<img" not in page
    assert not re.search(r"(?<!\\)\]\((?!data:image/svg|/artifacts/key/cropi-run\))", page)
    assert "<img src=x onerror=alert(1)> | **x** `y` # [z](javascript" in plain(page)
    assert any(texts[0].startswith("Share by source") for texts in pictures(page))


def test_a_damaged_artifact_is_an_error_and_not_an_empty_page(run, tmp_path: Path):
    store, record = run
    manifest = store.manifest(record.slots["scores@1"].ref)
    with pytest.raises(OSError, match=r"scores\.parquet"):
        view("scores", [Shown("scores@1", "cached", manifest, tmp_path)])


def test_the_log_probabilities_of_another_sampler_are_shown_with_their_limits(run):
    store, record = run
    entry = record.slots["rollouts/pool@1"]
    manifest = store.manifest(entry.ref)
    found = {"completions": 8, "tokens": 50, "mean_difference": 2.5e-6, "max_difference": 0.031}
    limits = {"outside_top_p": 1, "mean_limit": 0.001, "max_limit": 0.02, "warning": "a token's | is 0.031"}
    by_vllm = manifest.model_copy(update={"summary": {**manifest.summary, "parity": found | limits}})
    page = view("rollouts", [Shown("rollouts/pool@1", "computed", by_vllm, store.path(entry.ref))])
    (row,) = [line for line in page.splitlines() if "2.5e" in line]
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] == [
        "rollouts/pool@1", "8", "50", "2.5e−06", "0.031", "0.001 and 0.02", r"a token's \| is 0.031",
    ]  # fmt: skip
    assert "vLLM" not in view(
        "rollouts", [Shown("rollouts/pool@1", "cached", manifest, store.path(entry.ref))]
    )
