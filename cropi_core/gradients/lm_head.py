"""The policy's output layer in pieces: log-probabilities and their gradient without the logits of all tokens.

For a loss Σ c_t log π(y_t) the gradient of the logits is c_t/T · (onehot − softmax). It follows from the logits of the
same piece, so the forward and backward passes of a piece of tokens are computed together and its logits are freed. No
graph and no (tokens, vocabulary) tensor of the whole pack exist: for 4,096 tokens and 49,152 entries that tensor alone
is 0.8 GB, and autograd keeps three of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cropi_core.errors import ProjectionError

PIECE_BYTES = 256 << 20
"""Bytes of the float32 logits of a piece. The logits of a prompt that needs more are computed twice."""

Weigh = Callable[[range, Tensor, Tensor], Tensor]
"""Computes the weights c of some prompts' tokens from their log-probabilities and entropies; all are (tokens,)."""
Deliver = Callable[[range, Tensor, Tensor], None]
"""Receives the prompts of a piece, the gradient of its logits (tokens, vocabulary) and its input (tokens, d)."""


class Head:
    """The last linear layer of a policy and the transformation of its logits."""

    def __init__(self, model: PreTrainedModel, *, last: bool = False) -> None:
        """Find the output layer of a model.

        Args:
            model: The policy.
            last: Whether gradients end here: :meth:`backward` then does not compute the gradient by ``hidden``.

        Raises:
            ProjectionError: The output layer is not a plain linear layer.
        """
        module: Any = model.get_output_embeddings()
        if type(module) is not nn.Linear:
            raise ProjectionError(
                f"the output layer of {type(model).__name__} is a {type(module).__name__}; only a plain "
                "nn.Linear is supported. Exclude the output layer from an adapter's target modules"
            )
        self.module, self.last = module, last
        config: Any = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.piece = max(1, PIECE_BYTES // (4 * module.weight.shape[0]))

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log π of the targets and the entropy, float32, without a graph.

        Args:
            hidden: (tokens, d) outputs of the model's body at the positions that predict the targets.
            targets: (tokens,) ids.
            temperature: Sampling temperature of the distribution.
        """
        parts = [
            self._distribution(h, t, temperature)[:2]
            for h, t in zip(hidden.split(self.piece), targets.split(self.piece), strict=True)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def backward(
        self,
        hidden: Tensor,
        targets: Tensor,
        bounds: list[int],
        temperature: float,
        weigh: Weigh,
        deliver: Deliver,
    ) -> Tensor | None:
        """Differentiate Σ c_t log π(target_t) by ``hidden``, and deliver the gradient of the logits piece by piece.

        A piece holds complete prompts where they fit: their weights then follow from the piece itself. A longer
        prompt is evaluated twice, for its log-probabilities and for their gradient.

        Args:
            hidden: (tokens, d), without a graph.
            targets: (tokens,) ids.
            bounds: Start of each prompt's tokens, and the end of the last prompt's.
            temperature: Sampling temperature of the distribution.
            weigh: Called once for each prompt.
            deliver: Called for every piece; a long prompt has several.

        Returns:
            (tokens, d) gradient, or None if gradients end at the output layer.
        """
        gradients: list[Tensor | None] = []

        def differentiate(part: slice, prompts: range, weights: Callable[[Tensor, Tensor], Tensor]) -> None:
            gradients.append(
                self._piece(hidden[part], targets[part], temperature, weights, partial(deliver, prompts))
            )

        for prompts in self._pieces(bounds):
            begin, end = bounds[prompts.start], bounds[prompts.stop]
            if end - begin <= self.piece:
                differentiate(slice(begin, end), prompts, partial(weigh, prompts))
                continue
            weights = weigh(prompts, *self.logprobs(hidden[begin:end], targets[begin:end], temperature))
            for start in range(begin, end, self.piece):
                part = slice(start, min(start + self.piece, end))
                part_weights = weights[start - begin : part.stop - begin]
                differentiate(part, prompts, lambda *_, part_weights=part_weights: part_weights)
        pieces = [piece for piece in gradients if piece is not None]
        return torch.cat(pieces) if pieces else None

    def project(
        self,
        hidden: Tensor,
        targets: Tensor,
        bounds: list[int],
        temperature: float,
        weights: Tensor,
        deliver: Deliver,
    ) -> None:
        """Deliver the gradient of the logits for weights that are known; the arguments are those of :meth:`backward`.

        Args:
            hidden: (tokens, d), without a graph.
            targets: (tokens,) ids.
            bounds: Start of each prompt's tokens, and the end of the last prompt's.
            temperature: Sampling temperature of the distribution.
            weights: (tokens,) weights c.
            deliver: Called for every piece; a long prompt has several.
        """
        for prompts in self._pieces(bounds):
            for start in range(bounds[prompts.start], bounds[prompts.stop], self.piece):
                part = slice(start, min(start + self.piece, bounds[prompts.stop]))
                self._piece(
                    hidden[part],
                    targets[part],
                    temperature,
                    lambda *_, part=part: weights[part],
                    partial(deliver, prompts),
                )

    def _pieces(self, bounds: list[int]) -> list[range]:
        """Cut the prompts into runs that fit a piece; a prompt longer than a piece forms its own run."""
        runs, start = [], 0
        for p in range(1, len(bounds)):
            if p == len(bounds) - 1 or bounds[p + 1] - bounds[start] > self.piece:
                runs.append(range(start, p))
                start = p
        return runs

    def _piece(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        weigh: Callable[[Tensor, Tensor], Tensor],
        deliver: Callable[[Tensor, Tensor], None],
    ) -> Tensor | None:
        """Differentiate one piece by its ``hidden``, and deliver the gradient of its logits."""
        chosen, entropy, probabilities, slope = self._distribution(hidden, targets, temperature)
        weights = weigh(chosen, entropy).to(chosen) / temperature
        gradient = probabilities.mul_(-weights[:, None])
        gradient[torch.arange(len(targets), device=targets.device), targets] += weights
        if slope is not None:
            gradient.mul_(slope)
        deliver(gradient, hidden)
        if self.last:
            return None
        weight = self.module.weight
        return gradient.to(weight.dtype) @ weight

    def _distribution(
        self, hidden: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return log π of the targets, entropies, probabilities, and the slope of the soft cap."""
        with torch.no_grad():
            logits, slope = self.module(hidden).float(), None
            if self.softcap is not None:
                capped = torch.tanh(logits / self.softcap)
                logits, slope = capped * self.softcap, 1 - capped.square()
            logits.div_(temperature)
            logprobs = logits.log_softmax(-1)  # one pass of a fused kernel; logsumexp needs four
            normalizer = logits[:, 0] - logprobs[:, 0]
            chosen = logprobs.gather(1, targets[:, None])[:, 0]
            probabilities = logprobs.exp_()
            # einsum avoids a third tensor of this size; 0 · −inf does not occur in float32 logits.
            entropy = normalizer - torch.einsum("tv,tv->t", probabilities, logits)
        return chosen, entropy, probabilities, slope
