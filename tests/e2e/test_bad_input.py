"""Bad input of every kind: one message that says what to do, the right exit code, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from cropi_core.artifacts.store import Store
from cropi_core.errors import CropiError
from cropi_core.importing.artifacts import import_artifact
from cropi_core.runs.records import load_run, run_id
from cropi_core.world import base_checkpoint
from data_schemas.rollouts import Sampling
from tests.support import processes
from tests.support.paths import CHECKOUT
from tests.support.tiny import artifact_files, digests, files, go, settings, tiny, world


def refused(config, root, code=1):
    """Run what must fail; give the one message, after checking that it is told once and nothing was lost."""
    before = artifact_files(root)
    with pytest.raises(CropiError) as caught:
        go(config, root)
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    assert "Traceback" not in message
    after = artifact_files(root)
    assert {name: after.get(name) for name in before} == before
    record = load_run(Store(root), run_id(config))
    assert record.status == "failed"
    assert message in record.error
    return message


def command(*arguments):
    """Run the command line as a person does; give its exit code and what it said."""
    done = processes.run(
        [sys.executable, "-m", "flows.command.app", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


# -- the configuration --------------------------------------------------------------------------------------


def test_every_fault_of_a_configuration_is_reported_together_and_nothing_is_written(tmp_path):
    wrong = settings(training={"sampling": {"samples": 1}, "prompts_per_stepp": 4}, stages=0)
    wrong["selection"] = {"strategy": "influense", "ratio": 3}
    wrong["gradients"] = {"rows_per_shard": 9, "block_rows": 4}
    wrong["projectoin"] = {"k": 16}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong))
    code, out, err = command("run", path, "--root", tmp_path / "root", "-o", "runtime.devise=cpu")
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for word in (
        "prompts_per_stepp",
        "stages",
        "influense",
        "selection.ratio",
        "rows_per_shard=9",
        "training.sampling.samples=1",
        "projectoin",
        "runtime.devise",
    ):
        assert word in err
    assert not (tmp_path / "root").exists()


# -- tables -------------------------------------------------------------------------------------------------

ROWS = [
    {"question": f"rev:{name}=", "answer": name[::-1]} for name in ("abcd", "bcde", "cdef", "defg", "efgh")
]


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "file", "path": str(path), "columns": {}, "verifier": "exact"}


def changed(at, **values):
    return [{**row, **values} if i == at else row for i, row in enumerate(ROWS)]


TABLES = {
    "a missing column": ([{"question": "q"}], {}, ["'answer'", "columns.answer", "question"]),
    "a NaN for an answer": (changed(1, answer=float("nan")), {}, ["answer is NaN", "2"]),
    "nulls and numbers": (
        changed(2, answer=None, question=1.5),
        {},
        ["answer is null", "question is float", "3"],
    ),
    "no rows": ([], {}, ["no rows"]),
    "ids that are not unique": (
        [{**row, "id": f"p{i // 2}"} for i, row in enumerate(ROWS)],
        {"columns": {"prompt_id": "id"}},
        ["not unique", "p0", "p1"],
    ),
    "an unknown format": (
        [{"prompt_id": "a", "messages": "hello", "answer": "b", "verifier": "Magic"}],
        {"columns": None},
        ["'source'", "messages", "'Magic'"],
    ),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_faulty_table_is_refused_with_all_its_faults(reference, tmp_path, what):
    rows, changes, words = TABLES[what]
    pool = table(tmp_path / "pool.jsonl", rows) | changes
    message = refused(tiny(data={"pool": pool}), tmp_path / "root")
    assert str(tmp_path / "pool.jsonl") in message
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path):
    pool = table(tmp_path / "pool.jsonl", ROWS) | {"path": str(tmp_path / "nowhere.jsonl")}
    assert "nowhere.jsonl is not a file" in refused(tiny(data={"pool": pool}), tmp_path / "root", code=2)


@pytest.mark.parametrize("other", ["validation", "test"])
def test_a_set_that_shares_prompts_with_the_pool_is_named_with_them(own_copy, tmp_path, other):
    root, _ = own_copy
    pool = table(tmp_path / "pool.jsonl", ROWS)
    shared = table(tmp_path / "shared.jsonl", [*ROWS[3:], {"question": "rev:zzzz=", "answer": "zzzz"}])
    message = refused(tiny(data={"pool": pool, other: {"shared": shared}}), root)
    assert "pool and shared share 2 prompts" in message
    assert "skip and limit" in message


def test_rewards_that_are_no_numbers_are_not_imported(tmp_path):
    row = {
        "prompt_id": "a",
        "prompt_ids": [5],
        "completion_ids": [6, 7],
        "behavior_logprobs": [-0.5, -0.5],
        "text": "x",
        "finish_reason": "stop",
    }
    rewards = [1.0, float("nan"), float("inf")]
    lines = [json.dumps({**row, "sample": i, "reward": reward}) for i, reward in enumerate(rewards)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    root = tmp_path / "root"
    with pytest.raises(CropiError) as caught:
        import_artifact(
            Store(root), "rollouts", tmp_path / "mine.jsonl", policy="unknown", sampling=Sampling(samples=3)
        )
    assert caught.value.exit_code == 1
    sampling = "{samples: 3, temperature: 1.0, top_p: 1.0, max_new_tokens: 16}"
    given = ("rollouts", tmp_path / "mine.jsonl", "--policy", "unknown", "--sampling", sampling)
    code, out, err = command("artifacts", "import", *given, "--root", root)
    assert (code, out) == (1, "")
    assert err == f"error: {caught.value}\n"
    assert "NaN" in err
    assert "2" in err
    assert "3" in err
    assert Store(root).keys() == []


# -- the policy ---------------------------------------------------------------------------------------------


def foreign(directory, without=(), **config):
    """A copy of the embedded checkpoint, changed."""
    shutil.copytree(base_checkpoint(), directory)
    for name in without:
        (directory / name).rename(directory / "pytorch_model.bin")
    stated = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stated | config))
    return directory


def test_a_checkpoint_that_is_missing_or_not_to_be_trusted_is_refused(tmp_path):
    cases = [
        (tmp_path / "nowhere", ["nowhere", "is not a directory"]),
        (foreign(tmp_path / "pickled", without=["model.safetensors"]), ["no *.safetensors", "convert"]),
        (foreign(tmp_path / "code", auto_map={"AutoModelForCausalLM": "evil.Model"}), ["auto_map", "never"]),
        (foreign(tmp_path / "unknown", model_type="no_such_model"), ["no_such_model"]),
    ]
    for path, words in cases:
        message = refused(tiny(policy={"path": str(path)}), tmp_path / "root")
        assert all(word in message for word in words), message
    assert {key.partition("-")[0] for key in Store(tmp_path / "root").keys()} == {"prompts"}  # noqa: SIM118


def test_weights_cut_short_are_refused_before_anything_is_sampled(tmp_path):
    path = foreign(tmp_path / "cut")
    os.truncate(path / "model.safetensors", 1000)
    message = refused(tiny(policy={"path": str(path)}), tmp_path / "root")
    assert "safetensors" in message.lower() or "cannot be" in message


# -- pools that teach nothing -------------------------------------------------------------------------------


def test_a_pool_without_a_gradient_says_why_and_what_to_do(own_copy):
    root, _ = own_copy
    message = refused(tiny(data={"pool": world(noise=12)}, stages=1), root)
    assert "zero_variance" in message
    assert "12" in message
    assert "samples" in message


def test_a_validation_set_without_a_gradient_is_named(own_copy):
    root, _ = own_copy
    message = refused(tiny(data={"validation": {"hopeless": world(noise=6)}}, stages=1), root)
    assert "hopeless" in message
    assert "zero_variance" in message


@pytest.mark.parametrize("changes", [{"selection": {"ratio": 0.05}}, {"data": {"pool": world(reverse=3)}}])
def test_a_pool_smaller_than_a_batch_says_what_to_change(own_copy, changes):
    root, _ = own_copy
    message = refused(tiny(**{"stages": 1, **changes}), root)
    for word in ("training.prompts_per_step=4", "enlarge the pool", "selection.ratio"):
        assert word in message


# -- the disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, and a function that gives it another size or options."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield (
            place,
            lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True),
        )
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.slow
def test_a_full_disk_keeps_complete_work_and_the_run_resumes_after_space_is_freed(small_disk, own_copy):
    disk, remount = small_disk
    root, config = disk / "root", tiny(projection={"k": 131072, "density": 0.5}, stages=1)
    stopped = {"1m": "policy@0", "5m": "gradients/pool@1", "20m": "policy@1"}
    kept = {}
    for size, slot in stopped.items():
        remount(f"size={size}")
        with pytest.raises(CropiError) as caught:
            go(config, root)
        assert caught.value.exit_code == 1
        for word in (f"{slot}: no space left", str(root), "was kept", "run the same command again"):
            assert word in str(caught.value)
        kept[slot] = files(root)
    shards = [name for name in kept["gradients/pool@1"] if name.endswith(".npz")]
    assert shards, "the disk was full before the first shard"
    remount("size=64m")
    record = go(config, root)
    assert record.status == "done"
    after = files(root)
    for marker in shards:
        before = marker.replace(".done/", "features/c/").replace(".npz", "/0")
        if before in kept["gradients/pool@1"]:  # a shard without a gradient has no file
            published = before.replace(".work/", "gradients/", 1)
            assert after[published] == kept["gradients/pool@1"][before], "a whole shard was written again"
    assert Store(root).manifest(record.slots["policy@1"].ref).summary["resumed_from_step"] == 1
    assert digests(record) == digests(go(config, own_copy[0]))


def test_a_root_that_is_a_file_or_cannot_be_written_is_named(small_disk, tmp_path):
    (tmp_path / "file").write_text("mine")
    disk, remount = small_disk
    remount("ro")
    for root in (tmp_path / "file", tmp_path / "file" / "below", disk / "root"):
        with pytest.raises(CropiError) as caught:
            go(tiny(), root)
        assert caught.value.exit_code == 1
        assert str(root) in str(caught.value)
        assert "--root" in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_says_so_too(tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = command("run", "demo", "--root", tmp_path / "file")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: artifacts cannot be written below {tmp_path / 'file'}")
    assert err.count("\n") == 1
