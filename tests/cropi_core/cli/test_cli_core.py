"""The command line: exit codes, JSON for scripts, one message for user errors, a fast start."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.cli import doctor
from cropi_core.cli.steps import training
from cropi_core.curriculum.execution import run_step
from cropi_core.errors import ConfigError
from cropi_core.runs.records import new_run, save_run
from data_schemas.config import Config
from data_schemas.records import SlotRecord
from data_schemas.steps import StepSpec
from tests.support import processes

pytestmark = pytest.mark.slow

WORLD = {"kind": "world", "families": {"sort": 4}}


def cropi(*args, stdin=None, code=0, **env):
    command = [sys.executable, "-m", "cropi_core", *map(str, args)]
    done = processes.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", **env},
    )
    assert done.returncode == code, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def prompts_spec(count=4, **runtime):
    settings = {"source": WORLD | {"families": {"sort": count}, "seed": 0}, "split": "pool"}
    return StepSpec(step="prompts", slot="prompts/pool", settings=settings, runtime=runtime)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def made(store):
    return run_step(prompts_spec(), store).ref


# -- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["--help", "artifacts ls", "runs --json", "gradients --help"])
def test_what_needs_no_torch_imports_none(args, tmp_path):
    script = (
        "import sys; sys.argv = ['cropi', *sys.argv[1:]]\n"
        "from cropi_core.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = [m for m in ('torch', 'transformers', 'zarr', 'prefect') if m in sys.modules]\n"
        "    print(heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "CROPI_ROOT": str(tmp_path)},
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_exit_codes_distinguish_a_wrong_command_from_failed_work(tmp_path, store, made):
    assert "selection" in cropi("selction", code=2).stderr
    assert cropi("rollouts", code=2).stderr
    wrong = cropi(
        "gradients",
        "--policy",
        "embedded",
        "--rollouts",
        tmp_path,
        "--out",
        tmp_path / "o",
        "-o",
        "projektion.k=3",
        "-o",
        "projection.k=3",
        code=2,
    )
    assert wrong.stderr.startswith("error: ")
    assert "did you mean projection?" in wrong.stderr
    assert "projection.k = 3" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    failed = cropi("artifacts", "show", "scores-v1-0000", "--root", store.root, code=1)
    assert failed.stderr.startswith("error: ")
    assert failed.stdout == ""


def test_an_unexpected_error_keeps_its_traceback():
    script = (
        "from cropi_core.cli import app, main\n"
        "@app.command()\ndef boom():\n    raise RuntimeError('unforeseen')\n"
        "import sys; sys.argv = ['cropi', 'boom']; main()"
    )
    done = processes.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "unforeseen" in done.stderr


def test_an_interrupt_is_130():
    script = (
        "from cropi_core.cli import app, main\n"
        "@app.command()\ndef wait():\n    print('ready', flush=True); import time; time.sleep(60)\n"
        "import sys; sys.argv = ['cropi', 'wait']; main()"
    )
    child = processes.start([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=500)
    assert child.returncode == 130
    assert b"Traceback" not in errors


# -- steps in their own process ----------------------------------------------------------------------------


def test_a_step_in_its_own_process_makes_the_same_bytes(store, tmp_path):
    here = run_step(prompts_spec(), store)
    there = run_step(prompts_spec(mode="subprocess", deadline_s=100), Store(tmp_path / "other"))
    assert not there.cached
    assert there.ref == here.ref
    assert run_step(prompts_spec(mode="subprocess"), store).cached


def test_a_step_speaks_json_lines_whatever_libraries_print(store):
    noisy = (
        "import os, sys\n"
        "import cropi_core.prompts.loading as p\n"
        "real = p.summarise\n"
        "def loud(table):\n"
        "    print('{\"error\": \"not a message\"}'); os.write(1, b'C library\\n'); os.system('echo child')\n"
        "    return real(table)\n"
        "p.summarise = loud\n"
        "from cropi_core.cli.app import main\n"
        "sys.argv = ['cropi', 'step', '--root', sys.argv[1]]; main()"
    )
    done = processes.run(
        [sys.executable, "-c", noisy, str(store.root)],
        input=prompts_spec().model_dump_json(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (message,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert message["result"]["key"] == prompts_spec().key
    for noise in ("not a message", "C library", "child"):
        assert noise in done.stderr


def test_a_failed_step_reports_its_error_and_its_exit_code(store):
    bad = prompts_spec().model_copy(
        update={
            "location": {"path": "none.jsonl"},
            "settings": {"source": {"kind": "file", "path": "sha256:0"}, "split": "pool"},
        }
    )
    done = cropi("step", "--root", store.root, stdin=bad.model_dump_json(), code=2)
    assert "none.jsonl is not a file" in json.loads(done.stdout)["error"]
    done = cropi("step", "--root", store.root, stdin='{"step": "dance"}', code=2)
    assert "no step" in json.loads(done.stdout)["error"]


# -- artifacts ---------------------------------------------------------------------------------------------


def test_artifacts_are_listed_shown_tagged_and_traced(store, made):
    root = ("--root", store.root)
    cropi("artifacts", "tag", "mine", made.key, *root)
    (row,) = json.loads(cropi("artifacts", "ls", "prompts", "--json", *root).stdout)
    assert (row["key"], row["tags"], row["summary"]["prompts"]) == (made.key, ["mine"], 4)
    assert made.key in cropi("artifacts", "ls", CROPI_ROOT=str(store.root)).stdout
    assert json.loads(cropi("artifacts", "show", "mine", "--json", *root).stdout)["digest"] == made.digest
    assert "mine" not in cropi("artifacts", "show", made.key[:14], *root).stdout
    for flag in ([], ["--down"]):
        (node,) = json.loads(cropi("artifacts", "lineage", "mine", "--json", *flag, *root).stdout)
        assert node == {"key": made.key, "kind": "prompts", "step": "prompts", "inputs": {}}
        assert made.key in cropi("artifacts", "lineage", "mine", *flag, *root).stdout
    assert "dance" in cropi("artifacts", "ls", "dance", *root, code=2).stderr


def test_verify_names_faults_and_repair_sets_them_aside(store, made):
    root = ("--root", store.root)
    other = run_step(prompts_spec(5), store).ref
    assert "2 of 2 artifacts are whole" in cropi("artifacts", "verify", *root).stdout
    (store.path(made) / "prompts.parquet").write_bytes(b"x")
    (store.path(other) / "manifest.json").unlink()
    done = cropi("artifacts", "verify", *root, code=1)
    assert f"{made.key}: " in done.stdout
    assert "has 1 bytes" in done.stdout
    assert other.key in done.stdout
    rows = json.loads(cropi("artifacts", "verify", made.key, "--repair", "--json", *root, code=1).stdout)
    assert rows[0]["set_aside"]
    assert not store.path(made).exists()
    assert store.path(other).exists()


def test_import_export_and_collection(store, made, tmp_path):
    root = ("--root", store.root)
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"problem": "1+1?", "answer": 2}\n')
    done = cropi(
        "artifacts",
        "import",
        "prompts",
        rows,
        "-o",
        "columns.prompt=problem",
        "-o",
        "verifier=numeric",
        "--tag",
        "mine",
        "--json",
        *root,
    )
    key = json.loads(done.stdout)["key"]
    cropi("artifacts", "export", "mine", tmp_path / "out", *root)
    (row,) = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    assert (row["answer"], row["verifier"]) == ("2", "numeric")
    listed = json.loads(cropi("artifacts", "gc", "--json", *root).stdout)
    assert (listed["deleted"], [r["key"] for r in listed["artifacts"]]) == (False, [made.key])
    assert store.path(made).exists()
    assert "nothing was deleted" in cropi("artifacts", "gc", *root).stdout
    assert "1 artifacts" in cropi("artifacts", "gc", "--yes", *root).stdout
    assert store.keys() == [key]


def test_how_rollouts_were_sampled_has_no_defaults(store, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("{}\n")
    done = cropi(
        "artifacts", "import", "rollouts", path, "--sampling", "{samples: 2}", "--root", store.root, code=2
    )
    assert "lacks max_new_tokens, temperature, top_p" in done.stderr


# -- runs and doctor ---------------------------------------------------------------------------------------


def test_runs_are_listed(store, made):
    config = Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}}, "stages": 3})
    record = new_run(config)
    record.slots["prompts/pool"] = SlotRecord(ref=made, origin="computed")
    save_run(store, record)
    (row,) = json.loads(cropi("runs", "--json", "--root", store.root).stdout)
    assert (row["run"], row["status"], row["stages_done"], row["stages"]) == (record.run, "running", 0, 3)
    assert "0/3" in cropi("runs", "--root", store.root).stdout


def test_a_report_without_a_run_says_how_to_make_one(tmp_path):
    assert "cropi run" in cropi("report", "--root", tmp_path, code=2).stderr


def test_doctor_says_what_is_broken(tmp_path, monkeypatch):
    checks = doctor.examine(str(tmp_path / "new" / "root"))
    assert {check.state for check in checks} <= {"ok", "missing"}
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-extra": ("dreams", "dreams")})
    found = {check.name: check for check in doctor.examine(str(tmp_path))}
    assert found["no-such-package"].state == "broken"
    assert (found["no-such-extra"].state, "pip install 'cropi[dreams]'" in found["no-such-extra"].remedy) == (
        "missing",
        True,
    )


def test_doctor_in_json():
    rows = json.loads(cropi("doctor", "--json").stdout)
    assert {"what", "state", "found", "remedy"} == set(rows[0])
    assert any(row["what"] == "embedded policy" and row["state"] == "ok" for row in rows)


# -- single steps on files ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_single_steps_work_on_files_alone(tmp_path):
    """From prompts to a subset without a store: each command reads the output of the previous one."""
    for name, split in (("pool", "pool"), ("valid", "validation")):
        spec = prompts_spec(6).model_copy(
            update={
                "settings": {
                    "source": {"kind": "world", "families": {"sort": 6, "reverse": 6}, "seed": 0},
                    "split": split,
                }
            }
        )
        store = Store(tmp_path / "root")
        prompts = store.path(run_step(spec, store).ref) / "prompts.parquet"
        cropi(
            "rollouts",
            "--policy",
            "embedded",
            "--prompts",
            prompts,
            "--out",
            tmp_path / name,
            "-o",
            "sampling.samples=4",
            "--seed",
            3,
        )
        summary = cropi(
            "gradients",
            "--policy",
            "embedded",
            "--rollouts",
            tmp_path / name,
            "--out",
            tmp_path / f"{name}.zarr",
            "-o",
            "projection.k=256",
            "--json",
        ).stdout
        assert json.loads(summary)
    cropi(
        "scores",
        "--train",
        tmp_path / "pool.zarr",
        "--validation",
        f"sorting={tmp_path / 'valid.zarr'}",
        "--out",
        tmp_path / "scores.parquet",
    )
    itself = ["--scores", tmp_path / "scores.parquet", "--spot", tmp_path / "scores.parquet"]
    found = json.loads(cropi("diagnostics", *itself, "--out", tmp_path / "d.json", "--json").stdout)
    written = json.loads((tmp_path / "d.json").read_text())
    assert len(written.pop("pairs")) == found["compared"]
    assert written == found
    assert found["spearman"] == pytest.approx(1)
    assert found["compared"] >= 3
    cropi(
        "selection",
        "--scores",
        tmp_path / "scores.parquet",
        "--ratio",
        "0.25",
        "--strategy",
        "influence",
        "--out",
        tmp_path / "selection.parquet",
    )
    table = pq.read_table(tmp_path / "selection.parquet")
    assert table.num_rows == 12
    assert sum(table["selected"].to_pylist()) == 3
    assert (
        "NAME=PATH"
        in cropi(
            "scores", "--train", tmp_path / "pool.zarr", "--validation", "x", "--out", "y", code=2
        ).stderr
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], []),
        (["training.warmup_steps=99", "training.steps=5"], ["warmup_steps=99 exceeds training.steps=5"]),
        (["training.beta=0.1"], ["training.beta=0.1 needs the KL reference policy; give --reference"]),
        (
            ["objective.loss_type=luspo", "training.prompts_per_step=3", "runtime.launch={processes: 2}"],
            ["importance_sampling_level=sequence", "prompts_per_step=3 is not a multiple"],
        ),
    ],
)
def test_a_training_step_refuses_what_a_whole_configuration_refuses(options, said, tmp_path):
    paths = {name: tmp_path / name for name in ("prompts", "selection", "out")}
    with pytest.raises(ConfigError) as raised:
        training("embedded", **paths, override=options)
    assert all(text in str(raised.value) for text in said or ["--prompts"])
    if not said:
        with pytest.raises(ConfigError, match=r"--reference has no effect with training\.beta=0"):
            training("embedded", **paths, reference="embedded")
