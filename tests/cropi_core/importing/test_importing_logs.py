"""Logs of other trainers in their own formats: logged values are imported unchanged, missing ones are computed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.errors import ConfigError, DataError
from cropi_core.importing.log_formats import read_log
from cropi_core.importing.logs import LogSource, import_log
from cropi_core.importing.turns import TurnsError, conversation_tokens
from cropi_core.policy.checkpoint import Checkpoint, tree_digest
from cropi_core.policy.loading import load_policy, render, turn_end
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts.collect import RolloutPlan, sample_rollouts
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import base_checkpoint, build
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from tests.support.features import extract
from tests.support.paths import CHECKOUT

SAMPLING = Sampling(samples=4, max_new_tokens=12, temperature=1.3)
COLUMNS = ["prompt_id", "sample", "prompt_ids", "completion_ids", "text", "reward", "finish_reason"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Return rollouts of the embedded policy, which the import of a log of the same run must reproduce."""
    directory = tmp_path_factory.mktemp("ours")
    table = build({"reverse": 6, "copy": 4, "noise": 2}, "pool", 0)
    write_prompts(table, directory / "prompts.parquet")
    sample_rollouts(
        policy=Checkpoint(base_checkpoint(), digest="d"),
        prompts=directory / "prompts.parquet",
        out=directory / "parts",
        plan=RolloutPlan(SAMPLING),
        grading=Grading(),
        runtime=Runtime(device="cpu", threads=1),
    )
    prompts = {row["prompt_id"]: row for row in table.to_pylist()}
    return directory / "prompts.parquet", prompts, read_rollouts(directory / "parts")


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def verl(directory, prompts, rows):
    """Write like `_dump_generations`: decoded prompts and responses without special tokens, a file per step."""
    _, tokenizer = load_policy(base_checkpoint(), "float32", "cpu")
    logged = [
        {
            "input": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
            "output": tokenizer.decode(row["completion_ids"], skip_special_tokens=True),
            "gts": prompts[row["prompt_id"]]["answer"],
            "score": row["reward"],
            "step": 10,
            "acc": row["reward"] == 1.0,
        }
        for row in rows
    ]
    lines(directory / "10.jsonl", logged)


def trl(directory, prompts, rows):
    """Write like `GRPOTrainer.log` for a conversational dataset, through pandas' Parquet."""
    table = pa.table(
        {
            "step": [3] * len(rows),
            "prompt": [prompts[row["prompt_id"]]["messages"] for row in rows],
            "completion": [[{"role": "assistant", "content": row["text"]}] for row in rows],
            "accuracy_reward": [row["reward"] for row in rows],
            "advantage": [0.0] * len(rows),
        }
    )
    (directory / "completions").mkdir(parents=True)
    pq.write_table(table, directory / "completions" / "completions_00003.parquet")


def prime_rl(directory, prompts, rows, tokens=False):
    """Write like `save_rollouts` for verifiers' outputs, with or without the trajectory."""
    logged = []
    for i, row in enumerate(rows):
        one = {
            "example_id": i // 4,
            "task": "world",
            "prompt": prompts[row["prompt_id"]]["messages"],
            "completion": [{"role": "assistant", "content": row["text"], "tool_calls": None}],
            "answer": prompts[row["prompt_id"]]["answer"],
            "reward": row["reward"],
            "metrics": {"correct": row["reward"]},
            "is_completed": True,
            "is_truncated": row["finish_reason"] == "length",
            "stop_condition": "max_turns_reached",
            "error": None,
            "info": {},
        }
        if tokens:
            ids = {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"]}
            one["trajectory"] = [{"tokens": {**ids, "completion_logprobs": row["behavior_logprobs"]}}]
        logged.append(one)
    failed = {"prompt": logged[0]["prompt"], "completion": [], "reward": 0.0, "error": "TimeoutError"}
    lines(directory / "rollouts" / "step_7" / "train_rollouts.jsonl", [*logged, failed])


def cropi(directory, prompts, rows):
    """Write the format that the released code reads: one line per prompt, with lists of responses and rewards."""
    logged = []
    for i, (name, prompt) in enumerate(prompts.items()):
        group = [row for row in rows if row["prompt_id"] == name]
        texts, rewards = [row["text"] for row in group], [row["reward"] for row in group]
        question = prompt["messages"][-1]["content"]
        logged.append(
            {"id": i, "prompt": question, "answer": prompt["answer"], "responses": texts, "rewards": rewards}
        )
    lines(directory / "rollouts.jsonl", logged)


WRITERS = {"verl": verl, "trl": trl, "prime_rl": prime_rl, "cropi": cropi}


def imported(tmp_path, layout, prompts=None, sampling=SAMPLING, **options):
    store = Store(tmp_path / "root")
    reading = {name: options.pop(name) for name in ("reward", "on_bad_rows") if name in options}
    options = {"policy": Checkpoint(base_checkpoint(), digest="d"), "device": "cpu", **options}
    source = LogSource(tmp_path / "log", layout, **reading)
    ref = import_log(store, source, sampling=sampling, prompts=prompts, **options)
    return read_rollouts(store.path(ref) / "parts"), store.manifest(ref).summary


def close(one, other, limit=2e-4):
    pairs = zip(one["behavior_logprobs"].to_pylist(), other["behavior_logprobs"].to_pylist(), strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True)) < limit


@pytest.mark.parametrize("layout", WRITERS)
def test_rollouts_written_as_another_trainers_log_are_imported_equal(ours, tmp_path, layout):
    table, prompts, rollouts = ours
    WRITERS[layout](tmp_path / "log", prompts, rollouts.to_pylist())
    found, summary = imported(tmp_path, layout, table)
    if layout != "prime_rl":  # prime_rl's rows mark truncation
        assert any("does not say which completions were cut" in text for text in summary["approximations"])
    assert found.select(COLUMNS).equals(
        rollouts.select(COLUMNS).combine_chunks().cast(found.select(COLUMNS).schema)
    )
    assert close(found, rollouts)
    assert any("log-probabilities are our own forward's" in text for text in summary["approximations"])
    assert (summary["unmatched"], summary["text_changed"], summary["outside_top_p"]) == (0, 0, 0)
    assert summary["failed_rollouts"] == (1 if layout == "prime_rl" else 0)
    assert summary["steps"] == {"verl": [10], "trl": [3]}.get(layout, [])


def test_logged_tokens_and_log_probabilities_are_kept_and_compared(ours, tmp_path):
    _, prompts, rollouts = ours
    rows = rollouts.to_pylist()
    for row in rows:
        row["behavior_logprobs"] = [value - 0.25 for value in row["behavior_logprobs"]]
    prime_rl(tmp_path / "log", prompts, rows, tokens=True)
    found, summary = imported(tmp_path, "prime_rl", ours[0])
    assert found["completion_ids"].to_pylist() == [row["completion_ids"] for row in rows]
    assert found["behavior_logprobs"].to_pylist() == [
        pytest.approx(row["behavior_logprobs"], abs=1e-6) for row in rows
    ]
    assert summary["parity"]["mean_difference"] == pytest.approx(0.25, abs=1e-3)
    assert len(summary["approximations"]) == 1
    assert "are 0.25 a token from them" in summary["approximations"][0]


@pytest.mark.parametrize("layout", ["trl", "prime_rl"])
def test_without_a_table_prompts_are_derived_from_the_log(ours, tmp_path, layout):
    _, prompts, rollouts = ours
    WRITERS[layout](tmp_path / "log", prompts, rollouts.to_pylist())
    found, _ = imported(tmp_path, layout)
    assert found["prompt_ids"].to_pylist() == rollouts["prompt_ids"].to_pylist()
    assert len(set(found["prompt_id"].to_pylist())) == len(prompts)


def test_rows_outside_the_table_are_dropped_and_counted(ours, tmp_path):
    _, prompts, rollouts = ours
    verl(tmp_path / "log", prompts, rollouts.to_pylist())
    few = build({"reverse": 6}, "pool", 0)
    write_prompts(few, tmp_path / "few.parquet")
    known = set(few["prompt_id"].to_pylist()) & set(prompts)
    found, summary = imported(tmp_path, "verl", tmp_path / "few.parquet")
    assert set(found["prompt_id"].to_pylist()) == known
    assert summary["unmatched"] == rollouts.num_rows - 4 * len(known)
    write_prompts(build({"sort": 3}, "test", 5), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=f"none of the {rollouts.num_rows} completions") as raised:
        imported(tmp_path, "verl", tmp_path / "other.parquet")
    assert "{" not in str(raised.value)


def test_several_steps_count_as_one_policy_only_by_assumption(ours, tmp_path):
    table, prompts, rollouts = ours
    rows = rollouts.to_pylist()
    verl(tmp_path / "log", prompts, rows[:8])
    later = [
        json.loads(line) | {"step": 9} for line in (tmp_path / "log" / "10.jsonl").read_text().splitlines()
    ]
    lines(tmp_path / "log" / "9.jsonl", later)
    found, summary = imported(tmp_path, "verl", table)
    assert summary["steps"] == [9, 10]
    assert any("2 training steps, 9 to 10" in text for text in summary["approximations"])
    assert found["sample"].to_pylist() == [*range(8), *range(8)]


def test_rewards_that_no_function_gave_are_null(ours, tmp_path):
    table, prompts, rollouts = ours
    rows = rollouts.to_pylist()
    rows[0]["reward"] = None
    rows[1]["reward"] = float("nan")
    trl(tmp_path / "log", prompts, rows)
    found, summary = imported(tmp_path, "trl", table)
    assert found["reward"].to_pylist()[:3] == [None, None, rows[2]["reward"]]
    assert summary["not_gradable"] == 2


def test_the_reward_is_chosen_among_several_columns(ours, tmp_path):
    table, prompts, rollouts = ours
    trl(tmp_path / "log", prompts, rollouts.to_pylist())
    file = tmp_path / "log" / "completions" / "completions_00003.parquet"
    logged = pq.read_table(file)
    pq.write_table(logged.append_column("format_reward", [[0.5] * logged.num_rows]), file)
    with pytest.raises(ConfigError, match="accuracy_reward, format_reward; name one with --reward"):
        imported(tmp_path, "trl", table)
    assert set(imported(tmp_path, "trl", table, reward="format_reward")[0]["reward"].to_pylist()) == {0.5}
    with pytest.raises(ConfigError, match="no column of numbers called 'nope'"):
        imported(tmp_path, "trl", table, reward="nope")


FAULTY = {
    "verl": (
        [{"input": "a", "output": 1, "score": 0.0, "step": 1}, {"input": "a", "output": "b", "step": 1}],
        ["output is int, not str (row 1)", "score is NoneType, not a number (row 2)"],
    ),
    "prime_rl": (
        [
            {"prompt": "a", "completion": [{"role": "user", "content": "b"}] * 2, "reward": 1.0},
            {"nodes": [], "rewards": {}},
            {"prompt": "a", "completion": "b", "reward": 1.0, "trajectory": [{}, {}]},
            {"prompt": [{"role": "assistant", "content": "b"}], "completion": "b", "reward": 1.0},
        ],
        [
            "does not begin with a message of the assistant",
            "nodes is empty",
            "has 2 turns",
            "end with a question",
        ],
    ),
    "cropi": (
        [
            {"prompt": "a", "answer": "b", "responses": ["x"], "rewards": [1, 0]},
            {"prompt": "a", "responses": []},
        ],
        ["with a reward each in rewards (row 1)", "rewards is NoneType, not list (row 2)"],
    ),
}


@pytest.mark.parametrize("layout", FAULTY)
def test_every_fault_of_a_log_is_in_one_error(tmp_path, layout):
    rows, words = FAULTY[layout]
    lines(tmp_path / "log" / ("train_rollouts.jsonl" if layout == "prime_rl" else "1.jsonl"), rows)
    with pytest.raises(DataError) as raised:
        imported(tmp_path, layout)
    assert all(word in str(raised.value) for word in words), raised.value


def test_the_command_says_what_is_assumed(ours, tmp_path):
    table, prompts, rollouts = ours
    verl(tmp_path / "log", prompts, rollouts.to_pylist())
    options = ["--policy", "embedded", "--sampling", SAMPLING.model_dump_json(), "--device", "cpu"]
    root = ["--root", str(tmp_path / "root"), "--prompts", str(table)]
    done = CliRunner().invoke(
        app, ["artifacts", "import-log", "verl", str(tmp_path / "log"), *options, *root]
    )
    assert done.exit_code == 0, done.output
    assert "assumed: token ids are the texts'" in done.output
    (key,) = Store(tmp_path / "root").keys("rollouts")
    assert key in done.output
    assert Store(tmp_path / "root").manifest(key).summary["policy"] == tree_digest(base_checkpoint())


ASKED = [{"role": "user", "content": "What is 2+5?"}]


def said(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def prime(path, rows):
    lines(
        path / "train_rollouts.jsonl",
        [{"prompt": ASKED, "is_truncated": False, "error": None, **row} for row in rows],
    )
    return path


def test_a_batch_that_trl_logged_again_is_counted_once(tmp_path):
    batch = {
        "prompt": [ASKED] * 2,
        "completion": [said("7"), said("8")],
        "reward": [1.0, 0.0],
        "advantage": [1.0, -1.0],
    }
    for step in (1, 2, 3):
        completions = [said("7"), said("8")] if step < 3 else [said("7"), said("9")]
        table = pa.table({"step": [step] * 2, **batch, "completion": completions})
        pq.write_table(table, tmp_path / f"completions_{step:05d}.parquet")
    log = read_log(tmp_path, "trl")
    assert [one.text for one in log.completions] == ["7", "8", "7", "9"]
    assert log.repeated == 2


def test_reasoning_is_not_lost(tmp_path):
    rows = [{"completion": said("7", reasoning_content="2 and 5 make 7"), "reward": 1.0}]
    (one,) = read_log(prime(tmp_path, rows), "prime_rl").completions
    assert (one.text, one.reasoning) == ("7", "2 and 5 make 7")


def test_a_faulty_row_of_a_log_is_dropped_on_request(tmp_path):
    rows = [
        {"completion": said(None, reasoning_content="cut"), "reward": 1.0, "is_truncated": True},
        {"completion": said("7"), "reward": 1.0},
        {"completion": said("7 \ud83d"), "reward": 1.0},
        {"completion": said("7"), "reward": float("inf")},
        {"completion": said("7"), "reward": 10**400},
        {"completion": said([{"type": "text", "text": "7"}, {"type": "text", "text": "."}]), "reward": 0.0},
    ]
    path = prime(tmp_path, rows)
    with pytest.raises(DataError) as raised:
        read_log(path, "prime_rl")
    told = str(raised.value)
    assert all(
        words in told for words in ("cut while thinking", "surrogate", "(row 1)", "(row 3)", "infinite")
    )
    log = read_log(path, "prime_rl", drop=True)
    assert [one.text for one in log.completions] == ["7", "7."]
    assert sum(log.faults.dropped().values()) == 4


def test_a_trace_of_one_turn_is_read(tmp_path):
    nodes = [
        {"parent": None, "message": ASKED[0], "sampled": False, "token_ids": [1, 5], "mask": [False, False]},
        {
            "parent": 0,
            "message": said("7")[0],
            "sampled": True,
            "token_ids": [6, 10, 2, 9],
            "mask": [False, True, True, False],
            "logprobs": [-0.5, -0.25],
        },
    ]
    trace = {
        "nodes": nodes,
        "calls": [{"node": 1, "finish_reason": "stop"}],
        "rewards": {"right": {"score": 1.0, "weight": 0.5}, "form": {"score": 1.0}, "none": None},
        "errors": [],
    }
    failed = {**trace, "errors": [{"type": "TimeoutError"}]}
    lines(tmp_path / "step_1" / "traces.jsonl", [trace, failed])
    log = read_log(tmp_path, "prime_rl")
    (one,) = log.completions
    assert log.errors == 1
    assert (one.prompt, one.text, one.reward, one.truncated) == (ASKED, "7", 1.5, False)
    assert (one.tokens.prompt, one.tokens.completion, one.tokens.logprobs) == (
        [1, 5, 6],
        [10, 2],
        [-0.5, -0.25],
    )
    twice = [*nodes, {**nodes[1], "parent": 1}]
    lines(tmp_path / "step_1" / "traces.jsonl", [{**trace, "nodes": twice}])
    (one,) = read_log(tmp_path, "prime_rl").completions
    assert (one.tokens.prompt, one.tokens.completion) == ([1, 5, 6], [10, 2, 9, 6, 10, 2])
    assert one.tokens.mask == [True, True, False, False, True, True]
    assert one.tokens.logprobs == [-0.5, -0.25, 0.0, 0.0, -0.5, -0.25]
    branch = [*nodes, {**nodes[1], "parent": 0}]
    lines(tmp_path / "step_1" / "traces.jsonl", [{**trace, "nodes": branch}])
    with pytest.raises(DataError, match="nodes are not one conversation"):
        read_log(tmp_path, "prime_rl")


TOLD = [{"role": "user", "content": "again="}]


def conversations(directory, prompts, form):
    """Write conversations of two turns as TRL's log, or as verifiers' outputs with or without token ids."""
    _, tokenizer = load_policy(base_checkpoint(), "float32", "cpu")
    logged = []
    for row in list(prompts.values())[:2]:
        for sample, answer in enumerate(("abc", "cba")):
            turns = [*said("abc"), *TOLD, *said(answer)]
            at = [render(tokenizer, [*row["messages"], *turns[:n]]) for n in range(4)]
            given = {"prompt": row["messages"], "completion": turns, "reward": float(sample)}
            if form == "tokens":
                pairs = [(at[0], at[1][len(at[0]) :]), (at[2], at[3][len(at[2]) :])]
                given["trajectory"] = [
                    {"tokens": {"prompt_ids": p, "completion_ids": c, "completion_logprobs": [-1.0] * len(c)}}
                    for p, c in pairs
                ]
            logged.append(given | {"step": 1} if form == "trl" else given)
    if form == "trl":
        directory.mkdir()
        pq.write_table(pa.Table.from_pylist(logged), directory / "completions_00001.parquet")
    else:
        lines(directory / "train_rollouts.jsonl", logged)


@pytest.mark.parametrize("form", ["trl", "messages", "tokens"])
def test_a_conversation_is_masked_from_its_log_to_its_feature(ours, tmp_path, form):
    table, prompts, _ = ours
    conversations(tmp_path / "log", prompts, form)
    sampling = Sampling(samples=2, max_new_tokens=12)
    back, summary = imported(tmp_path, "trl" if form == "trl" else "prime_rl", table, sampling)
    assert summary["several_turns"] == 4
    assert any("between its turns is masked" in line for line in summary["approximations"])
    _, tokenizer = load_policy(base_checkpoint(), "float32", "cpu")
    for row in back.to_pylist():
        parts = {True: [], False: []}
        for token, own, value in zip(
            *(row[n] for n in ("completion_ids", "completion_mask", "behavior_logprobs")), strict=True
        ):
            parts[own].append(token)
            assert (value == 0.0) == (not own)
        assert tokenizer.decode(parts[True]) in ("abc<eos>abc<eos>", "abc<eos>cba<eos>")
        assert tokenizer.decode(parts[False]) == "again="
        assert row["finish_reason"] == "stop"
    if form == "tokens":
        assert summary["parity"]["tokens"] == 4 * 8
        return
    (parts,) = (tmp_path / "root").glob("**/parts")
    features = extract(tmp_path, base_checkpoint(), parts)
    assert features.column("status").tolist() == [0, 0]
    assert abs(features.column("kl")).max() < 1e-6  # the same forward gave the log-probabilities


def test_turns_that_are_not_one_sequence_of_tokens_are_refused(ours, tmp_path):
    table, prompts, _ = ours
    conversations(tmp_path / "log", prompts, "tokens")
    rows = [json.loads(line) for line in (tmp_path / "log" / "train_rollouts.jsonl").read_text().splitlines()]
    rows[0]["trajectory"][1]["tokens"]["prompt_ids"][0] += 1
    lines(tmp_path / "log" / "train_rollouts.jsonl", rows)
    with pytest.raises(DataError, match="do not continue those of the turns before"):
        imported(tmp_path, "prime_rl", table)
    forgetful = load_policy(base_checkpoint(), "float32", "cpu")[1]
    forgetful.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(TurnsError, match="renders earlier turns differently"):
        conversation_tokens(forgetful, ASKED, [*said("abc"), *TOLD, *said("b")], 2)


def test_a_null_log_probability_is_filled_by_a_forward_pass(ours, tmp_path):
    table, prompts, rollouts = ours
    rows = [{**row, "behavior_logprobs": list(row["behavior_logprobs"])} for row in rollouts.to_pylist()]
    rows[0]["behavior_logprobs"][0] = None
    rows[1]["behavior_logprobs"][-1] = float("-inf")
    prime_rl(tmp_path / "log", prompts, rows, tokens=True)
    back, summary = imported(tmp_path, "prime_rl", table)
    assert summary["logprobs_filled"] == 2
    assert close(back, rollouts)


def test_a_token_beyond_the_vocabulary_drops_its_row(ours, tmp_path):
    table, prompts, rollouts = ours
    rows = rollouts.to_pylist()
    rows[3] = {**rows[3], "completion_ids": [151643] * len(rows[3]["completion_ids"])}
    prime_rl(tmp_path / "log", prompts, rows, tokens=True)
    with pytest.raises(
        DataError, match=r"token id 151643 is beyond the \d+ tokens of the checkpoint \(row 4\)"
    ):
        imported(tmp_path, "prime_rl", table)
    back, summary = imported(tmp_path, "prime_rl", table, on_bad_rows="drop")
    assert back.num_rows == len(rows) - 1
    assert sum(summary["dropped"].values()) == 1


def test_a_text_one_or_two_tokens_over_the_limit_is_cut(ours, tmp_path):
    table, prompts, rollouts = ours
    row = rollouts.to_pylist()[0]
    limit, asked = SAMPLING.max_new_tokens, prompts[row["prompt_id"]]["messages"][-1]["content"]
    for over in (2, 3):
        lines(
            tmp_path / "log" / "1.jsonl",
            [{"input": asked, "output": "x" * (limit + over), "score": 1.0, "step": 1}],
        )
        if over == 2:
            back, summary = imported(tmp_path, "verl", table)
            assert len(back["completion_ids"][0]) == limit
            assert back["finish_reason"].to_pylist() == ["length"]
            assert summary["shortened_by_one_or_two_tokens"] == 1
        else:
            with pytest.raises(DataError, match=r"more tokens than sampling.max_new_tokens=12 \(row 1\)"):
                imported(tmp_path, "verl", table)


def test_a_turn_ends_with_the_token_of_its_template():
    _, tokenizer = load_policy(base_checkpoint(), "float32", "cpu")
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|turn_end|>\n{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|turn_end|>")


SHARED = CHECKOUT.parent / "shared" / "cases" / "logs"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/cases, which only some machines have")
@pytest.mark.parametrize("name", sorted(p.name for p in SHARED.glob("*")) if SHARED.is_dir() else [])
@pytest.mark.parametrize("on_bad_rows", ["refuse", "drop"])
def test_shared_logs_end_in_a_result_or_one_error(name, on_bad_rows, tmp_path):
    options = {
        "policy": Checkpoint(base_checkpoint(), digest="d"),
        "device": "cpu",
        "sampling": Sampling(max_new_tokens=40),
    }
    try:
        layout = {"trl": "trl", "prime": "prime_rl", "verl": "verl"}[name.split("_")[0]]
        import_log(Store(tmp_path), LogSource(SHARED / name, layout, on_bad_rows=on_bad_rows), **options)
    except DataError as error:
        assert name in str(error)  # noqa: PT017
