"""Errors of libraries, the disk and the command line are one message that names the file; outputs are not mixed."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

from cropi_core.cli.app import app
from cropi_core.cli.outputs import claim_output, files_digest, local_path
from cropi_core.errors import ConfigError, CropiError, DataError, PolicyError, foreign_errors, outer_error
from cropi_core.policy import Checkpoint
from cropi_core.prompts import write_prompts
from cropi_core.rollouts import RolloutPlan, sample_rollouts
from cropi_core.world import base_checkpoint, build
from data_schemas import Grading, Runtime, Sampling
from tests.support.models import save_tiny

FOREIGN = [
    pa.ArrowInvalid("not a Parquet file"),
    SafetensorError("header too large"),
    yaml.YAMLError("mapping values are not allowed"),
    json.JSONDecodeError("Expecting value", "x", 0),
    UnicodeDecodeError("utf-8", b"\x80", 0, 1, "invalid start byte"),
    UnicodeEncodeError("ascii", "\ud800", 0, 1, "surrogates not allowed"),
    PermissionError(13, "Permission denied", "out.parquet"),
    RecursionError("maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(
    "error", [*FOREIGN, KeyError("added_tokens"), ValueError("Exceeds the limit (4300 digits)")]
)
def test_any_exception_of_a_library_becomes_an_error_that_names_the_file(error):
    with (
        pytest.raises(PolicyError) as caught,
        foreign_errors("a.json cannot be read", PolicyError, "Copy it again"),
    ):
        raise error
    text = str(caught.value)
    assert text.startswith("a.json cannot be read: ")
    assert text.endswith(". Copy it again")
    assert "\n" not in text
    text.encode()
    assert caught.value.__cause__ is error
    with pytest.raises(DataError, match=r"^own$"), foreign_errors("a.json", PolicyError):
        raise DataError("own")
    with pytest.raises(KeyboardInterrupt), foreign_errors("a.json"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [*FOREIGN, MemoryError()])
def test_an_outside_error_that_reaches_the_command_line_is_one_line(error):
    text = outer_error(error)
    assert text is not None
    assert "\n" not in text
    text.encode()


def test_a_fault_of_cropi_itself_keeps_its_traceback():
    assert outer_error(AssertionError("shapes")) is None
    assert outer_error(KeyError("status")) is None


def test_an_ascii_terminal_shows_an_error_with_any_character(tmp_path):
    path = tmp_path / "数学\u202e.yaml"
    path.write_text("data: [", encoding="utf-8")
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PATH": "/usr/bin", "PYTHONUTF8": "0"}
    program = "import sys; from cropi_core.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", str(path), "--root", str(tmp_path)],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert b"error: " in done.stderr
    assert b"Traceback" not in done.stderr


# -- outputs --------------------------------------------------------------------------------------------------


def test_an_output_belongs_to_its_inputs(tmp_path):
    out = tmp_path / "a" / "rollouts"
    claim_output(out, {"policy": "x", "seed": 0})
    claim_output(out, {"policy": "y", "seed": 0})  # nothing was written yet
    out.mkdir()
    claim_output(out, {"policy": "y", "seed": 0})
    with pytest.raises(ConfigError, match=r"policy was y and is x; seed was 0 and is 1\. Give another --out"):
        claim_output(out, {"policy": "x", "seed": 1})
    out.rmdir()
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ConfigError, match="other inputs"):
        claim_output(out, {"policy": "x"}, tmp_path / "scratch")


def test_the_content_of_inputs_counts_and_not_their_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00000.parquet").write_bytes(b"x")
    assert files_digest(tmp_path / "a") == files_digest(tmp_path / "b")
    (tmp_path / "b" / "part-00000.parquet").write_bytes(b"y")
    assert files_digest(tmp_path / "a") != files_digest(tmp_path / "b")


@pytest.mark.parametrize("path", ["s3://bucket/x", "S3://bucket/x", "s3:/bucket/x", "gs:/x"])
def test_an_address_never_becomes_a_local_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is an address"):
        local_path(path)
    done = CliRunner().invoke(app, ["selection", "--scores", "x.parquet", "--out", path])
    assert isinstance(done.exception, ConfigError)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Prompts, and rollouts of the embedded policy."""
    directory = tmp_path_factory.mktemp("sampled")
    for name, seed in (("p", 0), ("q", 1)):
        write_prompts(build({"copy": 3}, "pool", seed), directory / f"{name}.parquet")
    collect(directory, "p")
    return directory


def collect(directory, prompts, policy=None, out="rollouts", seed=0, temperature=1.0, shard=2):
    sampling = Sampling(samples=2, max_new_tokens=4, temperature=temperature)
    return sample_rollouts(
        policy=Checkpoint(policy or base_checkpoint(), digest=str(policy)),
        prompts=directory / f"{prompts}.parquet",
        out=directory / out,
        plan=RolloutPlan(sampling, seed, shard),
        grading=Grading(),
        runtime=Runtime(device="cpu", threads=1),
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"policy": "other"}, "its policy is None, not "),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"temperature": 0.5}, "its sampling is .*not "),
        ({"prompts": "q"}, "its prompts are others"),
        ({"shard": 3}, "its prompts are others"),
    ],
)
def test_rollouts_of_other_inputs_are_not_reused(sampled, tmp_path, changed, words):
    if "policy" in changed:
        changed = {"policy": save_tiny(tmp_path / "tiny")}
    before = {path: path.read_bytes() for path in (sampled / "rollouts").iterdir()}
    with pytest.raises(ConfigError, match=words):
        collect(sampled, **{"prompts": "p", **changed})
    assert collect(sampled, "p")["prompts"] == 3
    assert {path: path.read_bytes() for path in (sampled / "rollouts").iterdir()} == before


def test_a_command_with_another_seed_is_refused(sampled, tmp_path):
    command = ["rollouts", "--policy", "embedded", "--prompts", str(sampled / "p.parquet"), "--out"]
    options = [str(tmp_path / "out"), "-o", "sampling.samples=1", "-o", "sampling.max_new_tokens=3", "--json"]
    first = CliRunner().invoke(app, [*command, *options])
    assert first.exit_code == 0, first.exception
    again = CliRunner().invoke(app, [*command, *options])
    assert again.exit_code == 0, again.exception
    other = CliRunner().invoke(app, [*command, *options, "--seed", "1"])
    assert isinstance(other.exception, CropiError)
    assert "seed was 0 and is 1" in str(other.exception)
