"""The scripts for other trainers pass what their options name, resume, and leave the checkpoint where cropi reads it.

The trainers themselves need GPUs: recorders in their place note the arguments and leave the files that each documents.
"""

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

SCRIPTS = CHECKOUT / "examples" / "trainers"
RECORDER = """#!/usr/bin/env python3
import json, os, pathlib, sys

arguments = sys.argv[1:]
with open(os.environ["RECORD"], "a") as out:
    out.write(json.dumps([pathlib.Path(sys.argv[0]).name, *arguments]) + "\\n")


def value(option):
    joined = [one.split("=", 1)[1] for one in arguments if one.startswith(option + "=")]
    return joined[0] if joined else arguments[arguments.index(option) + 1]


def checkpoint(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")


if "verl.trainer.main_ppo" in arguments:
    work = pathlib.Path(value("trainer.default_local_dir"))
    (work / "global_step_20" / "actor").mkdir(parents=True, exist_ok=True)
    (work / "latest_checkpointed_iteration.txt").write_text("20")
elif "verl.model_merger" in arguments:
    assert pathlib.Path(value("--local_dir")).is_dir()
    checkpoint(pathlib.Path(value("--target_dir")))
elif "openrlhf.cli.train_ppo_ray" in arguments:
    checkpoint(pathlib.Path(value("--ckpt.output_dir")))
elif "rl" in arguments:
    work = pathlib.Path(value("--output-dir")) / "run"
    (work / "checkpoints" / "step_10").mkdir(parents=True, exist_ok=True)
    checkpoint(work / "weights" / "step_20")
"""


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a command, with directories whose names have spaces, and the recorders."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "uv"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    folders = {name: tmp_path / f"a {name}" for name in ("policy", "prompts", "out", "work", "prime")}
    for folder in folders.values():
        folder.mkdir()
    return {
        "PATH": f"{programs}{os.pathsep}/usr/bin:/bin{os.pathsep}{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record.jsonl"),
        "REWARD": "/rewards/own.py",
        "PRIME_RL": str(folders["prime"]),
        "CROPI_POLICY": str(folders["policy"]),
        "CROPI_PROMPTS": str(folders["prompts"] / "train.parquet"),
        "CROPI_PROMPTS_DIRECTORY": str(folders["prompts"]),
        "CROPI_OUT": str(folders["out"]),
        "CROPI_WORK": str(folders["work"]),
        "CROPI_STEPS": "20",
        "CROPI_SEED": "7",
    }


def run(script: str, places: dict[str, str]) -> list[list[str]]:
    """Run a script; return the recorded commands of this call."""
    Path(places["RECORD"]).write_text("")
    done = subprocess.run(
        ["sh", str(SCRIPTS / script)], env=places, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (Path(places["CROPI_OUT"]) / "model.safetensors").exists()
    return [json.loads(line) for line in Path(places["RECORD"]).read_text().splitlines()]


def test_verl_gets_the_selection_and_its_last_checkpoint_is_merged(places):
    training, merging = run("verl.sh", places)
    for option in (
        f"data.train_files={places['CROPI_PROMPTS']}",
        f"actor_rollout_ref.model.path={places['CROPI_POLICY']}",
        "trainer.total_training_steps=20",
        "trainer.save_freq=10",
        'trainer.logger=["console"]',
        "reward.custom_reward_function.path=/rewards/own.py",
    ):
        assert option in training
    assert merging[merging.index("--local_dir") + 1] == f"{places['CROPI_WORK']}/global_step_20/actor"


def test_openrlhf_gets_the_selection_and_writes_the_checkpoint(places):
    (training,) = run("openrlhf.sh", places)
    assert training[training.index("--data.prompt_dataset") + 1] == places["CROPI_PROMPTS"]
    assert training[training.index("--algo.advantage.estimator") + 1] == "group_norm"
    assert training[training.index("--train.batch_size") + 1] == "128"
    assert training[training.index("--train.seed") + 1] == "7"


def test_prime_rl_installs_the_taskset_and_resumes_from_its_checkpoints(places):
    installing, training = run("prime_rl.sh", places)
    assert installing == ["uv", "pip", "install", places["CROPI_PROMPTS_DIRECTORY"]]
    assert training[training.index("--model.name") + 1] == places["CROPI_POLICY"]
    assert "--ckpt.resume-step" not in training
    shutil.rmtree(places["CROPI_OUT"])
    Path(places["CROPI_OUT"]).mkdir()
    _, training = run("prime_rl.sh", places)
    assert training[training.index("--ckpt.resume-step") + 1] == "-1"
    settings = tomllib.loads((SCRIPTS / "prime_rl.toml").read_text())
    assert settings["orchestrator"]["train"]["source"][0]["env"]["taskset"]["id"] == "cropi-selection"


@pytest.mark.parametrize(("script", "name"), [("verl.sh", "REWARD"), ("prime_rl.sh", "PRIME_RL")])
def test_a_missing_setting_is_named(places, script, name):
    del places[name]
    done = subprocess.run(
        ["sh", str(SCRIPTS / script)], env=places, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert name in done.stderr
    assert not list(Path(places["CROPI_OUT"]).iterdir())
