"""Sampling with vLLM servers: shards of prompts, and the completions of each shard when all of them are finished.

    servers = VllmServers(policy, "float32", settings, logs)
    servers.open(model, tokenizer, shards, sampling)
    for index, groups, parity in servers.sample(shards, sampling, seed): ...
    servers.close()

The queue holds the prompts of all shards, so servers are busy between shards; an interruption costs the unfinished
shards.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cropi_core.policy import embedded_tokens, end_tokens
from cropi_core.random_bits import key64
from cropi_core.rollouts.parity import Parity
from cropi_core.rollouts.sampling import Completion, check_prompts
from cropi_core.rollouts.vllm.checks import Expected, check_servers
from cropi_core.rollouts.vllm.client import Job, Vocabulary
from cropi_core.rollouts.vllm.fleet import Endpoint, Fleet
from cropi_core.rollouts.vllm.server import SERVED, started
from cropi_core.rollouts.vllm.shards import OpenShards, Prompts
from data_schemas import Sampling, Vllm

API_KEY = "CROPI_VLLM_API_KEY"
"""Variable with the key of running servers; it is not in the configuration, which is recorded."""


def request_seed(seed: int, prompt_id: str) -> int:
    """Return the seed of a prompt's request; the server draws sample ``i`` with this seed plus ``i``."""
    return key64("vllm", seed, prompt_id) & ((1 << 62) - 1)


def vocabulary_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Return the token ids of a policy and those that end its completions."""
    size = embedded_tokens(model)
    return Vocabulary(size, max(size, len(tokenizer)), tuple(end_tokens(model, tokenizer)))


class VllmServers:
    """The servers of a policy, which are started or attached to at first use."""

    def __init__(self, policy: Path, dtype: str, settings: Vllm, logs: Path) -> None:
        self.policy, self.dtype, self.settings, self.logs = policy, dtype, settings, logs
        self.stack = ExitStack()
        self.endpoints: list[Endpoint] = []
        self.expected: Expected | None = None

    def close(self) -> None:
        """End the started servers."""
        self.stack.close()
        self.endpoints, self.expected = [], None

    def open(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        shards: Mapping[int, Prompts],
        sampling: Sampling,
    ) -> None:
        """Start or attach to servers for these prompts and check them; keep those of an earlier call if they suffice.

        Args:
            model: The policy in float32, for comparisons.
            tokenizer: The policy's tokenizer.
            shards: (prompt_id, token ids) pairs by the shard's number.
            sampling: The distribution and the number of samples.

        Raises:
            DataError: A prompt and its completion do not fit the model's context.
            ConfigError: There is no interpreter with vLLM.
            ServerError: A server does not start, or serves another policy.
        """
        prompts = [pair for shard in shards.values() for pair in shard]
        check_prompts(model, prompts, sampling)
        tokens = max(len(ids) for _, ids in prompts) + sampling.max_new_tokens
        if self.expected is not None and tokens <= self.expected.tokens:
            return
        self.close()
        # A power of two, so that the servers suffice for a next set of somewhat longer prompts.
        context = getattr(model.config, "max_position_embeddings", None) or tokens
        room = (
            tokens if self.settings.base_urls else max(tokens, min(context, 1 << (tokens - 1).bit_length()))
        )
        expected = Expected(self.policy, self.dtype, model, vocabulary_of(model, tokenizer), room)
        self.endpoints = self._endpoints(room)
        check_servers(self.endpoints, expected, [ids for _, ids in prompts], self.settings)
        self.expected = expected

    def _endpoints(self, tokens: int) -> list[Endpoint]:
        """Attach to the configured servers, or start servers."""
        settings = self.settings
        if settings.base_urls:
            key = os.environ.get(API_KEY)
            return [Endpoint(url.rstrip("/").removesuffix("/v1"), key=key) for url in settings.base_urls]
        servers = self.stack.enter_context(
            started(self.policy, settings, dtype=self.dtype, max_model_len=tokens, logs=self.logs)
        )
        return [
            Endpoint(s.url, SERVED, s.key, lambda s=s: s.exit_status, lambda s=s: s.tail()) for s in servers
        ]

    def sample(
        self, shards: Mapping[int, Prompts], sampling: Sampling, seed: int, start: int = 0
    ) -> Iterator[tuple[int, list[list[Completion]], Parity]]:
        """Sample shards; yield each when its last prompt is finished.

        Args:
            shards: The shards of :meth:`open`.
            sampling: The distribution of :meth:`open`.
            seed: Draws depend on (seed, prompt_id, sample); see :func:`request_seed`.
            start: Number of the first sample.

        Yields:
            The shard's number, its completions by prompt, and the comparison of a few of them.

        Raises:
            ServerError: No server is left; one whose log-probabilities differ too much from cropi's forward pass is
                removed.
        """
        assert self.expected is not None, "open() must be called first"
        opened = OpenShards(shards, self.expected, self.settings, sampling, seed)
        jobs = [
            # vLLM draws sample i of a request with the request's seed + i.
            Job(number, *shards[index][place], request_seed(seed, shards[index][place][0]) + start)
            for number, (index, place) in enumerate(opened.places)
        ]
        with Fleet(self.endpoints, self.settings, sampling, self.expected.vocabulary) as fleet:
            while jobs:
                for job, completions, source in fleet.run(jobs):
                    complete = opened.add(job, completions, source)
                    for url, why in opened.foreign.items():
                        fleet.remove(url, why)
                    if complete is not None:
                        yield complete
                jobs, opened.again = opened.again, []
