"""Features of groups: batches within a token budget that adapts to memory, token weights, one pass per batch."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cropi_core.errors import StepError
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.groups import Group, batch_groups, cut_batch
from cropi_core.gradients.job import Job
from cropi_core.gradients.objective import token_weights
from cropi_core.gradients.packing import Pack, make_pack, packed_tokens
from cropi_core.policy import is_out_of_memory

FIXED_TOKENS = 16_384
"""Token budget of a group in deterministic mode, regardless of runtime.token_budget."""
PATIENCE = 8
"""Half of the passes without a failure after which a budget grows back for the first time."""

log = logging.getLogger(__name__)


@dataclass
class Budget:
    """Most tokens of one pass: halved when memory runs out, and doubled after passes that did not.

    One unusual group, or another process on the GPU for a moment, must not slow down the rest of a run. Each failure
    doubles the number of passes until the next attempt, so a budget that is too large in general costs ever less.

    Attributes:
        tokens: The budget.
        most: The largest budget, the configured one; ``tokens`` at first.
        patience: Passes without a failure before the budget grows.
        passes: Passes since the last change.
    """

    tokens: int
    most: int = 0
    patience: int = PATIENCE
    passes: int = 0

    def __post_init__(self) -> None:
        """Take the first budget as the largest."""
        self.most = self.most or self.tokens

    def halve(self, error: BaseException) -> None:
        """Halve the budget and log a warning."""
        self.tokens //= 2
        self.patience, self.passes = 2 * self.patience, 0
        log.warning(
            "out of memory (%s): continuing with %d tokens per pass, and trying twice as many after %d passes. Set "
            "runtime.token_budget=%d to avoid retries",
            str(error).splitlines()[0][:120],
            self.tokens,
            self.patience,
            self.tokens,
        )

    def passed(self) -> None:
        """Count a pass within memory; let the budget grow back when enough of them were made."""
        self.passes += 1
        if self.tokens < self.most and self.passes >= self.patience:
            self.tokens, self.passes = min(self.most, 2 * self.tokens), 0


def project_blocks(
    engine: FeatureEngine, groups: list[Group], job: Job, budget: Budget
) -> Iterator[tuple[int, np.ndarray, dict[str, float]]]:
    """Compute the features of the groups with status ``ok``, in the order of their batches.

    Yields:
        Index of the group, its feature (k,) float32, and the statistics ``ess``, ``max_ratio``, ``clip_fraction``,
        ``kl``, ``kl_k1``, ``entropy``.

    Raises:
        StepError: Memory ran out on a single completion.
    """
    fixed = job.deterministic
    for members in batch_groups(groups, 1 if fixed else job.settings.layout.block_rows, budget.most):
        queue = [members]
        while queue:
            batch, *rest = cut_batch(groups, queue.pop(0), budget.tokens)
            queue = rest + queue
            chosen = [groups[i] for i in batch]
            try:
                rows, statistics = project_groups(
                    engine, chosen, job, FIXED_TOKENS if fixed else budget.tokens
                )
            except (MemoryError, RuntimeError) as error:
                if fixed or not is_out_of_memory(error):
                    raise
                _check_smaller(chosen, budget, error)
                budget.halve(error)
                half = (len(batch) + 1) // 2
                queue = [part for part in (batch[:half], batch[half:]) if part] + queue
                continue
            values = rows.cpu().numpy()
            budget.passed()
            finite = [bool(np.isfinite(row).all()) for row in values]
            if len(batch) > 1 and not all(finite):
                # An infinite weight of one prompt makes 0 times infinity in sums over the batch. These prompts are
                # computed again one by one, so that one log-probability of -9999 costs its own prompt alone.
                queue = [[i] for i, valid in zip(batch, finite, strict=True) if not valid] + queue
            for i, row, values_by_name, valid in zip(batch, values, statistics, finite, strict=True):
                if valid or len(batch) == 1:
                    yield i, row, values_by_name


def _check_smaller(groups: list[Group], budget: Budget, error: BaseException) -> None:
    """Check that a failed batch can be halved.

    Raises:
        StepError: The batch is a single completion.
    """
    (first, *others) = groups
    least = len(first.prompt) + max(map(len, first.completions))
    if not others and budget.tokens < least:
        raise StepError(
            f"out of memory on one completion of prompt {first.prompt_id} ({least} tokens). Lower runtime.workers, "
            "use bfloat16, or remove prompts of this length from the pool"
        ) from error


def project_groups(
    engine: FeatureEngine, groups: list[Group], job: Job, budget: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """Compute the features of groups and the statistics of each, in one forward and one backward pass.

    A single group over the budget is cut into pieces of completions: a separate forward pass gives the weights of the
    whole group, and the pieces' gradients are summed. A single completion over the budget is computed without
    keeping activations.

    Returns:
        (prompts, k) features, and the statistics of each prompt.
    """
    out, temperature = engine.accumulators(len(groups)), job.sampling.temperature
    statistics: list[dict[str, float]] = []

    def weigh(prompts: range, logprobs: Tensor, entropy: Tensor) -> Tensor:
        sizes = [sum(map(len, groups[p].completions)) for p in prompts]
        weighed = [
            _weigh_group(groups[p], group_logprobs, group_entropy, job)
            for p, group_logprobs, group_entropy in zip(
                prompts, logprobs.split(sizes), entropy.split(sizes), strict=True
            )
        ]
        statistics.extend(group_statistics for _, group_statistics in weighed)
        return torch.cat([weights for weights, _ in weighed])

    cuts = _pieces(groups[0], budget) if len(groups) == 1 else []
    if len(cuts) < 2:
        pack = _pack(groups, engine)
        engine.project(pack, temperature, weigh, out, recompute=len(pack.ids) > budget)
        return engine.features(out), statistics
    packs = [make_pack([groups[0].prompt], [groups[0].completions[cut]], out.device) for cut in cuts]
    logprobs, entropies = zip(*(engine.logprobs(pack, temperature) for pack in packs), strict=True)
    weights = weigh(range(1), torch.cat(logprobs), torch.cat(entropies))
    parts = weights.split([len(pack.targets) for pack in packs])
    for pack, part in zip(packs, parts, strict=True):
        engine.project(pack, temperature, lambda *_, part=part: part, out, recompute=len(pack.ids) > budget)
    return engine.features(out), statistics


def _pack(groups: list[Group], engine: FeatureEngine) -> Pack:
    return make_pack([g.prompt for g in groups], [g.completions for g in groups], engine.model.device)


def _pieces(group: Group, budget: int) -> list[slice]:
    """Cut a group's completions into pieces that fit the budget together with the prompt, or are one completion."""
    cuts, begin = [], 0
    for i in range(1, len(group.completions) + 1):
        last = i == len(group.completions)
        if last or packed_tokens(group.prompt, group.completions[begin : i + 1]) > budget:
            cuts.append(slice(begin, i))
            begin = i
    return cuts


def _weigh_group(
    group: Group, logprobs: Tensor, entropy: Tensor, job: Job
) -> tuple[Tensor, dict[str, float]]:
    """Compute one group's token weights and statistics from its log-probabilities, all (tokens,), in float64.

    Tokens of a conversation that the policy did not sample have the weight 0 and are in no statistic: nothing is known
    of their distribution. They condition the tokens after them, as the prompt does.
    """
    lengths = [len(c) for c in group.completions]
    behavior = torch.from_numpy(np.concatenate([np.asarray(b, dtype=np.float64) for b in group.behavior]))

    def padded(x: Tensor) -> Tensor:
        return pad_sequence(list(x.cpu().double().split(lengths)), batch_first=True)

    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    mask = real if group.masks is None else real & _sampled(group.masks, lengths)
    rewards = torch.from_numpy(group.rewards)
    weighed = token_weights(
        padded(logprobs), padded(behavior), mask, rewards, job.settings.objective, job.max_new_tokens
    )
    return weighed.weights[real].to(logprobs.device), {
        "ess": weighed.ess,
        "max_ratio": weighed.max_ratio,
        "clip_fraction": weighed.clip_fraction,
        "kl": weighed.kl,
        "kl_k1": weighed.kl_k1,
        "entropy": float((entropy if group.masks is None else entropy[mask[real].to(entropy.device)]).mean()),
    }


def _sampled(masks: Sequence[list[bool] | None], lengths: list[int]) -> Tensor:
    """Return (G, T) bool, true for the tokens that the policy sampled; a completion without a mask has no others."""
    rows = [
        torch.tensor([True] * n if mask is None else mask) for mask, n in zip(masks, lengths, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)
