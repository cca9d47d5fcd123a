"""Collect rollouts: completions of a policy with behaviour log-probabilities and rewards, in Parquet parts.

Each part is one shard of prompts, written completely and renamed into place, so an interruption costs at most one
part. Every part's metadata holds the policy's digest, the sampling settings and the seed.

With `rollouts.passes` each pass writes parts of its own, next to the final ones, which are put together from them after
the last pass. Which prompts a pass samples is computed from the parts of the passes before it, so an interruption costs
one part here too.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.artifacts import forget_checksums, read_parquet, remove_damaged, write_parquet
from cropi_core.errors import ConfigError, foreign_errors
from cropi_core.policy import Checkpoint
from cropi_core.progress import Progress, Report, silent
from cropi_core.prompts import read_prompts
from cropi_core.rewards import Grade, Item, Verifier, answer_warnings, open_verifier, verifier_warnings
from cropi_core.rollouts.parity import PARITY, parity_summary
from cropi_core.rollouts.passes import open_prompts, pass_sizes
from cropi_core.rollouts.samplers import Sampled, Sampler, open_sampler
from cropi_core.rollouts.table import (
    join_rollouts,
    part_path,
    read_rollouts,
    summarise_rollouts,
)
from data_schemas import Engine, Grading, Passes, Runtime, Sampling, rollouts_schema

log = logging.getLogger(__name__)

BY_SOURCE = b"cropi.samples_by_source"
REASONS = 5
"""Number of reasons why completions are not gradable in a summary, the most frequent."""


@dataclass(frozen=True)
class RolloutPlan:
    """What is sampled, and by which sampler.

    Attributes:
        sampling: Distribution and number of samples.
        seed: See :func:`cropi_core.rollouts.sampling.sample_completions`.
        shard_prompts: Prompts in a part.
        engine: The sampler: transformers in this process, or vLLM servers.
        passes: Sample in passes, at most ``sampling.samples`` completions of a prompt; None samples all of them.
        by_source: Number of samples by source of the prompts; others get ``sampling.samples``. Not with ``passes``.
        keep_checksums: Keep the checksums of the parts after the last one, and use only parts that have one: a step's
            workspace, which can change until its manifest is written.
    """

    sampling: Sampling
    seed: int = 0
    shard_prompts: int = 64
    engine: Engine = "transformers"
    passes: Passes | None = None
    by_source: Mapping[str, int] = field(default_factory=dict)
    keep_checksums: bool = False

    def samples(self, row: dict[str, Any]) -> int:
        """Return the number of samples of a row of a prompts table."""
        return self.by_source.get(row["source"], self.sampling.samples)


Rows = dict[int, list[dict[str, Any]]]
"""Rows of a prompts table, by the number of their shard."""


def sample_rollouts(
    *,
    policy: Checkpoint,
    prompts: Path,
    out: Path,
    plan: RolloutPlan,
    grading: Grading,
    runtime: Runtime = Runtime(),
    report: Report = silent,
    logs: Path | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """Sample and grade completions of every prompt into ``out/part-*.parquet``, keeping the parts that exist.

    Args:
        policy: The behaviour policy.
        prompts: Prompts table (Parquet).
        out: Directory of the parts.
        plan: Distribution, seed, prompts in a part, sampler.
        grading: Verifiers and their limits.
        runtime: Device, threads and rows generated together; servers of vLLM.
        report: Receives the number of prompts done.
        logs: Directory for the logs of started servers; by default the path of ``out`` with ``.logs`` appended.
        sampler: An open sampler with this engine and policy.

    Returns:
        Summary: counts, mean reward, share truncated and not gradable, pass rates by source; why completions that were
        graded now are not gradable; with vLLM also the difference of its log-probabilities from those of cropi's
        forward pass (:mod:`cropi_core.rollouts.parity`).

    Raises:
        ConfigError: ``out`` holds parts of another policy, distribution or seed, or of other prompts.
        DataError: A prompt is too long for the policy.
        PolicyError: The checkpoint cannot be used.
        ServerError: A vLLM server is missing, serves another policy, has stopped, or computes other log-probabilities.
    """
    table = read_prompts(prompts)
    out.mkdir(parents=True, exist_ok=True)
    metadata = _metadata(policy, plan)
    every = _shards(table, plan.shard_prompts)
    _remove_damaged_parts(out, plan)
    _check_parts(out, every, metadata)
    missing = _missing(every, out)
    reasons: Counter[str] = Counter()
    warnings: list[str] = []
    if missing:
        with ExitStack() as stack:
            verifier = stack.enter_context(open_verifier(grading))
            verifier.check(table["verifier"].to_pylist())
            columns = ("verifier", "answer", "messages")
            rows = table.select(columns).to_pylist() if grading.functions else []
            verifier.try_functions(Item(one["verifier"], "", one["answer"], one["messages"]) for one in rows)
            warnings = _warn_of_answers(verifier, table)
            if sampler is None:
                logs = logs or out.with_name(f"{out.name}.logs")
                sampler = stack.enter_context(
                    open_sampler(plan.engine, policy=policy, runtime=runtime, logs=logs)
                )
            draw = partial(sampler.sample, seed=plan.seed)
            if plan.passes is None and not plan.by_source:
                draw = partial(draw, missing, plan.sampling)
                parts = _Parts(out, missing, metadata, table.num_rows)
                reasons, later = _write_parts(draw, parts, verifier, report)
            else:
                reasons, later = _write_passes(draw, out, every, plan, metadata, verifier, report)
            warnings += later
    shutil.rmtree(_passes_path(out), ignore_errors=True)
    if not plan.keep_checksums:
        forget_checksums(out)
    report(Progress(table.num_rows, table.num_rows, "prompt"))
    sources = dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    summary = summarise_rollouts(read_rollouts(out), sources)
    if reasons:
        summary["not_gradable_reasons"] = dict(reasons.most_common(REASONS))
    if warnings:
        summary["verifier_warnings"] = warnings
    if plan.passes:
        summary["passes"] = plan.passes.model_dump()
    if plan.by_source:
        summary["samples_by_source"] = dict(plan.by_source)
    if plan.engine == "vllm":
        summary["parity"] = parity_summary([out], policy.dtype, runtime.vllm)
    return summary


def _metadata(policy: Checkpoint, plan: RolloutPlan) -> dict[bytes, bytes]:
    """Return the metadata of every part: the policy, the distribution, the seed and the passes, if there are any."""
    metadata = {
        b"cropi.policy": policy.content_digest().encode(),
        b"cropi.sampling": plan.sampling.model_dump_json().encode(),
        b"cropi.seed": str(plan.seed).encode(),
    }
    if plan.by_source:
        metadata[BY_SOURCE] = json.dumps(dict(plan.by_source), sort_keys=True).encode()
    return metadata | ({b"cropi.passes": plan.passes.model_dump_json().encode()} if plan.passes else {})


def check_sources(by_source: Mapping[str, int], sources: Iterable[str]) -> None:
    """Refuse numbers of samples for sources that no prompt has.

    Raises:
        ConfigError: Names the first one, and the sources that there are.
    """
    existing = sorted(set(sources))
    if missing := sorted(set(by_source) - set(existing)):
        raise ConfigError(
            f"samples_by_source names the source {missing[0]!r}, which no prompt has. There are "
            f"{', '.join(map(repr, existing[:10]))}"
        )


def _shards(table: pa.Table, shard_prompts: int) -> Rows:
    """Cut a prompts table into shards."""
    rows = table.to_pylist()
    starts = range(0, len(rows), shard_prompts)
    return {number: rows[i : i + shard_prompts] for number, i in enumerate(starts)}


def _missing(shards: Rows, out: Path) -> Rows:
    """Return the shards without a part in ``out``; a shard without prompts needs none."""
    return {i: rows for i, rows in shards.items() if rows and not part_path(out, i).exists()}


def _remove_damaged_parts(out: Path, plan: RolloutPlan) -> None:
    """Remove the parts that do not match their checksums, so that they are sampled again."""
    for path in remove_damaged(out, "part-*.parquet", required=plan.keep_checksums):
        log.warning("%s was damaged after it was written; its prompts are sampled again", path)


def _check_parts(out: Path, shards: Rows, metadata: dict[bytes, bytes]) -> None:
    """Refuse parts that another policy, distribution or seed sampled, or that hold other prompts.

    Raises:
        ConfigError: Names what differs.
    """
    expected = {part_path(out, i): {row["prompt_id"] for row in rows} for i, rows in shards.items()}
    for path in sorted(out.glob("part-*.parquet")):
        with foreign_errors(f"{path} cannot be read as Parquet"), pq.ParquetFile(path) as file:
            stored = file.schema_arrow.metadata or {}
            same_prompts = set(file.read(columns=["prompt_id"])["prompt_id"].to_pylist()) == expected.get(
                path
            )
        faults = [
            f"its {name.decode().removeprefix('cropi.')} is {stored.get(name, b'?').decode()}, not {value.decode()}"
            for name, value in metadata.items()
            if stored.get(name) != value
        ]
        if b"cropi.passes" in stored.keys() - metadata.keys():
            faults.append("it was sampled in passes")
        if BY_SOURCE in stored.keys() - metadata.keys():
            faults.append("its number of samples depends on the source")
        if not same_prompts:
            faults.append("its prompts are others")
        if faults:
            raise ConfigError(
                f"{path} is of other rollouts: {'; '.join(faults)}. Give another directory, or delete this one"
            )


def _passes_path(out: Path) -> Path:
    """Return the directory of the parts of the passes; it is removed when the final parts are complete."""
    return out.with_name(f"{out.name}.passes")


def _write_passes(
    draw: Callable[..., Iterator[Sampled]],
    out: Path,
    shards: Rows,
    plan: RolloutPlan,
    metadata: dict[bytes, bytes],
    verifier: Verifier,
    report: Report,
) -> tuple[Counter[str], list[str]]:
    """Sample pass after pass, then write the final parts; return what :func:`_write_parts` returns.

    With ``plan.by_source`` a pass samples the prompts that have more samples than those before it.

    Args:
        draw: The sampler's ``sample`` with its seed.
        out: Directory of the final parts.
        shards: All prompts.
        plan: Distribution and passes.
        metadata: Metadata of every part.
        verifier: Grades the completions.
        report: Receives the number of prompts done in a pass.
    """
    reasons, warnings = Counter[str](), list[str]()
    if plan.passes:
        sizes = pass_sizes(plan.passes, plan.sampling.samples)
    else:
        sizes = sorted({plan.samples(row) for shard in shards.values() for row in shard})
    before, rows = 0, shards
    for number, size in enumerate(sizes):
        folder = _passes_path(out) / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_damaged_parts(folder, plan)
        _check_parts(folder, rows, metadata)
        if missing := _missing(rows, folder):
            sampling = plan.sampling.model_copy(update={"samples": size - before})
            parts = _Parts(
                folder,
                missing,
                metadata,
                sum(map(len, rows.values())),
                f"pass {number + 1} of {len(sizes)}",
                before,
            )
            counted, new_warnings = _write_parts(
                partial(draw, missing, sampling, start=before), parts, verifier, report
            )
            reasons, warnings = reasons + counted, warnings or new_warnings
        before = size
        if number + 1 == len(sizes):
            break
        if plan.passes is None:
            rows = {
                index: [row for row in shard if plan.samples(row) > size] for index, shard in rows.items()
            }
        else:
            rows = _next_pass(out, number, rows, sizes[number + 1] - size, plan.passes.min_chance)
    for index, prompts in _missing(shards, out).items():
        write_parquet(
            _joined(_pass_tables(out, len(sizes), index), prompts), part_path(out, index), checksum=True
        )
    return reasons, warnings


def _joined(tables: list[pa.Table], prompts: list[dict[str, Any]]) -> pa.Table:
    """Join the passes of a shard, in the order of its prompts and their samples, with the metadata of the first."""
    table = join_rollouts(tables)
    order = {row["prompt_id"]: place for place, row in enumerate(prompts)}
    places = pa.array([order[name] for name in table["prompt_id"].to_pylist()])
    sorting = [("place", "ascending"), ("sample", "ascending")]
    table = table.append_column("place", places).sort_by(sorting).drop_columns("place")
    return table.replace_schema_metadata(tables[0].schema.metadata)


def _pass_tables(out: Path, passes: int, index: int) -> list[pa.Table]:
    """Read the parts of a shard that the first passes wrote."""
    paths = [part_path(_passes_path(out) / str(number), index) for number in range(passes)]
    return [read_parquet(path) for path in paths if path.exists()]


def _next_pass(out: Path, number: int, rows: Rows, added: int, least: float) -> Rows:
    """Return the rows that the pass after ``number`` samples: those of that pass whose rewards may still differ."""
    rewards: dict[str, list[float | None]] = {}
    for index in sorted(rows):
        for table in _pass_tables(out, number + 1, index):
            for name, reward in zip(table["prompt_id"].to_pylist(), table["reward"].to_pylist(), strict=True):
                rewards.setdefault(name, []).append(reward)
    names = list(rewards)
    still = {names[i] for i in open_prompts(list(rewards.values()), added, least)}
    return {index: [row for row in shard if row["prompt_id"] in still] for index, shard in rows.items()}


@dataclass(frozen=True)
class _Parts:
    """The parts to write.

    Attributes:
        out: Directory of the parts.
        missing: Rows of each missing part.
        metadata: Metadata of every part.
        total: Number of prompts, those of existing parts included.
        note: Text of the progress reports.
        start: Number of the first sample.
    """

    out: Path
    missing: dict[int, list[dict[str, Any]]]
    metadata: dict[bytes, bytes]
    total: int
    note: str = ""
    start: int = 0


def _write_parts(
    draw: Callable[..., Iterator[Sampled]], parts: _Parts, verifier: Verifier, report: Report
) -> tuple[Counter[str], list[str]]:
    """Sample, grade and write the missing parts; count why completions have no reward.

    After the first part, warn of verifiers whose rewards look broken.

    Args:
        draw: The sampler's ``sample``, called with ``ready``, which it calls before the first completion.
        parts: The parts.
        verifier: Grades the completions.
        report: Receives the number of prompts done, except the last.
    """
    finished = parts.total - sum(map(len, parts.missing.values()))
    start, reasons = Progress(finished, parts.total, "prompt", parts.note), Counter[str]()
    warnings: list[str] | None = None
    for shard in draw(ready=lambda: report(start)):
        table = _graded(verifier, parts.missing[shard.index], shard, reasons, parts.start)
        parity = {PARITY: shard.parity.to_json().encode()} if shard.parity else {}
        write_parquet(
            table.replace_schema_metadata(parts.metadata | parity),
            part_path(parts.out, shard.index),
            checksum=True,
        )
        finished += len(parts.missing[shard.index])
        if warnings is None:
            warnings = _warn(parts.missing[shard.index], table)
        if finished < parts.total:
            report(Progress(finished, parts.total, "prompt", " ".join([parts.note, *warnings]).strip()))
    return reasons, warnings or []


def _warn_of_answers(verifier: Verifier, table: pa.Table) -> list[str]:
    """Log and return warnings about answers that their verifiers cannot read."""
    rows = table.select(["verifier", "prompt_id", "answer"]).to_pylist()
    answers = [
        (term.verifier, row["prompt_id"], row["answer"])
        for row in rows
        for term in verifier.terms(Item(row["verifier"], "", row["answer"]))
    ]
    warnings = answer_warnings(verifier, answers)
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def _warn(rows: list[dict[str, Any]], table: pa.Table) -> list[str]:
    """Log and return the warnings about the verifiers of one part."""
    verifiers = {row["prompt_id"]: row["verifier"] for row in rows}
    rewards = [
        (verifiers[c["prompt_id"]], c["prompt_id"], c["reward"])
        for c in table.select(["prompt_id", "reward"]).to_pylist()
    ]
    if "reward_terms" in table.column_names:
        columns = table.select(["prompt_id", "reward_terms"]).to_pylist()
        rewards += [
            (term["verifier"], c["prompt_id"], term["reward"])
            for c in columns
            for term in c["reward_terms"] or []
        ]
    warnings = verifier_warnings(rewards)
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def _graded(
    verifier: Verifier, rows: list[dict[str, Any]], shard: Sampled, reasons: Counter[str], start: int
) -> pa.Table:
    """Grade one shard's completions, from sample ``start``; ``reasons`` counts why some have no reward."""
    records: list[dict[str, Any]] = []
    items = []
    for row, (prompt_id, ids), group, texts in zip(
        rows, shard.prompts, shard.groups, shard.texts, strict=True
    ):
        for i, (completion, text) in enumerate(zip(group, texts, strict=True)):
            items.append(Item(row["verifier"], text, row["answer"], row["messages"]))
            records.append(
                {
                    "prompt_id": prompt_id,
                    "sample": start + i,
                    "prompt_ids": ids,
                    "completion_ids": completion.ids,
                    "behavior_logprobs": completion.logprobs,
                    "text": text,
                    "finish_reason": completion.finish_reason,
                }
            )
    grades: list[Grade] = verifier.grade_many(items)
    for record, grade in zip(records, grades, strict=True):
        record["reward"] = grade.reward
        if grade.reward is None:
            reasons[grade.reason] += 1
    optional = ["reward_terms"] if verifier.sums else []  # all parts have the same columns
    if optional:
        for record, grade in zip(records, grades, strict=True):
            record["reward_terms"] = [
                {"verifier": name, "reward": reward} for name, reward in grade.terms.items()
            ] or None
    return pa.Table.from_pylist(records, schema=rollouts_schema(optional))
