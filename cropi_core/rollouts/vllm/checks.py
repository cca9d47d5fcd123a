"""Checks of a server before anything is sampled: its checkpoint, context, vocabulary and log-probabilities.

A difference is an error that names both values. The properties that a server reports are compared first. Its weights
cannot be read, so a few completions are sampled and their log-probabilities compared with cropi's forward pass, at a
temperature at which raw and processed log-probabilities differ.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedModel

from cropi_core.artifacts import file_sha256
from cropi_core.errors import PolicyError, ServerError, foreign_errors
from cropi_core.policy import checkpoint_files
from cropi_core.rollouts.parity import measure, parity_limits
from cropi_core.rollouts.vllm.client import Job, TransientError, Vocabulary, ask, error_text, send
from cropi_core.rollouts.vllm.fleet import Endpoint
from data_schemas import Sampling, Vllm

ANSWER_BYTES = 1 << 20
PROBE_TEMPERATURE = 2.0
PROBE_TOP_P = 0.9
PROBE_PROMPTS = 4
PROBE_SAMPLES = 2
PROBE_TOKENS = 16
RAW = Sampling()


@dataclass(frozen=True)
class Expected:
    """The required properties of the servers.

    Attributes:
        policy: Checkpoint directory.
        dtype: Type of the weights.
        model: The policy in float32.
        vocabulary: Token ids of the policy.
        tokens: Tokens of the longest prompt with its completion.
    """

    policy: Path
    dtype: str
    model: PreTrainedModel
    vocabulary: Vocabulary
    tokens: int


def check_servers(
    endpoints: list[Endpoint], expected: Expected, prompts: list[list[int]], settings: Vllm
) -> None:
    """Check every server, and set the name of its model.

    Raises:
        ServerError: A server cannot be reached or serves another policy.
    """

    async def check_all() -> None:
        await asyncio.gather(*[_check(endpoint, expected, prompts, settings) for endpoint in endpoints])

    with ThreadPoolExecutor(1) as pool:  # the caller's thread may have a running event loop
        pool.submit(asyncio.run, check_all()).result()


async def _check(server: Endpoint, expected: Expected, prompts: list[list[int]], settings: Vllm) -> None:
    """Check one server; see :func:`check_servers`."""
    async with server.client(settings) as client:
        try:
            served = await _served_model(client, settings.model)
            server.model = served["id"]
            length = served.get("max_model_len")
            if not isinstance(length, int) or length < expected.tokens:
                raise ServerError(
                    f"{server.url} has max_model_len={length}, and the longest prompt with its completion takes "
                    f"{expected.tokens} tokens. Start it with --max-model-len {expected.tokens} or more, or lower "
                    "max_new_tokens"
                )
            _compare_checkpoints(server, served.get("root"), expected)
            await _check_vocabulary(client, server, expected.vocabulary)
            await _check_logprobs(client, server, expected, prompts, settings)
        except TransientError as error:
            raise ServerError(
                f"{server.url} cannot be used: {error}. Start it, or correct runtime.vllm.base_urls"
                + (f"; {tail}" if (tail := server.tail()) else "")
            ) from error


async def _served_model(client: httpx.AsyncClient, name: str | None) -> dict[str, Any]:
    """Request the list of served models and return the configured one."""
    status, raw = await send(client, "/v1/models", None, ANSWER_BYTES)
    if status == 401:
        raise ServerError(
            f"{client.base_url} asks for a key: export CROPI_VLLM_API_KEY (HTTP 401: {error_text(raw)})"
        )
    if status != 200:
        raise TransientError(f"/v1/models answers HTTP {status}: {error_text(raw)}")
    with foreign_errors(
        f"{client.base_url}/v1/models does not return a list of models ({error_text(raw)})",
        ServerError,
        "Is it a vLLM server?",
    ):
        models = json.loads(raw)["data"]
        by_name = {str(model["id"]): model for model in models}
    if name is None and len(by_name) == 1:
        return next(iter(by_name.values())) | {"id": next(iter(by_name))}
    if name in by_name:
        return by_name[name] | {"id": name}
    raise ServerError(
        f"{client.base_url} serves {', '.join(map(repr, by_name)) or 'no model'}, and runtime.vllm.model={name}. Set "
        "runtime.vllm.model to one of them"
    )


def _compare_checkpoints(server: Endpoint, root: Any, expected: Expected) -> None:
    """Compare weights and configuration with those of the policy if the server's directory is on this machine.

    Otherwise :func:`_check_logprobs` detects other weights.
    """
    if not isinstance(root, str) or not root.startswith("/") or not Path(root).is_dir():
        return
    if Path(root).resolve() == expected.policy.resolve():
        return
    try:
        served, required = (
            {p.name: p for p in checkpoint_files(d) if p.suffix == ".safetensors" or p.name == "config.json"}
            for d in (Path(root), expected.policy)
        )
    except PolicyError as error:
        raise ServerError(
            f"{server.url} serves {root}, which is not a checkpoint that cropi can check: {error}"
        ) from error
    differing = sorted(
        name
        for name in served.keys() | required.keys()
        if name not in served
        or name not in required
        or file_sha256(served[name]) != file_sha256(required[name])
    )
    if differing:
        raise ServerError(
            f"{server.url} serves {root}, the policy is {expected.policy}: {', '.join(differing[:3])} differ. A server "
            "keeps the checkpoint that it was started with: start it with the policy, or leave out "
            "runtime.vllm.base_urls"
        )


async def _check_vocabulary(client: httpx.AsyncClient, server: Endpoint, vocabulary: Vocabulary) -> None:
    """Check that the server accepts the last token id and refuses the one after it."""
    for token, valid in ((vocabulary.size - 1, True), (vocabulary.unused_id, False)):
        body = {"model": server.model, "prompt": [token], "max_tokens": 1, "temperature": 1.0}
        status, raw = await send(client, "/v1/completions", body, ANSWER_BYTES)
        if status == (200 if valid else 400):
            continue
        if status in (200, 400):
            raise ServerError(
                f"{server.url} {'refuses' if valid else 'accepts'} token id {token}, the policy's vocabulary has "
                f"{vocabulary.size} ids: it serves another model or tokenizer ({error_text(raw)})"
            )
        raise TransientError(f"/v1/completions answers HTTP {status}: {error_text(raw)}")


async def _check_logprobs(
    client: httpx.AsyncClient, server: Endpoint, expected: Expected, prompts: list[list[int]], settings: Vllm
) -> None:
    """Sample a few completions and compare their log-probabilities with those of cropi's forward pass."""
    room = min(PROBE_TOKENS, expected.tokens - max(map(len, prompts[:PROBE_PROMPTS])))
    probe = Sampling(
        samples=PROBE_SAMPLES, temperature=PROBE_TEMPERATURE, top_p=PROBE_TOP_P, max_new_tokens=max(1, room)
    )
    rows = []
    for index, prompt in enumerate(prompts[:PROBE_PROMPTS]):
        job = Job(index, f"{index} of the probe", prompt, index)
        answers = await ask(client, server.model, job, probe, expected.vocabulary)
        rows += [(job.prompt, completion.ids, completion.logprobs) for completion in answers]
    parity = measure(expected.model, rows, probe)
    limit, _ = parity_limits(settings, expected.dtype)
    if parity.mean <= limit:
        return
    if measure(expected.model, rows, RAW).mean <= limit:
        raise ServerError(
            f"{server.url} returns log-probabilities of the unchanged distribution, not of the one that was sampled "
            "from. Start it with --logprobs-mode processed_logprobs"
        )
    raise ServerError(
        f"{server.url} returns log-probabilities that are not those of {expected.policy}: mean |Δ| {parity.mean:.3g}, "
        f"largest {parity.maximum:.3g} over {parity.tokens} tokens at temperature {PROBE_TEMPERATURE:g}, top-p "
        f"{PROBE_TOP_P:g}; the limit runtime.vllm.max_mean_difference is {limit:g}. It serves other weights or another "
        f"precision (required: --dtype {expected.dtype}, no quantization)"
    )
