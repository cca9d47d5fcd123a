"""vLLM without a server: validation of answers, process lifetime, settings, and the comparison of log-probabilities."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from pydantic import ValidationError

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.errors import ConfigError, ServerError, StepError
from cropi_core.rollouts.parity import Parity, measure, truncated_logprobs
from cropi_core.rollouts.sampling import sample_completions
from cropi_core.rollouts.vllm.client import Job, TransientError, Vocabulary, completions_of, request_body
from cropi_core.rollouts.vllm.fleet import Endpoint, Fleet
from cropi_core.rollouts.vllm.interpreter import find_interpreter, remembered_version, vllm_version
from cropi_core.rollouts.vllm.sampler import request_seed
from cropi_core.rollouts.vllm.server import command_line, environment_of
from cropi_core.system import guard
from data_schemas.rollouts import Sampling
from data_schemas.vllm import Vllm
from tests.campaigns.servers import Peer as HostilePeer
from tests.support.models import tiny_model
from tests.support.servers import gone, left_of
from tests.support.tiny import tiny

TWO = Sampling(samples=2, max_new_tokens=3)
WORDS = Vocabulary(10, 10, (2,))
JOB = Job(0, "a", [1, 5], 7)


def choice(index, ids, logprobs=None, reason="stop", **more):
    values = [-0.5] * len(ids) if logprobs is None else logprobs
    told = {"token_ids": ids, "logprobs": {"token_logprobs": values}, "finish_reason": reason}
    return {"index": index, "prompt_token_ids": JOB.prompt, **told, **more}


def answer(*choices):
    return json.dumps({"choices": choices}).encode()


GOOD = (choice(1, [4, 2]), choice(0, [3, 4, 5], reason="length"))


def test_samples_are_put_in_their_order():
    first, second = completions_of(answer(*GOOD), JOB, TWO, WORDS)
    assert (first.ids, first.finish_reason) == ([3, 4, 5], "length")
    assert (second.ids, second.logprobs, second.finish_reason) == ([4, 2], [-0.5, -0.5], "stop")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"<html>", "Expecting value"),
        (b"[1]", "no list of choices"),
        (b'{"choices": 3}', "no list of choices"),
        (answer(GOOD[0]), "1 choices for n=2"),
        (answer(GOOD[0], GOOD[0]), "2 choices for n=2"),
        (answer(GOOD[0], {**GOOD[1], "index": []}), "2 choices for n=2"),
        (answer(GOOD[0], {**GOOD[1], "prompt_token_ids": [1, 6]}), "changed the prompt"),
        (answer(GOOD[0], {**GOOD[1], "token_ids": None}), "return_token_ids"),
        (answer(GOOD[0], choice(0, [])), "token_ids are missing"),
        (answer(GOOD[0], choice(0, [3, True, 2])), "token_ids are missing"),
        (answer(GOOD[0], choice(0, [3, 4, 5, 2])), "4 tokens where max_tokens is 3"),
        (answer(GOOD[0], choice(0, [3, 10, 2])), "token id 10 for a vocabulary of 10"),
        (answer(GOOD[0], choice(0, [-1, 2])), "token id -1"),
        (answer(GOOD[0], choice(0, [3, 2], [-1.0])), "1 log-probabilities for 2 tokens"),
        (answer(GOOD[0], {**GOOD[1], "logprobs": None}), "no log-probabilities for 3"),
        (answer(GOOD[0], choice(0, [3, 2], [-1.0, math.nan])), "not a finite number"),
        (answer(GOOD[0], choice(0, [3, 2], [-1.0, None])), "not a finite number"),
        (answer(GOOD[0], choice(0, [3, 2], [-1.0, 3.5])), "logits were sent"),
        (answer(GOOD[0], choice(0, [3, 4], reason="stop")), "finish_reason 'stop'"),
        (answer(GOOD[0], choice(0, [3, 2], reason="length")), "finish_reason 'length'"),
        (answer(GOOD[0], choice(0, [2, 3, 2])), "finish_reason 'stop'"),
        (answer(GOOD[0], choice(0, [3], reason="length")), "max_model_len is too small"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(raw, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        completions_of(raw, JOB, TWO, WORDS)


def test_a_request_that_a_dying_server_gave_up_is_tried_again():
    with pytest.raises(TransientError):
        completions_of(answer(GOOD[0], {**GOOD[1], "finish_reason": "abort"}), JOB, TWO, WORDS)


def test_every_parameter_of_the_distribution_is_sent():
    """The server's or the checkpoint's defaults would replace an omitted parameter."""
    body = request_body(JOB, "policy", TWO, WORDS)
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    neutral |= {"frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [2]}
    assert body.items() >= neutral.items()
    assert (body["temperature"], body["top_p"], body["n"], body["seed"]) == (1.0, 1.0, 2, 7)


def test_seeds_are_of_prompt_and_seed():
    seeds = {request_seed(s, f"p{i}") for s in range(20) for i in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)


# -- misbehaving servers, from the standard library -------------------------------------------------------------


class Peer:
    """A server with configured responses that counts the requests."""

    def __init__(self, status, body, health=200, fails=0):
        self.asked = 0
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                peer.asked += 1
                self.reply(503 if peer.asked <= fails else status, body)

            def do_GET(self):
                self.reply(health, b"")

            def reply(self, code, body):
                self.send_response(code)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def ask_all(jobs, *peers, **settings):
    vllm = Vllm(**({"recovery_s": 0.1, "concurrency": 3} | settings))
    with Fleet([Endpoint(p.url, "policy") for p in peers], vllm, TWO, WORDS) as fleet:
        return {job.index: completions for job, completions, _ in fleet.run(jobs)}


JOBS = [Job(i, f"p{i}", JOB.prompt, i) for i in range(12)]


def test_a_busy_server_is_retried():
    with Peer(200, answer(*GOOD), fails=5) as peer:
        assert ask_all(JOBS, peer, retries=6).keys() == set(range(12))
        assert peer.asked == 17


def test_a_request_that_always_fails_is_named_and_spares_the_servers():
    with Peer(500, b'{"error": {"message": "out of memory"}}') as peer:
        with pytest.raises(ServerError, match=r"p\d+ failed 3 times .*retries=2.*HTTP 500: out of memory"):
            ask_all(JOBS, peer, retries=2)
        assert peer.asked <= 3 * len(JOBS)


def test_a_failing_server_is_removed_and_the_others_continue():
    with Peer(503, b"", health=503) as sick, Peer(200, answer(*GOOD)) as well:
        assert ask_all(JOBS, sick, well).keys() == set(range(12))
        assert sick.asked <= 3  # no further requests after it was found to be faulty
        with pytest.raises(ServerError, match=r"no server is left, 12 of 12 .*/health answers 503"):
            ask_all(JOBS, sick)


def test_a_refusal_is_not_repeated():
    with Peer(400, b'{"error": {"message": "no such model"}}') as peer:
        with pytest.raises(ServerError, match=r"refused prompt p0 .*HTTP 400: no such model"):
            ask_all(JOBS[:1], peer)
        assert peer.asked == 1


def test_an_endless_answer_is_not_read_to_its_end():
    with (
        Peer(200, b"[" * (4 << 20)) as peer,
        pytest.raises(ServerError, match=r"more than \d+ bytes; it is not a vLLM server"),
    ):
        ask_all(JOBS[:1], peer)


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (404, b'{"error": {"message": "no such model"}}'), (200, answer(GOOD[0]))],
)
def test_a_server_with_unusable_answers_is_removed_and_the_others_continue(status, body, caplog):
    with Peer(status, body) as other, Peer(200, answer(*GOOD)) as well:
        assert ask_all(JOBS, other, well).keys() == set(range(12))
        assert other.asked <= 3
        assert f"{other.url} is no longer used" in caplog.text
        with pytest.raises(ServerError, match=r"no server is left, 12 of 12 "):
            ask_all(JOBS, other)


def test_an_answer_that_drips_is_given_up():
    peer = HostilePeer("drips", 0, "")
    with pytest.raises(ServerError, match=r"failed 2 times .*no whole answer within 0\.5 s"):
        ask_all(JOBS[:1], peer, request_timeout_s=0.5, retries=1)
    peer.stop()


def test_deeply_nested_json_is_refused():
    with Peer(200, b"[" * 500_000) as peer, pytest.raises(ServerError, match="cannot be used"):
        ask_all(JOBS[:1], peer)


# -- lifetime of started processes ------------------------------------------------------------------------------

SLEEP = "import time; time.sleep(99)"
TREE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["parent killed", "first process killed", "guard and first killed"])
def test_a_tree_of_processes_ends_whatever_dies_first(tmp_path, stop):
    """The parent that starts a server is killed with SIGKILL, or the server's first process is."""
    mark = f"CROPI_TEST={tmp_path}"
    name, _, value = mark.partition("=")
    code = f"""
import os, sys, time
sys.path[:0] = {[p for p in sys.path if p]!r}
from pathlib import Path
from cropi_core.rollouts.vllm.server import LocalServer
command = [sys.executable, "-c", {TREE!r}]
server = LocalServer(command, os.environ | {{{name!r}: {value!r}}}, 1, Path({str(tmp_path / "log")!r}))
print(server.group, server.process.pid, flush=True)
while server.exit_status is None:
    time.sleep(0.05)
server.stop()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    first, watcher = map(int, parent.stdout.readline().split())
    deadline = time.monotonic() + 500
    while len(left_of(mark)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left_of(mark)) == 3
    if stop == "parent killed":
        parent.kill()
    else:
        if stop == "guard and first killed":
            os.kill(watcher, signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
    assert gone(mark)
    parent.wait(500)


def test_the_guard_is_of_the_standard_library_alone():
    # The end of standard input would stop the command.
    with subprocess.Popen([sys.executable, "-I", guard.__file__, "false"], stdin=subprocess.PIPE) as started:
        assert started.wait(60) == 1


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vllm", "said"),
    [
        ({"arguments": ["--model=other"]}, "arguments holds --model=other"),
        ({"arguments": ["--trust_remote_code"]}, "arguments holds --trust_remote_code"),
        ({"gpus": ["0", "1"]}, "2 sets of GPUs for servers=1"),
        ({"base_urls": ["http://a:1/v1", "http://a:1/v1"]}, "names a server twice"),
        ({"base_urls": ["http://a:1/v1"], "servers": 2}, "servers is for servers that are started"),
        ({"base_urls": ["file:///etc/passwd"]}, "String should match"),
        ({"base_urls": ["http://user:secret@a:1/v1"]}, "String should match"),
        ({"model": "x"}, "model=x is for base_urls"),
    ],
)
def test_settings_that_contradict_are_refused(vllm, said):
    with pytest.raises(ValidationError, match=said):
        tiny(runtime={"vllm": vllm})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"engine": "vllm"}}, "evaluation.engine=vllm with runtime.vllm.base_urls"),
        ({"rollouts": {"refresh": "always"}}, "rollouts.refresh=always samples from the policies of later"),
        ({"diagnostics": {"spot_check": 5}}, "diagnostics.spot_check=5 samples"),
        ({"diagnostics": {"max_kl": 0.1}}, "a limit of diagnostics"),
    ],
)
def test_running_servers_have_one_policy(changes, said):
    attached = {"vllm": {"base_urls": ["http://a:1/v1"]}}
    rollouts = {"engine": "vllm"} | changes.get("rollouts", {})
    with pytest.raises(ValidationError, match=said):
        tiny(**{**changes, "rollouts": rollouts, "runtime": attached})
    tiny(rollouts={"engine": "vllm"}, runtime=attached)


def test_a_server_gets_what_the_logprobs_need(tmp_path):
    command = command_line("python", tmp_path, Vllm(arguments=["--max-model-len=99"]), "bfloat16", 64)
    pairs = dict(itertools.pairwise(command))
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--generation-config"] == "vllm"
    assert pairs["--load-format"] == "safetensors"
    assert pairs["--dtype"] == "bfloat16"
    assert "--max-model-len" not in command
    assert command[-1] == "--max-model-len=99"
    assert "--no-enable-chunked-prefill" not in command
    assert "--no-enable-chunked-prefill" in command_line("p", tmp_path, Vllm(), "float32", 64, cpu=True)


def test_an_eager_server_on_a_cpu_compiles_nothing_by_default(monkeypatch):
    name = "TORCH_COMPILE_DISABLE"
    monkeypatch.delenv(name, raising=False)
    eager = Vllm(arguments=["--enforce-eager"])
    assert environment_of(eager, 0, cpu=True)[name] == "1"
    assert name not in environment_of(eager, 0)
    assert name not in environment_of(Vllm(), 0, cpu=True)
    told = eager.model_copy(update={"environment": {name: "0"}})
    assert environment_of(told, 0, cpu=True)[name] == "0"


def test_an_interpreter_is_found_or_reported_as_missing(monkeypatch):
    monkeypatch.delenv("CROPI_VLLM_PYTHON", raising=False)
    assert str(find_interpreter(sys.executable)) == sys.executable
    with pytest.raises(ConfigError, match=r"runtime.vllm.python=/no/such is not an executable file"):
        find_interpreter("/no/such")
    monkeypatch.setenv("CROPI_VLLM_PYTHON", "/neither")
    with pytest.raises(ConfigError, match="CROPI_VLLM_PYTHON=/neither is not an executable file"):
        find_interpreter()
    with pytest.raises(ConfigError, match="cannot import vLLM: ModuleNotFoundError"):
        vllm_version(find_interpreter(sys.executable))


def test_an_import_is_remembered_until_a_package_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python, packages = tmp_path / "bin" / "python", tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").touch()
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho >> {tmp_path}/imports\necho 9.9\n")
    python.chmod(0o700)
    assert [remembered_version(python) for _ in range(3)] == [("9.9", False), ("9.9", True), ("9.9", True)]
    (packages / "torchvision-1.dist-info").mkdir()
    assert remembered_version(python) == ("9.9", False)
    assert (tmp_path / "imports").read_text() == "\n\n"
    (tmp_path / "cache" / "cropi" / "vllm-versions.json").write_text("[]")
    assert remembered_version(python) == ("9.9", False)
    python.write_text("#!/bin/sh\necho 'ImportError: torchvision' >&2\nexit 1\n")
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(ConfigError, match="cannot import vLLM: ImportError: torchvision"):
            remembered_version(python)


# -- the comparison ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8)])
def test_cropis_sampler_has_no_distance(temperature, top_p):
    model, tokenizer = tiny_model()
    prompts = [("a", [1, 5, 6, 7]), ("b", [1, 9])]
    sampling = Sampling(samples=5, temperature=temperature, top_p=top_p, max_new_tokens=10)
    groups = sample_completions(model, tokenizer, prompts, sampling, seed=1, rows=7)
    rows = [(p[1], c.ids, c.logprobs) for p, g in zip(prompts, groups, strict=True) for c in g]
    found = measure(model, rows, sampling)
    assert (found.completions, found.outside) == (10, 0)
    assert found.maximum < 1e-4
    shifted = measure(model, [(p, c, [lp - 0.25 for lp in lps]) for p, c, lps in rows], sampling)
    assert abs(shifted.mean - 0.25) < 1e-4
    assert Parity.from_json(found.to_json()) == found
    assert found + Parity() == found


def test_a_token_outside_the_nucleus_is_reported_and_gets_a_finite_number():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = [truncated_logprobs(logits, torch.tensor([i]), 1.0, 0.75) for i in range(3)]
    assert [bool(k) for _, k in kept] == [True, True, False]
    values = torch.cat([v for v, _ in kept]).exp()
    torch.testing.assert_close(values, torch.tensor([0.5, 0.3, 0.2]) / 0.8)


# -- keys ----------------------------------------------------------------------------------------------------


def rollout_key(root, **changes):
    """Return the key of the pool's rollouts; the preceding steps are computed, the rollouts are not."""
    store = Store(root)
    found = []

    def execute(spec):
        if spec.step == "rollouts":
            found.append(spec.key)
            raise StepError("far enough")
        return run_step(spec, store)

    with pytest.raises(StepError, match="far enough"):
        run_curriculum(tiny(**changes), store, execute)
    return found[0]


def test_the_engine_is_in_the_key_and_its_servers_are_not(tmp_path):
    plain = rollout_key(tmp_path)
    assert rollout_key(tmp_path, rollouts={"engine": "transformers"}) == plain
    by_vllm = rollout_key(tmp_path, rollouts={"engine": "vllm"})
    assert by_vllm != plain
    for servers in (
        {"base_urls": ["http://a:1/v1"]},
        {"servers": 3, "concurrency": 7, "max_difference": 1.0},
    ):
        changed = {"rollouts": {"engine": "vllm"}, "runtime": {"vllm": servers}}
        assert rollout_key(tmp_path, **changed) == by_vllm
