"""Rollouts with vLLM servers: the same distribution for every order, interruption and server failure."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cropi_core.errors import ServerError
from cropi_core.planning.prediction import predict
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.policy.loading import load_policy, render
from cropi_core.progress import silent
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts.collect import RolloutPlan, sample_rollouts
from cropi_core.rollouts.parity import measure
from cropi_core.rollouts.table import read_rollouts
from cropi_core.rollouts.vllm.checks import Expected
from cropi_core.rollouts.vllm.fleet import Endpoint
from cropi_core.rollouts.vllm.sampler import VllmServers, vocabulary_of
from cropi_core.rollouts.vllm.server import SERVED
from cropi_core.world import base_checkpoint, build
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import PROMPTS
from data_schemas.vllm import Vllm
from tests.support.models import save_tiny
from tests.support.servers import FAST, gone, left_of, ready, require_vllm, serving
from tests.support.tiny import tiny

# A start takes 30 s on two idle cores, and several times that on busy ones.
pytestmark = [pytest.mark.extended, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

FOUR = Sampling(samples=4, max_new_tokens=12)


def run(out, prompts, vllm, *, policy=None, sampling=FOUR, shard=4, seed=0, report=silent, dtype="float32"):
    return sample_rollouts(
        policy=Checkpoint(policy or base_checkpoint(), dtype, "d"),
        prompts=prompts,
        out=out,
        plan=RolloutPlan(sampling, seed, shard, "vllm"),
        grading=Grading(),
        runtime=Runtime(device="cpu", threads=1, vllm=vllm),
        report=report,
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    write_prompts(build({"reverse": 10, "copy": 6, "noise": 4}, "pool", 0), path)
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Return more prompts than a server can answer before the first shards trigger its kill."""
    path = tmp_path_factory.mktemp("many") / "p.parquet"
    write_prompts(build({"reverse": 200}, "pool", 0), path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return the embedded policy with other weights."""
    directory = tmp_path_factory.mktemp("other") / "policy"
    shutil.copytree(base_checkpoint(), directory)
    model, _ = load_policy(directory, "float32", "cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def servers(tmp_path_factory, other):
    """Start a server of the embedded policy, and a misconfigured one."""
    require_vllm()
    logs = tmp_path_factory.mktemp("logs")
    # With so few tokens per step, prompts would be prefilled in two chunks, which vLLM 0.32 does not survive on a CPU
    # unless this is turned off.
    few = {"arguments": [*FAST["arguments"], "--max-num-batched-tokens=128"]}
    raw = {"processed_logprobs": "raw_logprobs", str(other): other.name}
    with (
        serving(base_checkpoint(), logs, name="good", **few) as good,
        # A relative path, so that the client cannot tell which checkpoint is served.
        serving(other, logs, name="wrong", replaced=raw, cwd=other.parent) as wrong,
    ):
        ready(good, wrong)
        yield {"good": good, "wrong": wrong}


@pytest.fixture
def attach(servers, monkeypatch):
    """Return settings that attach to a server."""

    def settings(name="good", **more):
        monkeypatch.setenv("CROPI_VLLM_API_KEY", servers[name].key)
        return Vllm(base_urls=[f"{servers[name].url}/v1"], recovery_s=2, **more)

    return settings


@pytest.fixture(scope="module")
def model():
    return load_policy(base_checkpoint(), "float32", "cpu")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.4, 0.8)])
def test_logprobs_equal_those_of_a_forward_pass(attach, prompts, tmp_path, model, temperature, top_p):
    """For every token, not a sample: a mean error of 1e-5 per token, at T ≠ 1 and with top-p."""
    sampling = Sampling(samples=4, max_new_tokens=12, temperature=temperature, top_p=top_p)
    summary = run(tmp_path / "r", prompts, attach(), sampling=sampling)
    rows = read_rollouts(tmp_path / "r").to_pylist()
    found = measure(
        model[0], [(r["prompt_ids"], r["completion_ids"], r["behavior_logprobs"]) for r in rows], sampling
    )
    assert found.tokens > 300
    assert found.mean < 1e-5
    assert found.maximum < 1e-3
    assert found.outside == 0
    told = summary["parity"]
    assert told["completions"] == min(4 * 4, 8) * 5
    assert 0 < told["mean_difference"] < 1e-5
    assert told["max_difference"] <= found.maximum + 1e-9
    assert told["warning"] == ""


def test_the_distribution_is_that_of_the_other_engine(attach, tmp_path, model):
    """Shares of the most likely completions of one prompt, 400 draws by each engine."""
    path = tmp_path / "p.parquet"
    write_prompts(build({"sort": 1}, "pool", 3), path)
    sampling = Sampling(samples=400, max_new_tokens=12)
    run(tmp_path / "v", path, attach(), sampling=sampling)
    rows = read_rollouts(tmp_path / "v").to_pylist()
    drawn = {tuple(r["completion_ids"]) for r in rows}
    share = {c: sum(tuple(r["completion_ids"]) == c for r in rows) / 400 for c in drawn}
    said = {tuple(r["completion_ids"]): np.exp(sum(r["behavior_logprobs"])) for r in rows}
    likely = [c for c in drawn if said[c] > 0.02]
    assert likely
    for completion in likely:
        p = said[completion]
        assert abs(share[completion] - p) < 4 * np.sqrt(p * (1 - p) / 400)


def test_tokens_in_tokens_out(attach, prompts, tmp_path, model):
    """The template's ids, an end token only if the policy generated it, truncation reported."""
    summary = run(tmp_path / "r", prompts, attach(), sampling=Sampling(samples=4, max_new_tokens=3))
    _, tokenizer = model
    by_id = {row["prompt_id"]: row for row in pq.read_table(prompts).to_pylist()}
    rows = read_rollouts(tmp_path / "r").to_pylist()
    assert [r["prompt_id"] for r in rows[::4]] == list(by_id)
    for row in rows:
        assert row["prompt_ids"] == render(tokenizer, by_id[row["prompt_id"]]["messages"])
        ended = row["completion_ids"][-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert tokenizer.eos_token_id not in row["completion_ids"][:-1]
        assert row["text"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["reward"] == float(row["text"].strip() == by_id[row["prompt_id"]]["answer"])
    assert summary["truncated"] == sum(r["finish_reason"] == "length" for r in rows) > 0


def same(a, b):
    """Return whether two rollouts are equal up to the rounding of log-probabilities."""
    a, b = read_rollouts(a), read_rollouts(b)
    for name in ("prompt_id", "sample", "completion_ids", "reward", "finish_reason"):
        assert a[name].to_pylist() == b[name].to_pylist(), name
    one, two = (np.concatenate(t["behavior_logprobs"].to_numpy()) for t in (a, b))
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_results_do_not_depend_on_order_or_shards(attach, prompts, tmp_path):
    run(tmp_path / "many", prompts, attach(concurrency=64))
    run(tmp_path / "one", prompts, attach(concurrency=1))
    run(tmp_path / "whole", prompts, attach(), shard=64)
    same(tmp_path / "many", tmp_path / "one")
    same(tmp_path / "many", tmp_path / "whole")
    run(tmp_path / "seed", prompts, attach(), seed=1)
    drawn = [read_rollouts(tmp_path / n)["completion_ids"].to_pylist() for n in ("many", "seed")]
    assert drawn[0] != drawn[1]
    assert len(set(map(tuple, drawn[0]))) > 10


def test_a_missing_part_alone_is_sampled_again(attach, prompts, tmp_path):
    run(tmp_path / "whole", prompts, attach())
    shutil.copytree(tmp_path / "whole", tmp_path / "gap")
    (tmp_path / "gap" / "part-00002.parquet").unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "gap").iterdir()}
    run(tmp_path / "gap", prompts, attach())
    same(tmp_path / "whole", tmp_path / "gap")
    assert all((tmp_path / "gap" / name).stat().st_mtime_ns == at for name, at in kept.items())


# -- wrong servers ---------------------------------------------------------------------------------------------


def test_another_checkpoint_is_named_by_its_files(attach, prompts, tmp_path, other):
    with pytest.raises(ServerError, match=r"serves .*base, the policy is .*policy: model.safetensors differ"):
        run(tmp_path / "r", prompts, attach(), policy=other)
    assert not list((tmp_path / "r").iterdir())


def test_other_weights_are_found_by_their_logprobs(attach, prompts, tmp_path):
    with pytest.raises(ServerError, match=r"not those of .*mean \|Δ\| .*max_mean_difference is 0.001"):
        run(tmp_path / "r", prompts, attach("wrong"))


def test_a_server_that_serves_other_weights_after_its_check_is_named(servers, model, tmp_path):
    """The address of a checked server leads to another one afterwards, as after a restart behind a proxy."""
    good, wrong = servers["good"], servers["wrong"]
    sampling = Sampling(samples=2, max_new_tokens=8)
    words = [[{"role": "user", "content": f"copy: ab{i}"}] for i in range(3)]
    shards = {0: [(f"p{i}", render(model[1], one)) for i, one in enumerate(words)]}
    settings = Vllm(base_urls=[f"{good.url}/v1"], recovery_s=2)
    checked = VllmServers(base_checkpoint(), "float32", settings, tmp_path)
    checked.endpoints = [Endpoint(good.url, SERVED, good.key)]
    checked.expected = Expected(base_checkpoint(), "float32", model[0], vocabulary_of(*model), 64)
    assert [index for index, _, _ in checked.sample(shards, sampling, 0)] == [0]
    checked.endpoints = [Endpoint(wrong.url, SERVED, wrong.key)]
    with pytest.raises(
        ServerError, match=rf"no server is left.*{wrong.url}: shard 0: its log-prob.* differ by"
    ):
        list(checked.sample(shards, sampling, 0))


def test_raw_logprobs_are_refused(attach, prompts, tmp_path, other):
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        run(tmp_path / "r", prompts, attach("wrong"), policy=other)


def test_another_vocabulary_is_refused(attach, prompts, tmp_path):
    import json

    policy = save_tiny(tmp_path / "policy")
    model, _ = load_policy(policy, "float32", "cpu")
    model.resize_token_embeddings(60)
    model.save_pretrained(policy)
    assert json.loads((policy / "config.json").read_text())["vocab_size"] == 60
    with pytest.raises(ServerError, match=r"refuses token id 59, the policy's vocabulary has 60 ids"):
        run(tmp_path / "r", prompts, attach("wrong"), policy=policy)


def test_a_context_that_is_too_short_is_refused(attach, prompts, tmp_path):
    policy = save_tiny(tmp_path / "policy")  # it supports 128 tokens
    with pytest.raises(ServerError, match=r"max_model_len=64, .* takes 1\d\d tokens"):
        run(tmp_path / "r", prompts, attach(), policy=policy, sampling=Sampling(max_new_tokens=100))


def test_a_wrong_key_and_a_missing_server_are_reported(attach, prompts, tmp_path, monkeypatch):
    settings = attach()
    monkeypatch.setenv("CROPI_VLLM_API_KEY", "other")
    with pytest.raises(ServerError, match="asks for a key: export CROPI_VLLM_API_KEY"):
        run(tmp_path / "r", prompts, settings)
    with pytest.raises(ServerError, match=r"127.0.0.1:9 cannot be used: ConnectError.*base_urls"):
        run(tmp_path / "r", prompts, Vllm(base_urls=["http://127.0.0.1:9/v1"]))


def test_a_limit_that_is_passed_warns_or_stops(attach, prompts, tmp_path):
    summary = run(tmp_path / "warned", prompts, attach(max_difference=1e-12))
    assert "more than runtime.vllm.max_difference=1e-12" in summary["parity"]["warning"]
    with pytest.raises(ServerError, match="max_mean_difference is 1e-12"):
        run(tmp_path / "stopped", prompts, attach(max_mean_difference=1e-12))


# -- started servers and their end ------------------------------------------------------------------------------


def test_a_dead_server_is_removed(servers, prompts, tmp_path, monkeypatch):
    """Of two servers one is killed after the first shard: the other continues, with the results that it gives alone."""
    good = servers["good"]
    monkeypatch.setenv("CROPI_VLLM_API_KEY", good.key)
    run(tmp_path / "whole", prompts, Vllm(base_urls=[f"{good.url}/v1"]))
    with serving(base_checkpoint(), tmp_path, name="mortal", key=good.key) as mortal:
        ready(mortal)

        def kill_after_a_shard(progress):
            if progress.done >= 4 and mortal.exit_status is None:
                os.killpg(mortal.group, signal.SIGKILL)
                mortal.process.wait(20)

        both = Vllm(base_urls=[f"{mortal.url}/v1", f"{good.url}/v1"], recovery_s=1, concurrency=2)
        run(tmp_path / "both", prompts, both, report=kill_after_a_shard)
        assert mortal.exit_status is not None
    same(tmp_path / "whole", tmp_path / "both")


def test_started_servers_that_die_are_reported_with_their_logs(attach, many, tmp_path):
    """Complete parts are kept; the error names server, status, log and what to do; the next call resumes."""
    require_vllm()
    mark = f"CROPI_TEST={tmp_path}"
    name, _, value = mark.partition("=")
    settings = Vllm(**{**FAST, "environment": {**FAST["environment"], name: value}}, concurrency=1)

    def kill_after_a_shard(progress):
        if progress.done >= 4:
            for pid in left_of(mark):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"api_server" in command and b"guard.py" not in command:
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(ServerError) as told:
        run(tmp_path / "r", many, settings, shard=4, report=kill_after_a_shard)
    assert "no server is left" in str(told.value)
    assert "exit 137" in str(told.value)
    assert str(tmp_path / "r.logs" / "server-0.log") in str(told.value)
    assert gone(mark)
    assert list((tmp_path / "r").iterdir())
    run(tmp_path / "r", many, attach(), shard=4)
    assert read_rollouts(tmp_path / "r").num_rows == 800


def test_nothing_is_left_of_a_collection_that_was_killed(attach, many, tmp_path):
    """SIGKILL while parts are written: its servers end, and resuming gives the result of an uninterrupted run."""
    run(tmp_path / "whole", many, attach(), shard=4)
    mark = f"CROPI_TEST={tmp_path}"
    name, _, value = mark.partition("=")
    code = f"""
import sys; sys.path[:0] = {[p for p in sys.path if p]!r}
from pathlib import Path
from tests.cropi_core.rollouts.test_vllm import FAST, Vllm, run
vllm = Vllm(**{{**FAST, "environment": {{**FAST["environment"], {name!r}: {value!r}}}}}, concurrency=1)
if __name__ == "__main__":
    run(Path({str(tmp_path / "killed")!r}), Path({str(many)!r}), vllm, shard=4)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 900
    while len(list((tmp_path / "killed").glob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    assert left_of(mark)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert gone(mark)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("part-*.parquet")}
    assert 2 <= len(kept) < 50
    run(tmp_path / "killed", many, attach(), shard=4)
    same(tmp_path / "whole", tmp_path / "killed")
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in kept.items())


def test_a_server_that_cannot_start_says_why(prompts, tmp_path):
    require_vllm()
    settings = Vllm(**{**FAST, "arguments": ["--no-such-argument"]})
    with pytest.raises(
        ServerError, match=r"(?s)ended while it started \(exit 2\): .*server-0.log.*no-such-argument"
    ):
        run(tmp_path / "r", prompts, settings)


def test_a_plan_measures_the_servers(attach, tmp_path):
    """Calibration measures the servers themselves, and evaluation's own engine as well."""
    attached = attach().model_dump()
    changes = {"stages": 1, "rollouts": {"engine": "vllm"}, "runtime": {"vllm": attached}}
    (tmp_path / "plan").mkdir()
    plan = predict(tiny(**changes), tmp_path / "root", tmp_path / "plan", calibrated=True)
    steps = {step["slot"]: step for step in plan["steps"]}
    assert steps["rollouts/pool@1"]["tokens_generated"] > 40 * 4
    assert 0 < steps["rollouts/pool@1"]["seconds"] < 120
    assert 0 < steps["evaluation@0"]["seconds"] < 120
    assert any("2 steps sample by running servers" in note for note in plan["notes"])


@pytest.mark.skipif(
    not os.environ.get("CROPI_SMOLLM2"), reason="CROPI_SMOLLM2 names no checkpoint of SmolLM2-135M-Instruct"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model(tmp_path, dtype):
    """SmolLM2-135M with tied embeddings, grouped queries and a chat template: within the limits of its dtype."""
    require_vllm()
    asked = ["What is 17 + 25?", "Name three colours.", "Write one sentence about rain.", "Count to five."]
    rows = [
        {
            "prompt_id": f"q{i}",
            "source": "own",
            "messages": [{"role": "user", "content": text}],
            "answer": "42",
            "verifier": "numeric",
            "level": None,
            "tags": [],
        }
        for i, text in enumerate(asked)
    ]
    write_prompts(pa.Table.from_pylist(rows, schema=PROMPTS), tmp_path / "p.parquet")
    sampling = Sampling(samples=4, temperature=0.8, top_p=0.95, max_new_tokens=32)
    policy = Path(os.environ["CROPI_SMOLLM2"])
    summary = run(
        tmp_path / "r",
        tmp_path / "p.parquet",
        Vllm(**FAST, parity_completions=16),
        policy=policy,
        sampling=sampling,
        dtype=dtype,
    )
    found = summary["parity"]
    print(dtype, found)
    assert found["completions"] == 16
    assert found["tokens"] > 200
    assert 0 < found["mean_difference"] < {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    assert found["max_difference"] < {"float32": 2e-2, "bfloat16": 1.0}[dtype]
