"""Readers for rollouts logged by other trainers, which convert their rows to one form.

    verl      trainer.rollout_data_dir: <step>.jsonl of {input, output, score, step, gts, …}, texts without special
              tokens (verl/trainer/ppo/ray_trainer.py, _dump_generations)
    trl       log_completions: completions/completions_<step>.parquet of step, prompt, completion, a column per reward
              function, extra columns, advantage (TRL 1.16, trl/trainer/grpo_trainer.py, GRPOTrainer.log)
    prime_rl  rollouts/step_<n>/train_rollouts.jsonl, a verifiers RolloutOutput per line: prompt, completion, reward,
              is_truncated, error, example_id, …; older ones with the trajectory and its token ids
              (prime_rl/orchestrator/vf_utils.py, save_rollouts); or traces.jsonl, a verifiers 0.4 Trace per line:
              nodes of message, token_ids, mask, logprobs; rewards of score and weight (verifiers/v1/trace.py, graph.py)
    cropi     the released code's JSONL: {id, prompt, answer, responses, rewards} per prompt (thu-coai/CROPI,
              cropi/README.md)

An invalid log is refused completely, with every fault and its rows; alternatively its invalid rows are dropped and
counted by reason.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cropi_core.artifacts import Faults, read_batches
from cropi_core.errors import ConfigError, DataError
from cropi_core.prompts import SAME_ROLE, content_text, surrogate_fault

Layout = Literal["verl", "trl", "prime_rl", "cropi"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FILES: dict[Layout, tuple[str, ...]] = {
    "verl": ("*.jsonl",),
    "trl": ("completions_*.parquet",),
    "prime_rl": ("train_rollouts.jsonl", "train_traces.jsonl", "traces.jsonl"),
    "cropi": ("*.jsonl",),
}
"""File name patterns of each layout, below a directory."""

Row = dict[str, Any]
Asked = str | list[dict[str, str]]
"""A prompt: messages, or a text."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, and the log-probabilities of the completion's tokens, if the log has them.

    ``mask`` is true for the tokens of the completion that the policy sampled; None if these are all. The
    log-probabilities of the others are 0.
    """

    prompt: list[int]
    completion: list[int]
    logprobs: list[float | None]
    mask: list[bool] | None = None


@dataclass(frozen=True)
class Logged:
    """One completion.

    Attributes:
        prompt: Its prompt.
        text: The completion.
        reward: Its reward; None if not gradable.
        step: Training step, if the log has it.
        truncated: Whether it was cut at the length limit; None if the log has no such field.
        tokens: Its tokens; None if the log has only text.
        place: Its location: the file and the row.
        reasoning: The model's reasoning before the text, if the log stores it separately.
        turns: Messages of a completion of several turns; the first and the last are the policy's.
    """

    prompt: Asked
    text: str
    reward: float | None
    step: int | None = None
    truncated: bool | None = None
    tokens: Tokens | None = None
    place: str = ""
    reasoning: str = ""
    turns: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Log:
    """Contents of a log.

    Attributes:
        completions: The completions.
        errors: Number of rows dropped because the trainer's rollout had failed.
        repeated: Number of rows dropped because another file has them too.
        faults: Collects invalid rows; if it drops them, it has counted them.
    """

    completions: list[Logged]
    errors: int
    repeated: int
    faults: Faults


LARGEST_REWARD = 1e30
"""Largest reward accepted; rewards are stored in float32."""


def layout_of(name: str) -> Layout:
    """Check a layout's name.

    Raises:
        ConfigError: There is no such layout.
    """
    for layout in LAYOUTS:
        if layout == name:
            return layout
    raise ConfigError(f"logs of {name!r} are not read, only those of {', '.join(LAYOUTS)}")


def read_log(path: Path, layout: Layout, reward: str | None = None, *, drop: bool = False) -> Log:
    """Read a file, or a directory's files in the order of their numbers.

    Args:
        path: Path of the log.
        layout: Format of the log, by trainer.
        reward: TRL: column of the reward, if several columns are candidates.
        drop: Drop invalid rows and count them.

    Raises:
        ConfigError: There are no files, or the reward's column is not known.
        DataError: Rows are invalid.
    """
    if reward is not None and layout != "trl":
        raise ConfigError(f"a reward's column is chosen in logs of trl; {layout} names its own")
    log = Log([], 0, 0, Faults(str(path), drop=drop))
    errors = repeated = 0
    before: list[Row] = []
    contents: set[str] = set()
    files = _files(path, layout)
    for file in files:
        placed = _placed(file, log.faults, len(files) > 1)
        rows = [row for _, row in placed]
        repeats = _count_repeats(before, rows, contents, layout)
        repeated += repeats
        before = rows
        column = _trl_reward(rows, reward) if layout == "trl" and rows else ""
        for place, row in placed[repeats:]:
            if layout == "prime_rl" and _failed(row):
                errors += 1
                continue
            try:
                log.completions.extend([replace(one, place=place) for one in _read(layout, row, column)])
            except _RowError as fault:
                log.faults.add(str(fault), place)
    log.faults.check()
    if not log.completions:
        details = "".join(f"\n  {line}" for line in log.faults.lines())
        raise DataError(f"{path} holds no completions; {errors} rows are of rollouts that failed{details}")
    return replace(log, errors=errors, repeated=repeated)


def _files(path: Path, layout: Layout) -> list[Path]:
    """List the files of a log, in the order of their numbers."""
    names = FILES[layout]
    candidates = (
        {name: sorted(path.rglob(name), key=_by_number) for name in names} if path.is_dir() else {"": [path]}
    )
    kinds = [name for name, files in candidates.items() if files]
    if not kinds:
        raise ConfigError(f"{path} has no {' or '.join(names)}, as {layout} writes them")
    if len(kinds) > 1:
        raise ConfigError(
            f"{path} holds both {' and '.join(kinds)}, of the same rollouts; give the files of one kind"
        )
    files = candidates[kinds[0]]
    if links := [str(file) for file in files if file.is_symlink()]:
        raise DataError(f"{', '.join(links[:3])}: symbolic links; give the files themselves")
    return files


def _placed(file: Path, faults: Faults, several: bool) -> list[tuple[str, Row]]:
    """Read a file's rows, each with its location."""
    file_faults = Faults(str(file), drop=faults.drop)
    rows = [
        (f"{file.name}:{n}" if several else str(n), row)
        for batch in read_batches(file, None, file_faults)
        for n, _, row in batch.rows()
    ]
    faults.join(file_faults, f"{file.name}:" if several else "")
    if not rows and not file_faults:
        raise DataError(f"{file} holds no rows")
    return rows


def _count_repeats(before: list[Row], rows: list[Row], contents: set[str], layout: Layout) -> int:
    """Count the rows at the beginning of a file that repeat earlier files.

    TRL writes its last batch of completions at every logging step, under the number of that step: in full or only its
    end, until a new batch is sampled. In any layout, a copied file appears twice.
    """
    texts = [_text_of(row, layout) for row in rows]
    content = "\n".join(texts)
    if content in contents:
        return len(rows)
    contents.add(content)
    if layout != "trl":
        return 0
    earlier = [_text_of(row, layout) for row in before]
    most = min(len(earlier), len(texts))
    # at least two rows: a single completion may recur by chance
    return next((n for n in range(most, 1, -1) if earlier[-n:] == texts[:n]), 0)


def _text_of(row: Row, layout: Layout) -> str:
    return repr({name: value for name, value in row.items() if layout != "trl" or name != "step"})


def _failed(row: Row) -> bool:
    return bool(row.get("error") or (row.get("errors") and "nodes" in row))


class _RowError(Exception):
    """A row is invalid; the message is its fault."""


def _read(layout: Layout, row: Row, column: str) -> Iterator[Logged]:
    match layout:
        case "verl":
            return _verl(row)
        case "trl":
            return _trl(row, column)
        case "prime_rl":
            return _prime_rl(row)
        case "cropi":
            return _cropi(row)


def _by_number(path: Path) -> tuple[list[int], str]:
    return [int(n) for n in re.findall(r"\d+", f"{path.parent.name}/{path.stem}")], str(path)


def _verl(row: Row) -> Iterator[Logged]:
    yield Logged(
        _typed(row, "input", str), _typed(row, "output", str), _number(row, "score"), _typed(row, "step", int)
    )


def _trl(row: Row, reward: str) -> Iterator[Logged]:
    step = _typed(row, "step", int)
    text, reasoning, turns = _completed(row.get("completion"))
    prompt = _prompt(row.get("prompt"))
    yield Logged(prompt, text, _number(row, reward), step, reasoning=reasoning, turns=turns)


def _trl_reward(rows: list[Row], wanted: str | None) -> str:
    """Find the column of the reward; TRL's files do not mark it."""
    names = [n for n in rows[0] if n not in ("step", "prompt", "completion", "advantage")]
    numbers = [n for n in names if all(isinstance(row.get(n), float | int | None) for row in rows)]
    if wanted is not None and wanted not in numbers:
        raise ConfigError(
            f"there is no column of numbers called {wanted!r}; there are {', '.join(numbers) or 'none'}"
        )
    if wanted is None and len(numbers) != 1:
        raise ConfigError(
            f"which column is the reward? There are {', '.join(numbers) or 'none'}; name one with --reward. Their "
            "weighted sum is in no column: write one if the trainer had several"
        )
    return wanted or numbers[0]


def _prime_rl(row: Row) -> Iterator[Logged]:
    if "nodes" in row:
        yield _trace(row)
        return
    steps = row.get("trajectory") or []
    if not isinstance(steps, list):
        raise _RowError(f"trajectory is {type(steps).__name__}, not list")
    truncated = _typed(row, "is_truncated", bool) if "is_truncated" in row else None
    tokens = _trajectory_tokens(steps)
    text, reasoning, turns = _completed(row.get("completion"), bool(tokens))
    if len(steps) > 1 and not tokens and not turns:
        raise _RowError(
            f"has {len(steps)} turns, and the completion is neither their messages nor their tokens"
        )
    yield Logged(
        _prompt(row.get("prompt")),
        text,
        _number(row, "reward"),
        truncated=truncated,
        tokens=tokens,
        reasoning=reasoning,
        turns=turns,
    )


def _trajectory_tokens(steps: list[Any]) -> Tokens | None:
    """Join the tokens of a trajectory's turns; the prompt of a turn repeats the turns before it."""
    turns = [step.get("tokens") if isinstance(step, dict) else None for step in steps]
    known = [turn for turn in turns if isinstance(turn, dict)]
    if not known or len(known) < len(turns):
        return None
    names = ("prompt_ids", "completion_ids", "completion_logprobs")
    first, *others = (_tokens(*[_typed(turn, name, list) for name in names]) for turn in known)
    ids, mask, logprobs = first.completion, [True] * len(first.completion), first.logprobs
    for turn in others:
        before = first.prompt + ids
        if turn.prompt[: len(before)] != before:
            raise _RowError(f"has {len(turns)} turns whose tokens do not continue those of the turns before")
        told = turn.prompt[len(before) :]
        ids = [*ids, *told, *turn.completion]
        mask = [*mask, *[False] * len(told), *[True] * len(turn.completion)]
        logprobs = [*logprobs, *[0.0] * len(told), *turn.logprobs]
    return Tokens(first.prompt, ids, logprobs, None if all(mask) else mask)


def _tokens(prompt: list[Any], completion: list[Any], logprobs: list[Any]) -> Tokens:
    """Check token ids and log-probabilities; a log-probability that is null or not finite becomes None."""
    for name, ids in (("prompt ids", prompt), ("completion ids", completion)):
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise _RowError(f"{name} of the tokens are empty or not whole numbers")
    if len(logprobs) != len(completion):
        raise _RowError(f"has {len(completion)} completion ids and {len(logprobs)} log-probabilities")
    if not all(value is None or isinstance(value, float | int) for value in logprobs):
        raise _RowError("log-probabilities hold something that is not a number")
    finite = [None if value is None or not _is_finite(value) else float(value) for value in logprobs]
    return Tokens(prompt, completion, finite)


def _is_finite(value: float | int) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer outside the range of floats
        return False


def _trace(row: Row) -> Logged:
    """Read a trace of verifiers: one conversation, whose completion begins with the model's first turn."""
    nodes = row["nodes"]
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, dict) for node in nodes):
        raise _RowError("nodes is empty, or not a list of objects")
    if not any(node.get("sampled") for node in nodes):
        raise _RowError("has no turn of the model")
    parents = {node.get("parent") for node in nodes if isinstance(node.get("parent"), int)}
    leaves = [i for i in range(len(nodes)) if i not in parents]
    path, place = [], leaves[0] if leaves else 0
    while place is not None and len(path) <= len(nodes):
        if not isinstance(place, int) or not 0 <= place < len(nodes):
            raise _RowError(f"nodes name the parent {str(place)[:20]}, which is not one of them")
        path.insert(0, place)
        place = nodes[place].get("parent")
    if len(path) != len(nodes):
        raise _RowError("nodes are not one conversation")
    sampled = [i for i in path if nodes[i].get("sampled")]
    begin, end = path.index(sampled[0]), path.index(sampled[-1]) + 1
    messages = [nodes[i].get("message") for i in path]
    tokens = _trace_tokens([nodes[i] for i in path[:end]])
    text, reasoning, turns = _completed(messages[begin:end], bool(tokens))
    calls = row.get("calls")
    ends = (
        [c for c in calls if isinstance(c, dict) and c.get("node") == sampled[-1]]
        if isinstance(calls, list)
        else []
    )
    reason = ends[-1].get("finish_reason") if ends else None
    truncated = reason == "length" if reason else None
    prompt = _prompt(messages[:begin])
    return Logged(prompt, text, _trace_reward(row), None, truncated, tokens, reasoning=reasoning, turns=turns)


def _trace_tokens(nodes: list[Row]) -> Tokens | None:
    """Join the token ids of a path that ends with the model's turn; masks mark the tokens that the model sampled."""
    if not any(node.get("token_ids") for node in nodes):
        return None
    ids: list[Any] = []
    mask: list[bool] = []
    logprobs: list[Any] = []
    for node in nodes:
        tokens = _typed(node, "token_ids", list)
        flags = _typed(node, "mask", list) if node.get("sampled") else [False] * len(tokens)
        count = sum(flag is True for flag in flags)
        if node.get("sampled") and (len(tokens) != len(flags) or not count):
            raise _RowError(
                f"a turn of the model has {len(tokens)} token ids and a mask of {len(flags)}, or none is sampled"
            )
        given = node.get("logprobs") or [None] * count
        if not isinstance(given, list) or (count and len(given) != count):
            raise _RowError(f"a turn of the model has {count} sampled tokens and other log-probabilities")
        values = iter(given)
        ids += tokens
        mask += [flag is True for flag in flags]
        logprobs += [next(values) if flag is True else 0.0 for flag in flags]
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    joined = _tokens(ids[:first], ids[first:last], logprobs[first:last])
    return replace(joined, mask=None if all(mask[first:last]) else mask[first:last])


def _trace_reward(row: Row) -> float | None:
    """Sum the weighted rewards of a trace; None if it has none."""
    if "reward" in row:
        return _number(row, "reward")
    rewards = _typed(row, "rewards", dict)
    given = [one for one in rewards.values() if one is not None]
    if not given:
        return None
    total = 0.0
    for one in given:
        if not isinstance(one, dict):
            raise _RowError("rewards holds something that is not {score, weight}")
        score = _number(one, "score")
        if score is None:
            return None
        total += score * (_number({"weight": 1.0, **one}, "weight") or 0.0)
    return total


def _cropi(row: Row) -> Iterator[Logged]:
    prompt, texts, rewards = (
        _typed(row, name, kind) for name, kind in (("prompt", str), ("responses", list), ("rewards", list))
    )
    if len(texts) != len(rewards) or not all(isinstance(text, str) for text in texts):
        raise _RowError("responses is not a list of strings with a reward each in rewards")
    if fault := next((fault for text in texts if (fault := surrogate_fault(text, "a response"))), ""):
        raise _RowError(fault)
    for text, reward in zip(texts, rewards, strict=True):
        yield Logged(prompt, text, _number({"rewards": reward}, "rewards"))


def _typed(row: Row, name: str, kind: type) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _RowError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    if kind is str and (fault := surrogate_fault(str(value), name)):
        raise _RowError(fault)
    return value


def _number(row: Row, name: str) -> float | None:
    """Read a reward; trainers write null or NaN if a reward function returned none."""
    value = row.get(name)
    if value is None and name in row:
        return None
    if not isinstance(value, int | float):
        raise _RowError(f"{name} is {type(value).__name__}, not a number")
    if isinstance(value, float) and math.isnan(value):
        return None
    if not _is_finite(value) or abs(value) > LARGEST_REWARD:
        raise _RowError(f"{name} is infinite, or larger than {LARGEST_REWARD:g}")
    return float(value)


def _prompt(prompt: Any) -> Asked:
    if isinstance(prompt, str) and prompt.strip():
        if fault := surrogate_fault(prompt, "prompt"):
            raise _RowError(fault)
        return prompt
    messages = _messages(prompt)
    if not messages or messages[-1]["role"] == "assistant":
        raise _RowError("prompt is neither a text nor messages that end with a question")
    if any(message.get("reasoning_content") for message in prompt if isinstance(message, dict)):
        raise _RowError("prompt has a turn with reasoning_content, which would be lost")
    return messages


def _answered(completion: Any, tokens: bool = False) -> tuple[str, str]:
    """Return a completion's text, and the reasoning that the log stores separately.

    Args:
        completion: A text, or one message of the assistant.
        tokens: Whether its token ids are known, so that a null text loses nothing.
    """
    if isinstance(completion, str):
        return completion, ""
    reasoning = ""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        given = completion[0].get("reasoning_content") or ""
        reasoning = given if isinstance(given, str) else ""
        if not isinstance(given, str):
            raise _RowError(f"reasoning_content is {type(given).__name__}, not a string")
        if fault := surrogate_fault(reasoning, "reasoning_content"):
            raise _RowError(fault)
        if completion[0].get("content") is None and (tokens or not reasoning):
            completion = [{**completion[0], "content": ""}] if tokens else completion
        elif completion[0].get("content") is None:
            raise _RowError(
                "content is null: the completion was cut while thinking, and its tokens are not logged"
            )
    messages = _messages(completion)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise _RowError("completion is neither a text nor messages of the assistant")
    return messages[0]["content"], reasoning


def _completed(completion: Any, tokens: bool = False) -> tuple[str, str, tuple[dict[str, str], ...]]:
    """Return a completion's text, its reasoning if it is kept apart, and its messages if it has several.

    What follows the policy's last turn conditions nothing, and is left out.
    """
    if not isinstance(completion, list) or len(completion) < 2:
        return *_answered(completion, tokens), ()
    given = [
        {**one, "content": one.get("content") or ""} if tokens and isinstance(one, dict) else one
        for one in completion
    ]
    messages = _messages(given)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages or messages[0]["role"] != "assistant":
        raise _RowError("completion does not begin with a message of the assistant")
    if len(messages) == 1:
        return *_answered(completion[:1], tokens), ()
    if not tokens and any(one.get("reasoning_content") for one in completion):
        raise _RowError("has several turns with reasoning_content, and no token ids")
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages), "", tuple(messages)


def _messages(value: Any) -> list[dict[str, str]]:
    """Read messages with role and content; other fields, such as tool calls, must be empty."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise _RowError("holds messages that are not a list of {role, content}")
    messages = []
    for message in value:
        content, fault = content_text(message.get("content"))
        if not isinstance(message.get("role"), str) or fault:
            raise _RowError(f"has a message whose content is not text ({fault or 'its role is none'})")
        if message.get("tool_calls"):
            raise _RowError("calls tools; conversations without tools are read")
        if fault := surrogate_fault(str(content), "content"):
            raise _RowError(fault)
        messages.append({"role": SAME_ROLE.get(message["role"], message["role"]), "content": content})
    return messages
