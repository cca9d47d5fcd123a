"""A whole run graded by the user's own function and by a server: partial credit, keys, processes, names."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.errors import ConfigError
from cropi_core.prompts.loading import write_prompts
from cropi_core.rewards.cache import SHARED
from cropi_core.rewards.keys import grading_of
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import build
from flows.rerun import changed_spec
from tests.support.tiny import computed, digests, go, origins, tiny

PARTIAL = """
def partial(completion, answer):
    return sum(a == b for a, b in zip(completion, answer)) / max(len(completion), len(answer))
"""
GRADED = {"rollouts/pool@1", "rollouts/goal@1", "policy@1", "evaluation@0", "evaluation@1"}


def tables(directory, verifier):
    """Write pool and set as prompts tables in which ``verifier`` grades."""
    sources = {}
    for name, split, count in (("pool", "pool", 16), ("goal", "validation", 8)):
        table = build({"reverse": count}, split, 0)
        place = table.schema.get_field_index("verifier")
        table = table.set_column(place, table.schema.field(place), [[verifier] * table.num_rows])
        write_prompts(table, directory / f"{name}.parquet")
        sources[name] = {"kind": "file", "path": str(directory / f"{name}.parquet")}
    return {"pool": sources["pool"], "validation": {"goal": sources["goal"]}, "test": {}}


def config(directory, verifier="mine", **changes):
    return tiny(
        stages=1,
        data=tables(directory, verifier),
        selection={"ratio": 0.5},
        rollouts={
            "pool": {"samples": 4, "max_new_tokens": 12},
            "validation": {"samples": 4, "max_new_tokens": 12},
        },
        **changes,
    )


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("functions")
    (directory / "mine.py").write_text(PARTIAL)
    made = config(directory, grading={"functions": {"mine": f"{directory / 'mine.py'}:partial"}})
    return made, directory, go(made, directory / "root")


def test_partial_credit_goes_through_a_whole_run(graded):
    _, directory, record = graded
    store = Store(directory / "root")
    rewards = read_rollouts(store.path(record.slots["rollouts/pool@1"].ref) / "parts")["reward"].to_pylist()
    assert any(0 < reward < 1 for reward in rewards)
    figures = json.loads((store.path(record.slots["evaluation@1"].ref) / "accuracy.json").read_text())["goal"]
    rows = pq.read_table(store.path(record.slots["evaluation@1"].ref) / "completions.parquet")
    assert figures["accuracy"] == pytest.approx(sum(rows["reward"].to_pylist()) / rows.num_rows)
    assert figures["low"] <= figures["accuracy"] <= figures["high"]
    assert figures["prompts"] <= figures["effective_samples"] <= figures["completions"]
    summary = store.manifest(record.slots["rollouts/pool@1"].ref).summary
    assert sum(summary["pass_rate_histogram"]) == summary["prompts"]


def test_steps_in_processes_of_their_own_grade_alike(graded, tmp_path):
    made, directory, record = graded
    root = shutil.copytree(directory / "root", tmp_path / "root")
    again = {"rollouts/pool@1", "policy@1", "evaluation@1"}
    for slot in again:
        Store(root).discard(record.slots[slot].ref.key)
    runtime = made.runtime.model_copy(update={"mode": "subprocess"})
    other = go(made.model_copy(update={"runtime": runtime}), root)
    assert computed(other) == again
    assert digests(other) == digests(record)


def test_a_changed_function_grades_again_what_it_graded_and_nothing_else(graded):
    made, directory, record = graded
    assert set(origins(go(made, directory / "root")).values()) == {"cached"}
    file = directory / "mine.py"
    try:
        file.write_text(PARTIAL.replace("return ", "return 0.5 * "))
        again = go(made, directory / "root")
    finally:
        file.write_text(PARTIAL)
    computed = {slot for slot, origin in origins(again).items() if origin == "computed"}
    assert computed >= GRADED
    assert {slot for slot in computed if slot.startswith("prompts")} == set()
    store = Store(directory / "root")
    before, after = (
        read_rollouts(store.path(run.slots["rollouts/pool@1"].ref) / "parts") for run in (record, again)
    )
    assert before["text"] == after["text"]
    assert after["reward"].to_pylist() == pytest.approx([r / 2 for r in before["reward"].to_pylist()])


def test_a_graded_step_can_be_repeated_alone(graded):
    made, directory, record = graded
    spec = changed_spec(Store(directory / "root"), record, "rollouts/pool@1", {"seed": 5}, {})
    assert grading_of(spec) == made.grading


def test_an_undefined_verifier_is_reported_before_sampling(tmp_path):
    with pytest.raises(ConfigError, match="pool: verifier 'mine' is none of exact, numeric, math, choice"):
        go(config(tmp_path), tmp_path / "root")
    assert not list(Store(tmp_path / "root").keys("rollouts"))


class Half(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        hit = body["completion"] == body["answer"] and body["prompt"][0]["role"] == "user"
        raw = json.dumps({"reward": 0.5 * hit}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


def test_a_server_grades_a_whole_run(tmp_path):
    SHARED._rewards.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        record = go(config(tmp_path, "judge", grading={"http": {"judge": {"url": url}}}), tmp_path / "root")
        server.shutdown()
    rows = read_rollouts(
        Store(tmp_path / "root").path(record.slots["rollouts/pool@1"].ref) / "parts"
    ).to_pylist()
    answers = dict(
        zip(*[build({"reverse": 16}, "pool", 0)[n].to_pylist() for n in ("prompt_id", "answer")], strict=True)
    )
    assert [row["reward"] for row in rows] == [
        0.5 * (row["text"] == answers[row["prompt_id"]]) for row in rows
    ]
    assert {row["reward"] for row in rows} == {0.0, 0.5}
