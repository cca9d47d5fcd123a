"""Requests to one server: answers are read up to a bound and checked completely.

    completions = await ask(client, server, job, sampling)     # list of Completion, in the order of the samples

``POST /v1/completions`` of vLLM's OpenAI-compatible server with token ids as the prompt. Every sampling parameter is
sent, so that no default of the server or of the checkpoint has an effect.
"""

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

import httpx

from cropi_core.errors import ServerError, foreign_errors
from cropi_core.rollouts.sampling import Completion
from data_schemas import Sampling

SLACK_BYTES = 1 << 20
BYTES_PER_TOKEN = 2048
"""Bound of an answer per token: its text three times, its id and its log-probability."""
LARGEST_LOGPROB = 1e-4
"""A log-probability above this is an error; rounding makes some slightly positive."""
ABOUT_THE_PROMPT = (400, 413, 422)
"""Refusals that another server would repeat; others are about the server: it wants a key or has no such model."""
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
UNFINISHED = ("abort", "error")
"""Finish reasons of a server that is shutting down."""
MOST_QUOTED = 400
"""Characters of a server's answer that an error quotes."""


class TransientError(Exception):
    """A request failed, and another attempt or another server may succeed."""


class UnusableServerError(ServerError):
    """A server answers outside the protocol or does not know the model: other servers can do its work."""


@dataclass(frozen=True)
class Job:
    """One request: all samples of one prompt.

    Attributes:
        index: Position among the prompts.
        prompt_id: Id of the prompt, for error messages.
        prompt: Token ids.
        seed: Sample ``i`` is drawn with ``seed + i``.
    """

    index: int
    prompt_id: str
    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a policy.

    Attributes:
        size: Number of ids of the model.
        unused_id: An id that neither model nor tokenizer has; usually equal to ``size``.
        ends: Ids that end a completion.
    """

    size: int
    unused_id: int
    ends: tuple[int, ...]


def request_body(job: Job, model: str, sampling: Sampling, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the body of a request."""
    return {
        "model": model,
        "prompt": job.prompt,
        "n": sampling.samples,
        "seed": job.seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "ignore_eos": False,
        "watermarking": False,
        "stop_token_ids": list(vocabulary.ends),
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


async def ask(
    client: httpx.AsyncClient, model: str, job: Job, sampling: Sampling, vocabulary: Vocabulary
) -> list[Completion]:
    """Request the completions of a prompt.

    Args:
        client: Client of the server.
        model: Name of the served model.
        job: The prompt.
        sampling: The distribution.
        vocabulary: Valid token ids.

    Raises:
        TransientError: There is no answer, or its status allows another attempt.
        UnusableServerError: The answer violates the protocol, or the server does not serve the model.
        ServerError: The request was refused.
    """
    samples, longest = sampling.samples, sampling.max_new_tokens
    bound = SLACK_BYTES + samples * (longest * BYTES_PER_TOKEN + 16 * len(job.prompt))
    body = request_body(job, model, sampling, vocabulary)
    status, raw = await send(client, "/v1/completions", body, bound)
    if status in RETRIED:
        raise TransientError(f"HTTP {status}: {error_text(raw)}")
    if status != 200:
        raise (ServerError if status in ABOUT_THE_PROMPT else UnusableServerError)(
            f"{client.base_url} refused prompt {job.prompt_id} ({len(job.prompt)} tokens, "
            f"{samples} completions of at most {longest}): HTTP {status}: {error_text(raw)}"
        )
    with foreign_errors(
        f"the answer of {client.base_url} to prompt {job.prompt_id} cannot be used",
        UnusableServerError,
        "It must be a vLLM server with --logprobs-mode processed_logprobs (docs/guides/vllm.md)",
    ):
        return completions_of(raw, job, sampling, vocabulary)


async def send(
    client: httpx.AsyncClient, path: str, body: dict[str, Any] | None, bound: int
) -> tuple[int, bytes]:
    """Send a request (GET without a body) and read its answer up to ``bound`` bytes.

    The client's time limit of a read holds for the whole answer: a server that sends a byte now and then hangs as well.

    Raises:
        TransientError: The answer is not complete in time.
        UnusableServerError: The answer is longer.
    """
    method = "GET" if body is None else "POST"
    raw, limit = bytearray(), client.timeout.read
    try:
        async with asyncio.timeout(limit), client.stream(method, path, json=body) as answer:
            async for piece in answer.aiter_bytes():
                raw += piece
                if len(raw) > bound:
                    raise UnusableServerError(
                        f"{client.base_url} answers {path} with more than {bound} bytes; it is not a vLLM server"
                    )
            return answer.status_code, bytes(raw)
    except TimeoutError as error:
        raise TransientError(f"no whole answer within {limit:g} s") from error
    except httpx.HTTPError as error:
        raise TransientError(f"{type(error).__name__}: {error}".rstrip(": ")) from error


def error_text(raw: bytes) -> str:
    """Return the start of an answer: the message of its error if it has one."""
    text = raw.decode(errors="replace")
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    return " ".join(str(message).split())[:MOST_QUOTED] or "an empty answer"


def completions_of(raw: bytes, job: Job, sampling: Sampling, vocabulary: Vocabulary) -> list[Completion]:
    """Read the completions from an answer.

    Raises:
        ValueError: A part of the answer is missing or invalid.
        TransientError: The server gave up the request.
    """
    answer = json.loads(raw)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ValueError("it has no list of choices")
    by_index = {i: c for c in choices if type(i := c.get("index")) is int}
    if len(choices) != sampling.samples or set(by_index) != set(range(sampling.samples)):
        raise ValueError(f"{len(choices)} choices for n={sampling.samples}, of index {sorted(by_index)[:5]}")
    for choice in choices:
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != job.prompt:
            raise ValueError("prompt_token_ids differ from those sent: the server changed the prompt")
        if choice.get("finish_reason") in UNFINISHED:
            raise TransientError(f"finish_reason {choice['finish_reason']!r}: the server gave up the request")
    return [_completion(by_index[i], sampling.max_new_tokens, vocabulary) for i in range(sampling.samples)]


def _completion(choice: dict[str, Any], longest: int, vocabulary: Vocabulary) -> Completion:
    """Check one choice; see :func:`completions_of`."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError("token_ids are missing: the server does not support return_token_ids")
    if len(ids) > longest:
        raise ValueError(f"{len(ids)} tokens where max_tokens is {longest}")
    if outside := [i for i in ids if not 0 <= i < vocabulary.size]:
        raise ValueError(f"token id {outside[0]} for a vocabulary of {vocabulary.size}")
    record = choice.get("logprobs")
    logprobs = record.get("token_logprobs") if isinstance(record, dict) else None
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ValueError(
            f"{len(logprobs) if isinstance(logprobs, list) else 'no'} log-probabilities for {len(ids)} tokens"
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in logprobs):
        raise ValueError("a log-probability is not a finite number")
    if (largest := max(logprobs)) > LARGEST_LOGPROB:
        raise ValueError(f"a log-probability of {largest:.3g} is above 0; logits were sent instead")
    reason = choice.get("finish_reason")
    ended = ids[-1] in vocabulary.ends
    if any(i in vocabulary.ends for i in ids[:-1]) or reason != ("stop" if ended else "length"):
        raise ValueError(
            f"finish_reason {reason!r} of {len(ids)} tokens, {'with' if ended else 'without'} an end token last: the "
            f"server ends completions by other rules than the end tokens {list(vocabulary.ends)} and max_tokens"
        )
    if not ended and len(ids) != longest:
        raise ValueError(
            f"finish_reason 'length' after {len(ids)} tokens of {longest}: max_model_len is too small"
        )
    return Completion(ids, [float(value) for value in logprobs], "stop" if ended else "length")
