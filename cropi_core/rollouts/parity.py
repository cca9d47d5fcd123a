"""How far another program's log-probabilities are from those of cropi's forward pass in float32.

    parity = measure(model, rows, sampling)        # rows: (prompt ids, completion ids, log-probabilities)
    parity.mean, parity.maximum

An importance ratio is the exponential of a difference of log-probabilities, so a difference between two programs'
arithmetic enters every weight. It is therefore measured, stored with the rollouts and compared with limits.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cropi_core.policy import embedded_tokens
from data_schemas import Sampling, Vllm

PARITY = b"cropi.parity"
"""Metadata key of a part sampled by vLLM: the comparison of a few of its completions."""
LIMITS = {"float32": (1e-3, 2e-2), "bfloat16": (0.1, 1.0)}
"""Largest mean and largest single |Δ log-probability| against a float32 forward pass, by the type of the weights."""
BATCH_BYTES = 1 << 30
"""Float32 logits of the completions that are compared in one forward pass."""

Row = tuple[list[int], list[int], Sequence[float]]
"""Token ids of a prompt and of a completion, and the log-probabilities that another program reports for the latter."""


@dataclass(frozen=True)
class Parity:
    """Differences over some completions, as sums, so that those of parts can be added.

    Attributes:
        completions: Number of completions compared.
        tokens: Number of tokens compared.
        total: Sum of |Δ| over the tokens.
        maximum: Largest |Δ|.
        outside: Number of tokens that top-p excludes in cropi's forward pass; at its border, rounding decides.
    """

    completions: int = 0
    tokens: int = 0
    total: float = 0.0
    maximum: float = 0.0
    outside: int = 0

    @property
    def mean(self) -> float:
        """Mean |Δ| of a token."""
        return self.total / self.tokens if self.tokens else 0.0

    def __add__(self, other: "Parity") -> "Parity":
        """Add the differences of other completions."""
        return Parity(
            self.completions + other.completions,
            self.tokens + other.tokens,
            self.total + other.total,
            max(self.maximum, other.maximum),
            self.outside + other.outside,
        )

    def to_json(self) -> str:
        """Serialise to JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what :meth:`to_json` returned."""
        return cls(**json.loads(text))

    def summary(self) -> dict[str, Any]:
        """Return the entries of a manifest's summary."""
        return {
            "completions": self.completions,
            "tokens": self.tokens,
            "mean_difference": self.mean,
            "max_difference": self.maximum,
            "outside_top_p": self.outside,
        }


def truncated_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens after temperature and top-p, and whether top-p keeps each token.

    The nucleus is the smallest set of most likely tokens that reaches ``top_p``, as in transformers and vLLM. A token
    outside the nucleus gets the log-probability that it would have with the same normalisation, so that a border case
    gives a small difference.

    Args:
        logits: (tokens, vocabulary) float32.
        ids: (tokens,) int64.
        temperature: Above 0.
        top_p: In (0, 1].

    Returns:
        (tokens,) log-probabilities and (tokens,) bool.
    """
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    if top_p >= 1:
        return chosen, torch.ones_like(ids, dtype=torch.bool)
    ranked = logprobs.exp().sort(-1, descending=True).values
    kept = ranked.cumsum(-1) - ranked < top_p
    mass = (ranked * kept).sum(-1)
    least = ranked.masked_fill(~kept, torch.inf).min(-1).values
    return chosen - mass.log(), chosen.exp() >= least


def completion_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: list[int], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Return :func:`truncated_logprobs` of a completion, from one forward pass without padding or cache.

    Args:
        model: In float32.
        prompt: Token ids.
        completion: T token ids.
        sampling: The distribution.

    Returns:
        (T,) log-probabilities and (T,) bool, on the model's device.
    """
    return _batch_logprobs(model, [(prompt, completion)], sampling)[0]


@torch.inference_mode()
def _batch_logprobs(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], sampling: Sampling
) -> list[tuple[Tensor, Tensor]]:
    """Compute several completions in one forward pass.

    Rows are padded on the right. No mask is needed: attention is causal, so no token sees the padding after it.
    """
    rows = [prompt + completion for prompt, completion in pairs]
    width, first = max(map(len, rows)), min(len(prompt) for prompt, _ in pairs) - 1
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(ids, logits_to_keep=width - first, use_cache=False).logits
    results = []
    for (prompt, completion), row, row_logits in zip(pairs, ids, logits, strict=True):
        begin, end = len(prompt), len(prompt) + len(completion)
        part = row_logits[begin - 1 - first : end - 1 - first].float()
        results.append(truncated_logprobs(part, row[begin:end], sampling.temperature, sampling.top_p))
    return results


def measure(model: PreTrainedModel, rows: Iterable[Row], sampling: Sampling) -> Parity:
    """Compare reported log-probabilities with those of cropi's forward pass.

    Args:
        model: The policy in float32.
        rows: The completions and the log-probabilities reported for them.
        sampling: The distribution that the log-probabilities are reported for.
    """
    parity = Parity()
    for batch in batches(list(rows), embedded_tokens(model)):
        pairs = [(prompt, completion) for prompt, completion, _ in batch]
        computed = _batch_logprobs(model, pairs, sampling)
        for (_, completion, reported), (logprobs, kept) in zip(batch, computed, strict=True):
            gaps = (logprobs.double().cpu() - torch.tensor(reported, dtype=torch.float64)).abs()
            parity += Parity(1, len(completion), float(gaps.sum()), float(gaps.max()), int((~kept).sum()))
    return parity


def batches(rows: Sequence[Row], vocabulary: int) -> list[list[Row]]:
    """Cut rows into batches of similar lengths whose logits take at most :data:`BATCH_BYTES`, or of a single row."""
    cut: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row[0]) + len(row[1]), reverse=True):
        longest = cut[-1][0] if cut else row
        width = len(longest[0]) + len(longest[1])  # an upper bound: the logits of prompts are not computed
        if cut and (len(cut[-1]) + 1) * width * vocabulary * 4 <= BATCH_BYTES:
            cut[-1].append(row)
        else:
            cut.append([row])
    return cut


def parity_limits(settings: Vllm, dtype: str) -> tuple[float, float]:
    """Return the limits of the mean and of single differences."""
    mean, single = LIMITS[dtype]
    return settings.max_mean_difference or mean, settings.max_difference or single


def parity_summary(directories: Sequence[Path], dtype: str, settings: Vllm) -> dict[str, Any]:
    """Add up the comparisons of all parts in some directories, and compare them with the limits.

    Returns:
        :meth:`Parity.summary`, ``mean_limit``, ``max_limit`` and ``warning`` (empty if no limit is exceeded).
    """
    parity = Parity()
    for path in [path for directory in directories for path in sorted(directory.glob("part-*.parquet"))]:
        parity += Parity.from_json((pq.read_schema(path).metadata or {})[PARITY])
    mean, single = parity_limits(settings, dtype)
    warning = ""
    if parity.maximum > single:
        warning = (
            f"a token's log-probability by vLLM differs by {parity.maximum:.3g} from cropi's forward pass in float32, "
            f"more than runtime.vllm.max_difference={single:g} (mean {parity.mean:.3g} over {parity.tokens} tokens)"
        )
    return parity.summary() | {"mean_limit": mean, "max_limit": single, "warning": warning}
