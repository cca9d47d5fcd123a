"""A run killed at any instant and started again ends as if nothing had been, and repeats one shard at most.

One root lives through all kills, in the order of the run. Each time its process gets SIGKILL at the instant
named, what lies on disk is noted, and the next process goes on. What was whole at a kill must be the very same
file, inode and time, in the finished artifact.
"""

import multiprocessing
import re
import signal

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import load_run, run_id
from tests.support.killed import Stop, run_until
from tests.support.tiny import digests, files, go, tiny

pytestmark = pytest.mark.slow

STOPS = {
    "prompts": Stop("prompts/pool", "written", "prompts.parquet"),
    "prompts, manifest": Stop("prompts/goal", "written", "manifest.json"),
    "policy": Stop("policy@0", "written", "manifest.json"),
    "policy, before its last rename": Stop("policy@0", "manifest"),
    "evaluation": Stop("evaluation@0", "written", "part-*.parquet", 2),
    "evaluation, table": Stop("evaluation@0", "written", "completions.parquet"),
    "rollouts": Stop("rollouts/pool@1", "written", "part-*.parquet", 3),
    "rollouts, between parts": Stop("rollouts/pool@1", "report", count=3),
    "rollouts, before the last rename": Stop("rollouts/pool@1", "manifest"),
    "rollouts, before the record": Stop("rollouts/goal@1", "published"),
    "gradients": Stop("gradients/pool@1", "written", "*.npz", 3),
    "gradients, inside a shard": Stop("gradients/pool@1", "written", "0", 2),
    "gradients, gathering": Stop("gradients/pool@1", "written", "zarr.json", 1),
    "gradients, before the last rename": Stop("gradients/pool@1", "manifest"),
    "scores": Stop("scores@1", "written", "scores.parquet"),
    "scores, before the last rename": Stop("scores@1", "manifest"),
    "selection": Stop("selection@1", "written", "selection.parquet"),
    "training": Stop("policy@1", "written", "whole.json", 2),
    "training, between steps": Stop("policy@1", "report", count=1),
    "training, before its manifest": Stop("policy@1", "written", "manifest.json"),
    "training, before the last rename": Stop("policy@1", "manifest"),
    "evaluation, before its manifest": Stop("evaluation@1", "written", "manifest.json"),
    "evaluation, before the last rename": Stop("evaluation@1", "manifest"),
    "between stages": Stop("gradients/pool@2", "start"),
}


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Kill a run at every stop; give the root, and what lay on disk and in the record at each and at the end."""
    root = tmp_path_factory.mktemp("life") / "root"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.killed"])
    seen = []
    for name, stop in STOPS.items():
        child = context.Process(target=run_until, args=(stop, root))
        child.start()
        child.join(500)
        assert child.exitcode == -signal.SIGKILL, f"{name}: the instant never came"
        record = load_run(Store(root), run_id(tiny()))
        seen.append((files(root), record))
    record = go(tiny(), root)
    seen.append((files(root), record))
    return root, seen


def whole(found):
    """What need not be written again: artifacts, workspaces with their manifest, shards, checkpoints."""
    checkpoints = {name.rpartition("/")[0] for name in found if name.endswith("/whole.json")}
    finished = {
        name.rpartition("/")[0] for name in found if re.fullmatch(r"\.work/[^/]+/manifest\.json", name)
    }
    shards = {
        f"{zarr}/features/c/{shard}/0"
        for zarr, shard in re.findall(r"^(.*)/\.done/(\d+)\.npz$", "\n".join(found), re.MULTILINE)
    }
    kept = {}
    for name, mark in found.items():
        if name.endswith((".tmp", ".partial", ".lock")) or name.startswith(
            ("runs/", "progress/", ".damaged/")
        ):
            continue
        part = re.search(r"/part-\d+\.parquet$|/\.done/\d+\.npz$", name) or name in shards
        inside = any(name.startswith(f"{parent}/") for parent in checkpoints | finished)
        if part or inside or not name.startswith(".work/"):
            kept[name] = mark
    return kept


def later(name, found):
    """Where a file of a workspace lies once its artifact is finished."""
    match = re.fullmatch(r"\.work/(([a-z]+)-v[^/]+)/(.*)", name)
    if match is None or name in found:
        return name
    key, kind, rest = match.groups()
    return f"{kind}/{key}/{rest}"


def served(name, found):
    """Whether a file only served to go on and did: its step has ended, or there are later checkpoints."""
    key, _, rest = name.removeprefix(".work/").partition("/")
    ended = any(f"{key}/manifest.json" in other for other in found)
    if (checkpoint := re.match(r"\.scratch/checkpoint-(\d+)/", rest)) is None:
        return ended and rest.startswith((".scratch/", "gradients.zarr/.done/"))
    marker = re.compile(rf"{key}/\.scratch/checkpoint-(\d+)/whole\.json")
    steps = [int(match[1]) for other in found if (match := marker.search(other))]
    return ended or max(steps, default=0) > int(checkpoint[1])


@pytest.mark.parametrize("name", STOPS)
def test_files_complete_at_a_kill_are_not_written_again(life, name):
    _, seen = life
    at = list(STOPS).index(name)
    (found, _), (after, _) = seen[at : at + 2]
    kept = whole(found)
    assert kept or at == 0
    for path, mark in kept.items():
        place = later(path, after)
        if place not in after and served(path, after):
            continue
        assert after[place] == mark, f"{path} was written again"


def shards(found, pattern):
    return sum(re.search(pattern, name) is not None for name in whole(found))


def test_the_kills_hit_their_intended_places(life):
    _, seen = life
    at = {name: found for name, (found, _) in zip(STOPS, seen, strict=False)}
    assert shards(at["evaluation"], r"\.scratch/goal/part-") == 1
    assert shards(at["evaluation"], r"\.scratch/held_out/part-") == 0
    assert shards(at["rollouts"], r"/parts/part-") == 2
    assert shards(at["rollouts, between parts"], r"/parts/part-") == 4
    assert shards(at["gradients"], r"/\.done/") == 2
    assert shards(at["training"], r"/\.scratch/checkpoint-\d+/model\.safetensors") == 1
    assert shards(at["evaluation, before its manifest"], r"/\.scratch/\w+/part-") == 2


def test_a_stage_killed_before_its_manifest_costs_no_step(life):
    root, seen = life
    summary = Store(root).manifest(seen[-1][1].slots["policy@1"].ref).summary
    assert summary["resumed_from_step"] == tiny().training.steps
    assert summary["seconds_per_step"] is None


def test_a_finished_workspace_is_published_and_not_computed_again(life):
    root, seen = life
    for (name, stop), (found, _) in zip(STOPS.items(), seen, strict=False):
        if stop.event == "manifest":
            ref = seen[-1][1].slots[stop.slot].ref
            manifest = f"{ref.kind}/{ref.key}/manifest.json"
            assert files(root)[manifest] == found[f".work/{ref.key}/manifest.json"], name


def test_the_record_can_be_read_after_every_kill_and_names_what_is_done(life):
    root, seen = life
    for (name, stop), (_, record) in zip(STOPS.items(), seen, strict=False):
        assert record.status == "running", name
        assert stop.slot not in record.slots, name
        assert all(Store(root).is_complete(entry.ref.key) for entry in record.slots.values()), name


def test_after_all_kills_every_artifact_is_that_of_the_undisturbed_run(life, reference):
    root, seen = life
    assert digests(seen[-1][1]) == digests(reference[1])
    assert not [path for path in (root / ".work").iterdir() if path.is_dir()]
    assert Store(root).damaged() == []
