"""The command `cropi verify-rewards`: grade stored completions with another verifier and show what changed.

    cropi verify-rewards completions.jsonl --verifier math
    cropi verify-rewards RUN --set pool --verifier mine --function mine=rewards.py:grade

Options and output only: :mod:`cropi_core.rewards.regrading` grades and compares.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Overrides, Root, print_json, print_table, say
from cropi_core.errors import ConfigError, DataError
from data_schemas import Grading

if TYPE_CHECKING:
    from cropi_core.rewards import Graded, Regraded

DIFFERENT = 3
"""Exit status if a reward changed."""
SHOWN_CHARACTERS = 160
"""Characters of a completion or an answer in the output, counted from the end of a completion."""


def verify_rewards(
    source: Annotated[
        str, typer.Argument(help="A JSONL or Parquet file of completions, or the id of a run.")
    ],
    verifier: Annotated[str, typer.Option(help="Verifier that grades again.")],
    against: Annotated[
        str | None,
        typer.Option(help="Verifier to compare with; default: the rewards in the file or the run."),
    ] = None,
    function: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH:FUNCTION", help="Your function, by name; repeatable."),
    ] = None,
    of_set: Annotated[
        str, typer.Option("--set", help="Set of a run whose rollouts are graded, at stage 1.")
    ] = "pool",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of graded completions.")] = 10_000,
    show: Annotated[int, typer.Option(min=0, help="Maximum number of changes that are shown.")] = 20,
    override: Overrides = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Grade completions with another verifier and show what changed, largest difference first. Section of -o: grading.

    A file has the columns `completion` (or `text`) and `answer`, and `reward` unless --against names a verifier. The
    exit status is 0 if all rewards are equal, 3 if some differ, 1 or 2 after an error. A server is named as in a
    configuration: `-o 'grading.http.judge={url: http://localhost:8000/grade}' --verifier judge`, and so is a weighted
    sum: `-o 'grading.sums.both={math: 1, exact: 0.2}' --verifier both`, which also shows each term.
    """
    grading = _grading(function or [], override or [])
    rows = (
        _read_file(Path(source), limit, against)
        if Path(source).is_file()
        else _read_run(source, of_set, limit, root)
    )
    from cropi_core.rewards import open_verifier, regrade

    with open_verifier(grading) as opened:
        if against is not None:
            bare = [replace(row, reward=None) for row in rows]
            before = {id(change.row): change.after for change in regrade(bare, against, opened).changes}
            rows = [replace(row, reward=before.get(id(row))) for row in bare]
        regraded = regrade(rows, verifier, opened)
    _show(regraded, verifier, against or "stored rewards", show, as_json)
    if regraded.changes:
        raise typer.Exit(DIFFERENT)


def _grading(functions: list[str], overrides: list[str]) -> Grading:
    """Join the functions and the overrides to one section."""
    from cropi_core.config import load_sections

    grading = load_sections({"grading": Grading}, overrides)["grading"]
    pairs = [pair.partition("=") for pair in functions]
    if wrong := [name for name, _, path in pairs if not name or not path]:
        raise ConfigError(f"--function {wrong[0]!r} is not of the form NAME=PATH:FUNCTION")
    more = {"functions": grading.functions | {name: path for name, _, path in pairs}}
    return Grading.model_validate(grading.model_dump() | more)


def _read_file(path: Path, limit: int, against: str | None) -> list["Graded"]:
    from cropi_core.artifacts import check_suffix, read_jsonl, read_parquet
    from cropi_core.rewards import Graded

    table = (
        read_jsonl(path) if check_suffix(path) == "jsonl" else read_parquet(path).slice(0, limit).to_pylist()
    )
    rows = []
    for number, row in enumerate(table[:limit], 1):
        completion, answer = row.get("completion", row.get("text")), row.get("answer")
        if isinstance(answer, int) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(completion, str) or not isinstance(answer, str):
            raise DataError(f"{path}, row {number}: completion (or text) and answer must be texts")
        reward = row.get("reward")
        if against is None and "reward" not in row:
            raise DataError(f"{path}, row {number} has no reward; name a verifier to compare with: --against")
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
            raise DataError(
                f"{path}, row {number}: the reward is {type(reward).__name__}, not a number or null"
            )
        rows.append(
            Graded(
                f"row {number}",
                completion,
                answer,
                None if reward is None else float(reward),
                _prompt_messages(row),
            )
        )
    return rows


def _prompt_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, which a server may want; a text is one message of the user."""
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt) else []


def _read_run(run: str, set_name: str, limit: int, root: str) -> list["Graded"]:
    from cropi_core.artifacts import PROMPTS_FILE, ROLLOUTS, Store
    from cropi_core.prompts import read_prompts
    from cropi_core.rewards import Graded
    from cropi_core.rollouts import read_rollouts
    from cropi_core.runs import load_run

    store = Store(root)
    record = load_run(store, run)
    slot = record.slots.get(f"rollouts/{set_name}@1")
    if slot is None:
        available = ", ".join(sorted(name for name in record.slots if name.startswith("rollouts/"))) or "none"
        raise ConfigError(f"{run} has no rollouts of the set {set_name!r} at stage 1; it has {available}")
    manifest = store.manifest(slot.ref)
    prompts = read_prompts(store.require(manifest.inputs["prompts"]) / PROMPTS_FILE)
    prompt_rows = {
        row["prompt_id"]: row for row in prompts.select(["prompt_id", "answer", "messages"]).to_pylist()
    }
    table = read_rollouts(store.require(slot.ref) / ROLLOUTS).slice(0, limit)
    columns = table.select(["prompt_id", "sample", "text", "reward"]).to_pylist()
    return [
        Graded(f"{c['prompt_id']} #{c['sample']}", c["text"], row["answer"], c["reward"], row["messages"])
        for c in columns
        for row in (prompt_rows[c["prompt_id"]],)
    ]


def _show(regraded: "Regraded", verifier: str, before: str, show: int, as_json: bool) -> None:
    changes: list[dict[str, Any]] = [
        {
            "row": change.row.name,
            "before": change.row.reward,
            "after": change.after,
            "answer": change.row.answer[:SHOWN_CHARACTERS],
            "completion": change.row.completion[-SHOWN_CHARACTERS:],
            "reason": change.reason,
            **({"terms": dict(change.terms)} if regraded.terms else {}),
        }
        for change in regraded.changes[:show]
    ]
    if as_json:
        missing = dict(zip(("before", "after"), regraded.not_gradable, strict=True))
        print_json(
            {
                "completions": regraded.rows,
                "changed": len(regraded.changes),
                "mean_reward": {"before": regraded.before, "after": regraded.after},
                "not_gradable": missing,
                **({"mean_terms": regraded.terms} if regraded.terms else {}),
                "changes": changes,
            }
        )
        return
    means = ["none" if mean is None else f"{mean:.4f}" for mean in (regraded.before, regraded.after)]
    say(
        f"{len(regraded.changes)} of {regraded.rows} rewards differ between {before} and {verifier}: mean {means[0]} "
        f"and {means[1]}, not gradable {regraded.not_gradable[0]} and {regraded.not_gradable[1]}"
    )
    if regraded.terms:
        say(f"means of the terms of {verifier}, before their weights: {_terms(regraded.terms)}")
    if changes:
        names = ["row", "before", "after", "answer", "end of the completion", "reason"]
        if regraded.terms:
            names.append("terms")
            changes = [change | {"terms": _terms(change["terms"])} for change in changes]
        print_table(
            names, [["null" if v is None else " ".join(str(v).split()) for v in c.values()] for c in changes]
        )


def _terms(terms: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {'null' if value is None else f'{value:.4g}'}" for name, value in terms.items())
