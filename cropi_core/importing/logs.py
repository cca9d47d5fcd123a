"""Import of another trainer's log as rollouts: prompts are matched, texts tokenised, log-probabilities computed.

    ref = import_log(store, LogSource(Path("rollout_data/"), "verl"), policy=Checkpoint(path), sampling=Sampling())

A log of texts has neither the sampled token ids nor their log-probabilities. Both are computed with the given
checkpoint, and the assumptions are listed in the artifact's summary under ``approximations``.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cropi_core.artifacts import ROLLOUTS as PARTS
from cropi_core.artifacts import Store, write_parquet
from cropi_core.curriculum import publish_import
from cropi_core.errors import DataError
from cropi_core.importing.artifacts import POLICY_KEY, SAMPLING_KEY
from cropi_core.importing.checks import check_rollouts
from cropi_core.importing.log_formats import Asked, Layout, Log, Logged, read_log
from cropi_core.importing.turns import TurnsError, conversation_tokens
from cropi_core.policy import Checkpoint, end_tokens, load_policy, render, turn_end
from cropi_core.progress import Progress, Report, silent
from cropi_core.prompts import asked_text, normalise, read_prompts
from cropi_core.rollouts import Parity, completion_logprobs, part_path, summarise_rollouts
from data_schemas import ArtifactRef, Sampling, rollouts_schema

RETOKENISED = 2
"""Tokens a text may have above the limit: retokenising one cut inside a character yields a few more."""

Prompt = tuple[str, list[int]]
"""A prompt's id and its token ids."""


@dataclass(frozen=True)
class LogSource:
    """A trainer's log, and how it is read.

    Attributes:
        path: Path of the log, see :func:`cropi_core.importing.log_formats.read_log`.
        layout: Format of the log, by trainer.
        reward: TRL: column of the reward.
        on_bad_rows: Refuse a log with invalid rows, or drop them and count them by reason.
    """

    path: Path
    layout: Layout
    reward: str | None = None
    on_bad_rows: Literal["refuse", "drop"] = "refuse"

    def read(self) -> Log:
        """Read the log.

        Raises:
            ConfigError: The log does not have this layout.
            DataError: Rows are invalid.
        """
        return read_log(self.path.expanduser(), self.layout, self.reward, drop=self.on_bad_rows == "drop")


def import_log(
    store: Store,
    source: LogSource,
    *,
    policy: Checkpoint,
    sampling: Sampling,
    prompts: Path | None = None,
    device: str = "auto",
    report: Report = silent,
) -> ArtifactRef:
    """Read a log and publish its rollouts.

    Args:
        store: Target store.
        source: The log.
        policy: The policy that sampled, or its substitute.
        sampling: The sampling settings; log-probabilities are of exactly this distribution.
        prompts: Prompts table in which the log's prompts are looked up; unknown prompts are dropped and counted.
        device: Device of the forward pass.
        report: Called with the number of completions done.

    Raises:
        ConfigError: The log does not have this layout.
        DataError: It is invalid, or none of its prompts is in the table.
        PolicyError: The checkpoint cannot be used.
    """
    log = source.read()
    model, tokenizer = load_policy(policy.path, policy.dtype, device)
    find = _finder(tokenizer, prompts)
    vocabulary = Vocabulary(model, tokenizer)
    rows, counts = _rows(log, find, vocabulary, sampling)
    log.faults.check()
    if not rows:
        faulty = "".join(f"\n  {line}" for line in log.faults.lines())
        if not counts.unmatched:
            raise DataError(f"{source.path}: all {len(log.completions)} completions are faulty:{faulty}")
        raise DataError(
            f"none of the {len(log.completions)} completions of {source.path} is of a prompt of {prompts}: was the "
            f"log made of these prompts, with this checkpoint's chat template?{faulty}"
        )
    parity = _score(rows, model, sampling, report)
    masked = any(row["completion_mask"] is not None for row in rows)
    schema = rollouts_schema(["completion_mask"] if masked else [])
    columns = {name: [row[name] for row in rows] for name in schema.names}
    table = check_rollouts(columns, str(source.path), sampling.max_new_tokens)
    policy_digest = policy.content_digest()
    metadata = {POLICY_KEY: policy_digest.encode(), SAMPLING_KEY: sampling.model_dump_json().encode()}
    table = table.replace_schema_metadata(metadata)
    summary = summarise_rollouts(table, {}) | {
        "policy": policy_digest,
        "layout": source.layout,
        "approximations": _approximations(log, rows, counts, sampling, parity, vocabulary),
        "unmatched": counts.unmatched,
        "failed_rollouts": log.errors,
        "text_changed": counts.changed,
        **_counted(log, counts, rows),
        "outside_top_p": sum(row["outside"] for row in rows),
        "groups_of_one": sum(n == 1 for n in Counter(row["prompt_id"] for row in rows).values()),
        "steps": sorted({one.step for one in log.completions if one.step is not None}),
        **({"parity": parity.summary()} if parity.completions else {}),
    }
    return publish_import(store, "rollouts", {}, summary, _writer(table))


def _writer(table: pa.Table) -> Callable[[Path], None]:
    def fill(out: Path) -> None:
        (out / PARTS).mkdir()
        write_parquet(table, part_path(out / PARTS, 0))

    return fill


# -- prompts --------------------------------------------------------------------------------------------------


def _finder(tokenizer: PreTrainedTokenizerFast, prompts: Path | None) -> Callable[[Asked], Prompt | None]:
    """Return a function that resolves a logged prompt: by lookup in a table, or without one from the prompt itself."""
    if prompts is None:
        return lambda prompt: _derive_prompt(tokenizer, prompt)
    names_by_text: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, list[int]] = {}
    for row in read_prompts(prompts).to_pylist():
        tokens = render(tokenizer, row["messages"])
        ids[row["prompt_id"]] = tokens
        # A logged text is the question, or its rendering by the chat template, with or without special tokens.
        texts = [tokenizer.decode(tokens, skip_special_tokens=skip) for skip in (True, False)]
        for text in [*texts, row["messages"][-1]["content"]]:
            names_by_text[normalise(str(text))].add(row["prompt_id"])
        names_by_text[asked_text(row)].add(row["prompt_id"])

    def find(prompt: Asked) -> Prompt | None:
        text = normalise(prompt) if isinstance(prompt, str) else asked_text({"messages": prompt})
        names = names_by_text.get(text, set())
        if len(names) > 1:
            raise DataError(
                f"a logged prompt is that of {len(names)} prompts of {prompts} ({', '.join(sorted(names)[:3])}): "
                f"{text[:60]!r}; import with a table in which it is once"
            )
        return next(((name, ids[name]) for name in names), None)

    return find


def _derive_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Asked) -> Prompt:
    """Derive a prompt's id, as for tables without ids, and its tokens."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    name = hashlib.sha256(normalise(text).encode()).hexdigest()[:16]
    if isinstance(prompt, str):
        return name, [int(i) for i in tokenizer(prompt)["input_ids"]]  # pyright: ignore[reportGeneralTypeIssues]
    return name, render(tokenizer, prompt)  # pyright: ignore[reportArgumentType]


# -- completions ----------------------------------------------------------------------------------------------


@dataclass
class _Counts:
    """Counts collected while completions are converted.

    Attributes:
        unmatched: Completions of unknown prompts.
        changed: Texts that differ from their detokenised tokens.
        shortened: Texts that had one or two tokens more than the limit, and were cut.
        reasoned: Completions with reasoning that the log stores separately.
        usable: Completions of the log that became rows.
    """

    unmatched: int = 0
    changed: int = 0
    shortened: int = 0
    reasoned: int = 0


class Vocabulary:
    """A tokenizer with its model's vocabulary size and the tokens that end a turn."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.size = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore
        self.end = turn_end(tokenizer)
        self.ends = {*end_tokens(model, tokenizer), self.end}
        self.thinks = "</think>" in tokenizer.get_vocab()

    def ids(self, text: str) -> list[int]:
        """Tokenise a completion."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]  # pyright: ignore

    def turns(self, one: Logged) -> tuple[list[int], list[bool]]:
        """Convert a completion of several turns to token ids and a mask.

        Raises:
            TurnsError: The chat template does not show which tokens were sampled, or the prompt is not messages.
        """
        if isinstance(one.prompt, str):
            raise TurnsError("has several turns, and the prompt is a text")
        prompt, turns = cast(Any, one.prompt), cast(Any, one.turns)
        given = conversation_tokens(self.tokenizer, prompt, turns, self.end, cut=bool(one.truncated))
        return given.ids, given.mask

    def with_reasoning(self, one: Logged, prompt: list[int]) -> str:
        """Put the model's reasoning before its text, in the model's tags for reasoning."""
        opened = str(self.tokenizer.decode(prompt[-8:])).rstrip().endswith("<think>")
        return ("" if opened else "<think>\n") + f"{one.reasoning.strip()}\n</think>\n\n{one.text}"


def _rows(
    log: Log, find: Callable[[Asked], Prompt | None], vocabulary: Vocabulary, sampling: Sampling
) -> tuple[list[dict[str, Any]], _Counts]:
    """Convert completions to rollout rows; log-probabilities are None if the log has none."""
    rows, counts, samples = [], _Counts(), Counter()
    for one in log.completions:
        prompt = find(one.prompt)
        if prompt is None:
            counts.unmatched += 1
            continue
        name, prompt_ids = prompt
        if one.tokens is not None:
            prompt_ids, ids, text = one.tokens.prompt, one.tokens.completion, one.text or one.reasoning
            cut = one.truncated if one.truncated is not None else ids[-1] not in vocabulary.ends
            mask = one.tokens.mask
        elif one.turns:
            text, cut = one.text, bool(one.truncated)
            try:
                ids, mask = vocabulary.turns(one)
            except TurnsError as fault:
                log.faults.add(str(fault), one.place)
                continue
        else:
            text, mask = one.text, None
            if one.reasoning and vocabulary.thinks:
                text = vocabulary.with_reasoning(one, prompt_ids)
                counts.reasoned += 1
            ids = vocabulary.ids(text)
            over = len(ids) - sampling.max_new_tokens
            counts.changed += str(vocabulary.tokenizer.decode(ids, skip_special_tokens=True)) != text
            cut = one.truncated if one.truncated is not None else over >= 0
            if 0 < over <= RETOKENISED:
                ids, cut = ids[: sampling.max_new_tokens], True
                counts.shortened += 1
            elif not cut and over < 0:
                ids = [*ids, vocabulary.end]
        if fault := _fault(one, prompt_ids, ids, mask, vocabulary, sampling):
            log.faults.add(fault, one.place)
            continue
        rows.append(
            {
                "prompt_id": name,
                "sample": samples[name],
                "prompt_ids": prompt_ids,
                "completion_ids": ids,
                "behavior_logprobs": one.tokens.logprobs if one.tokens else None,
                "text": text,
                "reward": one.reward,
                "finish_reason": "length" if cut else "stop",
                "completion_mask": mask,
                "outside": 0,
                "filled": 0,
            }
        )
        samples[name] += 1
    return rows, counts


def _fault(
    one: Logged,
    prompt: list[int],
    ids: list[int],
    mask: list[bool] | None,
    vocabulary: Vocabulary,
    sampling: Sampling,
) -> str:
    """Return why a completion cannot be used, or an empty string."""
    if not prompt:
        return "the prompt has no tokens"
    if not ids:
        return "the completion has no tokens"
    if (len(ids) if mask is None else sum(mask)) > sampling.max_new_tokens:
        return f"the completion has more tokens than sampling.max_new_tokens={sampling.max_new_tokens}"
    strange = [i for i in (*prompt, *ids) if not 0 <= i < vocabulary.size]
    if strange:
        return f"token id {str(strange[0])[:20]} is beyond the {vocabulary.size} tokens of the checkpoint"
    if one.reasoning and one.tokens is None and not vocabulary.thinks:
        return "reasoning_content is kept apart, and the checkpoint has no </think> token to put it before the text"
    return ""


def _counted(log: Log, counts: _Counts, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the non-zero counts of rows that were dropped or altered."""
    by_name = {
        "dropped": log.faults.dropped(),
        "repeated_rows": log.repeated,
        "shortened_by_one_or_two_tokens": counts.shortened,
        "with_reasoning": counts.reasoned,
        "several_turns": sum(row["completion_mask"] is not None for row in rows),
        "logprobs_filled": sum(row["filled"] for row in rows),
    }
    return {name: count for name, count in by_name.items() if count}


def _score(rows: list[dict[str, Any]], model: PreTrainedModel, sampling: Sampling, report: Report) -> Parity:
    """Fill in missing log-probabilities with a forward pass; keep the log's values and compare them."""
    parity = Parity()
    for position, row in enumerate(rows):
        report(Progress(position, len(rows), "completion"))
        computed, kept = completion_logprobs(model, row["prompt_ids"], row["completion_ids"], sampling)
        values, logged = computed.double().cpu().numpy(), row["behavior_logprobs"]
        mask = row["completion_mask"]
        sampled = np.ones(len(values), bool) if mask is None else np.array(mask)
        row["outside"] = int((~kept.cpu().numpy() & sampled).sum())
        if logged is None:
            row["behavior_logprobs"] = np.where(sampled, values, 0.0).tolist()
            continue
        given = np.array([np.nan if value is None else value for value in logged], dtype=np.float64)
        missing = np.isnan(given)
        row["filled"] = int(missing.sum())
        row["behavior_logprobs"] = np.where(missing, values, given).tolist()
        if (compared := sampled & ~missing).any():
            gaps = np.abs(values - given)[compared]
            parity += Parity(1, len(gaps), float(gaps.sum()), float(gaps.max()), row["outside"])
    report(Progress(len(rows), len(rows), "completion"))
    return parity


def _changes(log: Log, counts: _Counts) -> list[str]:
    """List what was dropped, put together, cut or masked."""
    lines = []
    if log.repeated:
        lines.append(
            f"{log.repeated} rows are in an earlier file too (the same batch, logged again) and are counted once"
        )
    if dropped := log.faults.dropped():
        reasons = "; ".join(f"{count}: {name.removeprefix('bad row: ')}" for name, count in dropped.items())
        lines.append(f"{sum(dropped.values())} faulty rows were dropped ({reasons})")
    if counts.reasoned:
        lines.append(
            f"reasoning that the log keeps apart stands before the text of {counts.reasoned} completions, between "
            "<think> and </think> and with line breaks as Qwen3 has them: the sampler may have had others"
        )
    if counts.shortened:
        lines.append(
            f"{counts.shortened} texts have one or two tokens more than the limit, and were taken as cut there"
        )
    if any(one.turns for one in log.completions):
        lines.append(
            "of conversations, what the policy was told between its turns is masked: it conditions later turns and has "
            "no gradient"
        )
    return lines


def _approximations(
    log: Log,
    rows: list[dict[str, Any]],
    counts: _Counts,
    sampling: Sampling,
    parity: Parity,
    vocabulary: Vocabulary,
) -> list[str]:
    """List the assumptions."""
    lines, completions = _changes(log, counts), log.completions
    filled = sum(row["filled"] for row in rows)
    if filled:
        lines.append(
            f"{filled} log-probabilities are null or not finite in the log and are our own forward's"
        )
    end = vocabulary.tokenizer.eos_token_id
    if any(one.tokens is None for one in completions) and vocabulary.end != end:
        name = vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.end)
        lines.append(f"a completion ends with {name!r}, which the chat template puts at the end of a turn")
    if any(one.tokens is None for one in completions):
        lines += [
            f"token ids are the texts' ({counts.changed} of {len(rows)} texts come back changed): a sampler may have "
            "taken others with the same text",
            "log-probabilities are our own forward's in float32 with the given checkpoint at temperature "
            f"{sampling.temperature:g}, top-p {sampling.top_p:g}: as far as another policy or distribution sampled, "
            "importance ratios are of another than it",
        ]
    if parity.completions:
        lines.append(
            "log-probabilities are the log's; our own forward's with the given checkpoint are "
            f"{parity.mean:.2g} a token from them (largest {parity.maximum:.2g})"
        )
    if any(one.tokens is None and one.truncated is None for one in completions):
        lines.append(
            f"the log does not say which completions were cut: those of {sampling.max_new_tokens} tokens or more were, "
            "the others got an end token"
        )
    steps = sorted({one.step for one in completions if one.step is not None})
    if len(steps) > 1:
        lines.append(
            f"completions of {len(steps)} training steps, {steps[0]} to {steps[-1]}, are taken for one policy's"
        )
    return lines
