"""Another trainer as the training step: what it gets, what it may leave, and that it never outlives the step."""

import json
import shutil
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from cropi_core.artifacts.store import Store
from cropi_core.errors import ConfigError
from cropi_core.progress import silent
from cropi_core.prompts.formats import read_format
from cropi_core.prompts.loading import write_prompts
from cropi_core.rewards.commands import COMMANDS, check_command
from cropi_core.rewards.functions import ALLOWED
from cropi_core.system.guard import GRACE_S
from cropi_core.training.command import filled, progress_of, run_command
from cropi_core.training.files import StageFiles
from cropi_core.training.metrics import TrainingError
from cropi_core.world import base_checkpoint, build
from data_schemas.config import Config
from data_schemas.steps import TrainingSettings
from data_schemas.tables import SELECTION
from data_schemas.training import Training
from tests.support.paths import CHECKOUT
from tests.support.tiny import go, settings

TRAINER = """
import json, os, pathlib, shutil, sys
policy, prompts, out, work, seed = sys.argv[1:6]
assert os.environ["CROPI_OUT"] == out and os.environ["CROPI_PROMPTS"] == prompts
assert not any(name.startswith("PREFECT_") for name in os.environ)
print("hello from the trainer", flush=True)
for step in (1, 2):
    told = {"step": step, "steps": 2, "reward": step / 4, "rewards": {"format": step / 2, "answer": None}}
    print("cropi-progress", json.dumps(told), flush=True)
for name in ("config.json", "model.safetensors"):
    shutil.copy(pathlib.Path(policy, name), out)
"""


@pytest.fixture
def files(tmp_path):
    """A pool of six prompts, of which three are selected, and the embedded policy."""
    table = build({"reverse": 6}, "pool", 0)
    write_prompts(table, tmp_path / "prompts.parquet")
    rows = [
        {"prompt_id": name, "selected": rank > 3, "rank": rank, "score": 1.0, "status": "ok", "reason": ""}
        for rank, name in zip((6, 1, 4, 2, 5, 3), table["prompt_id"].to_pylist(), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTION), tmp_path / "selection.parquet")
    return StageFiles(
        policy=Path(base_checkpoint()),
        prompts=tmp_path / "prompts.parquet",
        selection=tmp_path / "selection.parquet",
        out=tmp_path / "trained",
        metrics=tmp_path / "metrics.parquet",
        scratch=tmp_path / "scratch",
        keep_scratch=True,
        logs=tmp_path / "logs",
    )


def trained_by(files, text, report=silent, **fields):
    """Run a Python text as the trainer."""
    script = files.scratch.with_name("trainer.py")
    script.write_text(text)
    run = (sys.executable, str(script), "{policy}", "{prompts}", "{out}", "{work}", "{seed}")
    command = {"run": run, "version": "1", **fields}
    training = Training.model_validate({"engine": "command", "command": command, "steps": 9})
    return run_command(files, training, 7, report, "policy@1")


def test_a_command_gets_the_prompts_by_rank_and_its_checkpoint_becomes_the_policy(files):
    reports = []
    summary = trained_by(files, TRAINER, reports.append, format="verl")
    chosen = read_format(files.scratch / "command/prompts", "verl")
    ids = pq.read_table(files.prompts)["prompt_id"].to_pylist()
    assert [row["prompt_id"] for row in chosen] == [ids[2], ids[4], ids[0]]
    assert [(one.done, one.total, one.note) for one in reports] == [
        (1, 2, "reward 0.250"),
        (2, 2, "reward 0.500"),
    ]
    assert (summary["steps"], summary["prompts"], summary["version"]) == (2, 3, "1")
    assert (summary["first_quarter_reward"], summary["last_quarter_reward"]) == (0.25, 0.5)
    assert summary["reward_terms"] == {"format": [0.5, 1.0]}
    table = pq.read_table(files.metrics).to_pydict()
    assert (table["step"], table["reward"], table["loss"]) == ([1, 2], [0.25, 0.5], [None, None])
    weights = load_file(files.out / "model.safetensors")
    assert weights.keys() == load_file(files.policy / "model.safetensors").keys()
    assert (files.out / "tokenizer.json").read_bytes() == (files.policy / "tokenizer.json").read_bytes()
    assert "hello from the trainer" in (files.logs / "command.log").read_text()


def test_a_failed_command_is_started_again_with_what_it_left(files):
    text = TRAINER.replace(
        'print("hello',
        'mark = pathlib.Path(work, "checkpoint-1")\n'
        'if not mark.exists():\n    mark.touch()\n    print("CUDA out of memory"); sys.exit(3)\nprint("hello',
    )
    with pytest.raises(TrainingError, match=r"exit 3: CUDA out of memory\. Its output is in .*command\.log"):
        trained_by(files, text)
    assert not files.out.exists()
    assert trained_by(files, text)["steps"] == 2


NOTHING = "pass"
PICKLE = "import sys, pathlib; pathlib.Path(sys.argv[3], 'pytorch_model.bin').write_bytes(b'x')"
CONFIG = TRAINER.replace('("config.json", "model.safetensors")', '("config.json",)')
TRUNCATED = TRAINER + "\nos.truncate(pathlib.Path(out, 'model.safetensors'), 1000)"
CODE = TRAINER + '\npathlib.Path(out, \'config.json\').write_text(\'{"model_type": "x", "auto_map": {}}\')'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(NOTHING, "exit 0 and left nothing in .*out", id="nothing"),
        pytest.param(PICKLE, "cannot be used: .* has no config.json", id="pickle"),
        pytest.param(CONFIG, "pickled weights .* are not read", id="no weights"),
        pytest.param(TRUNCATED, "cannot be used: .*model.safetensors", id="truncated"),
        pytest.param(CODE, "wants its own code run", id="code"),
        pytest.param("raise SystemExit('no GPU')", "exit 1: no GPU", id="failed"),
    ],
)
def test_what_is_not_a_checkpoint_is_one_error_and_leaves_no_policy(files, text, message):
    with pytest.raises(TrainingError, match=message):
        trained_by(files, text)
    assert not files.out.exists()
    assert not files.metrics.exists()


def test_weights_that_are_not_finite_are_refused(files, tmp_path):
    weights = load_file(files.policy / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] * float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    text = (
        TRAINER
        + f"\nshutil.copy({str(tmp_path / 'nan.safetensors')!r}, pathlib.Path(out, 'model.safetensors'))"
    )
    with pytest.raises(TrainingError, match=f"cannot be used: .*{name}"):
        trained_by(files, text)


def test_a_command_ends_with_its_children_when_the_step_ends(files):
    text = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path(sys.argv[4], "pids").write_text(f"{child.pid}")
print("cropi-progress", json.dumps({"step": 1, "steps": 2}), flush=True)
time.sleep(1000)
"""

    start = 0.0

    def cancel(progress):
        nonlocal start
        start = time.monotonic()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_by(files, text, cancel)
    child = int((files.scratch / "command/work/pids").read_text())
    assert time.monotonic() - start < GRACE_S  # by SIGTERM, which the guard does not hand on as ignored
    deadline = time.monotonic() + 30
    while (status := Path(f"/proc/{child}/stat")).exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lines_that_are_not_progress_stay_output():
    assert progress_of('cropi-progress {"step": 2, "steps": 4, "reward": 0.5}\n') == {
        "step": 2,
        "steps": 4,
        "reward": 0.5,
    }
    several = progress_of(
        'cropi-progress {"step": 2, "rewards": {"format": 1, "answer": NaN, "length": "x"}}'
    )
    assert several == {"step": 2, "steps": 2, "reward_term_format": 1}
    assert progress_of('cropi-progress {"step": 2, "reward": NaN, "loss": "x"}') == {"step": 2, "steps": 2}
    bar = ' 50%|#####     | 1/2 [00:01<00:01]cropi-progress {"step": 1, "steps": 2} 100%|####'
    assert progress_of(bar) == {"step": 1, "steps": 2}
    for line in (
        "step 2",
        "cropi-progress",
        "cropi-progress 3",
        'cropi-progress {"step": 0}',
        "cropi-progress [" * 9,
    ):
        assert progress_of(line) is None


def test_only_the_names_are_replaced_and_the_program_must_exist():
    assert filled((sys.executable, '{"seed": {seed}}', "{other}"), {"seed": "3"})[1:] == [
        '{"seed": 3}',
        "{other}",
    ]
    with pytest.raises(ConfigError, match="'/no/such' is not a program here"):
        filled(("/no/such",), {})


def test_the_operator_of_a_machine_says_which_commands_run(monkeypatch, tmp_path):
    program = shutil.which("true")
    assert program is not None
    for functions, commands, allowed in [
        (None, None, True),
        ("*", None, True),
        ("", None, False),
        (str(Path(program).parent), None, False),  # directories are for functions
        ("", program, True),
        (None, program, True),
        (None, "/bin/other", False),
        (None, "", False),
        ("", "*", True),
        ("*", "/bin/other", False),
    ]:
        for name, value in ((ALLOWED, functions), (COMMANDS, commands)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        if allowed:
            check_command(["true"])
        else:
            with pytest.raises(ConfigError, match="this machine allows it to no configuration"):
                check_command(["true"])


def test_the_step_itself_refuses_a_command_that_the_operator_does_not_allow(monkeypatch, files):
    monkeypatch.setenv(ALLOWED, "")  # as in every run through a server
    with pytest.raises(ConfigError, match=COMMANDS):
        trained_by(files, TRAINER)
    assert not files.scratch.exists()


def test_the_text_and_the_version_are_in_the_key_and_contradictions_are_refused():
    def keyed(**command):
        training = Training.model_validate(
            {"engine": "command", "command": {"run": ["a"], "version": "1"} | command}
        )
        return training.for_key()

    assert "command" not in Training().for_key()
    assert (
        len(
            {
                json.dumps(keyed(**change))
                for change in ({}, {"run": ["b"]}, {"version": "2"}, {"format": "verl"})
            }
        )
        == 4
    )
    assert "training" in TrainingSettings.model_fields
    for wrong in (
        {"command": None},
        {"lora": {}},
        {"draw": {"method": "belief"}},
        {"beta": 0.1},
        {"second_moments": True},
    ):
        given = {"engine": "command", "command": {"run": ["a"], "version": "1"}} | wrong
        with pytest.raises(ValueError, match="training"):
            Config.model_validate(settings(training=given))
    with pytest.raises(ValueError, match=r"set training\.engine=command too"):
        Config.model_validate(settings(training={"command": {"run": ["a"], "version": "1"}}))


@pytest.mark.slow
@pytest.mark.extended
def test_a_curriculum_trains_with_plain_trl(tmp_path):
    """The example of the page: two stages by TRL's own trainer, and the same run again computes nothing."""
    names = ["{policy}", "{prompts}", "{out}", "{seed}", "{steps}"]
    run = [sys.executable, str(CHECKOUT / "examples/trl_command.py"), *names]
    training = {"engine": "command", "command": {"run": run, "version": "trl-1"}, "steps": 2}
    config = Config.model_validate(settings(training=training))
    record = go(config, tmp_path / "root")
    assert record.status == "done"
    store = Store(tmp_path / "root")
    for stage in (1, 2):
        manifest = store.manifest(record.slots[f"policy@{stage}"].ref)
        assert (manifest.summary["engine"], manifest.summary["steps"]) == ("command", 2)
        before = store.path(record.slots[f"policy@{stage - 1}"].ref) / "checkpoint/model.safetensors"
        assert before.read_bytes() != (store.path(manifest.key) / "checkpoint/model.safetensors").read_bytes()
    assert {entry.origin for entry in go(config, tmp_path / "root").slots.values()} == {"cached"}
