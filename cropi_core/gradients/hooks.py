"""Hooks that compute the sketches of a layer's parameters from its input and the gradient of its output.

One class for each way that a parameter enters a layer: :class:`LinearHook`, :class:`EmbeddingHook`,
:class:`AffineHook`. All have two methods, each called once per pass by
:class:`cropi_core.gradients.engine.FeatureEngine`, or by :class:`cropi_core.gradients.training_pass.TrainingPass`
in the passes of a trainer:

* ``keep(source)`` in the forward pass: return the part of the layer's input that the sketches need.
* ``add(kept, gradient, current)`` in the backward pass: add the layer's contribution to the accumulators.

A hook holds no state of a pass. The gradient of a weight matrix is never formed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cropi_core.errors import ProjectionError
from cropi_core.gradients.norms import Affine
from cropi_core.gradients.packing import Pack
from cropi_core.gradients.projection import ParameterSketch


@dataclass(frozen=True)
class Spans:
    """The tokens of a trainer's padded micro-batch, without the padding and ordered by prompt.

    Attributes:
        ids: (N,) token ids.
        bounds: Start of each prompt's tokens, and the end of the last prompt's; P + 1.
        target_bounds: Start of each prompt's completion tokens, and the end; P + 1.
    """

    ids: Tensor
    bounds: list[int]
    target_bounds: list[int]


@dataclass
class Pass:
    """State of one forward and backward pass.

    Attributes:
        pack: The completions, or the spans of a trainer's.
        out: (prompts, width) accumulators.
        indicator: (prompts, N) float32, 1 where a token belongs to the prompt.
        reached: Names of the parameters that have contributed.
        recorded: Whether the forward pass is over.
        head_block: Sum of the output layer's gradient over the pieces of a long prompt so far, before the sketch; None
            between prompts.
        head_tokens: Number of tokens in ``head_block``.
    """

    pack: Pack | Spans
    out: Tensor
    indicator: Tensor
    reached: set[str] = field(default_factory=set)
    recorded: bool = False
    head_block: Tensor | None = None
    head_tokens: int = 0


class LinearHook:
    """Sketch a linear layer: y = x Wᵀ + b, or y = x W + b for a Conv1D."""

    def __init__(
        self, module: nn.Linear | Conv1D, weight: ParameterSketch | None, bias: ParameterSketch | None
    ) -> None:
        """Take the layer and the sketches of its weight and bias; None for one that does not train."""
        self.weight, self.bias = weight, bias
        self.transposed = isinstance(module, Conv1D)  # stores its weight as (in, out), nn.Linear as (out, in)

    def keep(self, source: Tensor) -> Tensor | None:
        """Project the input onto the side of the weight that it multiplies."""
        if self.weight is None:
            return None
        source = source.reshape(-1, source.shape[-1])
        return self.weight.reduce_left(source) if self.transposed else self.weight.reduce_right(source)

    def add(self, kept: Tensor | None, gradient: Tensor, current: Pass) -> None:
        """Add the outer products of output gradients and inputs, and the sum of the gradients for the bias."""
        if self.weight is not None and kept is not None:
            if self.transposed:
                left, right = kept, self.weight.reduce_right(gradient)
            else:
                left, right = self.weight.reduce_left(gradient), kept
            self.weight.add_outer(left, right, current.pack.bounds, current.out)
        if self.bias is not None:
            self.bias.add_vector(current.indicator @ gradient.float(), current.out)


class EmbeddingHook:
    """Sketch an embedding: the gradient of a token's row is that of its output, times the embedding's scale."""

    def __init__(self, module: nn.Embedding, weight: ParameterSketch) -> None:
        """Measure the embedding's scale.

        Raises:
            ProjectionError: The embedding does more than scale its rows.
        """
        self.weight = weight
        self.scale = embedding_scale(module)
        self.padding = module.padding_idx

    def keep(self, source: Tensor) -> Tensor:
        """Return the token ids, flat."""
        return source.reshape(-1)

    def add(self, kept: Tensor, gradient: Tensor, current: Pass) -> None:
        """Add each token's gradient to the row of its id."""
        if self.padding is not None:
            # Torch gives the padding row no gradient, and the trainer trains with torch.
            gradient = gradient.masked_fill(kept.eq(self.padding)[:, None], 0.0)
        self.weight.add_rows(kept, gradient * self.scale, current.pack.bounds, current.out)


class AffineHook:
    """Sketch a module that is elementwise affine in its vectors, such as a norm."""

    def __init__(self, module: nn.Module, affine: Affine, sketches: dict[str, ParameterSketch]) -> None:
        """Take the module, the description of its vectors, and the sketch of each vector by attribute name."""
        self.module, self.affine, self.sketches = module, affine, sketches

    def keep(self, source: Tensor) -> Tensor:
        """Return the input: the slope of the output by a vector depends on all of it."""
        return source

    def add(self, kept: Tensor, gradient: Tensor, current: Pass) -> None:
        """Add output gradient times slope, summed over each prompt's tokens, for every vector."""
        for key in self.affine.keys:
            slope = self.affine.slope(self.module, key, kept)
            product = gradient.float().view(slope.shape) * slope.float()
            tokens = sum_heads(product, kept, len(current.pack.ids))
            self.sketches[key].add_vector(current.indicator @ tokens, current.out)


Hook = LinearHook | EmbeddingHook | AffineHook


class HeadHook:
    """Sketch the output layer from the gradient of its logits, which comes in pieces."""

    def __init__(self, weight: ParameterSketch | None, bias: ParameterSketch | None) -> None:
        """Take the sketches of weight and bias; None for one that does not train."""
        self.weight, self.bias = weight, bias

    @classmethod
    def make(
        cls, module: nn.Linear, names: Mapping[int, str], sketches: Mapping[str, ParameterSketch]
    ) -> "HeadHook":
        """Find the sketches of an output layer; the arguments are those of :func:`module_hook`."""
        found = [names.get(id(parameter)) for parameter in (module.weight, module.bias)]
        weight, bias = (None if name is None else sketches[name] for name in found)
        return cls(weight, bias)

    def add(self, current: Pass, prompts: range, gradient: Tensor, source: Tensor) -> None:
        """Add the contribution of a piece of prompts.

        Args:
            current: The pass.
            prompts: Consecutive prompts, or one whose tokens are cut into several pieces.
            gradient: (tokens, vocabulary) gradient of the logits.
            source: (tokens, d) inputs of the output layer.
        """
        out, begin = current.out[prompts.start : prompts.stop], current.pack.target_bounds[prompts.start]
        bounds = [b - begin for b in current.pack.target_bounds[prompts.start : prompts.stop + 1]]
        total = bounds[-1]
        if total != len(source):  # a piece of one long prompt
            bounds = [0, len(source)]
        if self.weight is not None:
            left, right = self.weight.reduce_left(gradient), self.weight.reduce_right(source)
            if total == len(source):
                self.weight.add_outer(left, right, bounds, out)
            else:
                self._add_piece(current, left.float().T @ right.float(), len(source), total, out[0])
            current.reached.add(self.weight.name)
        if self.bias is not None:
            self.bias.add_vector(torch.stack([gradient[a:b].sum(0) for a, b in pairwise(bounds)]), out)
            current.reached.add(self.bias.name)

    def _add_piece(self, current: Pass, block: Tensor, tokens: int, total: int, out: Tensor) -> None:
        """Sum the pieces of a long prompt, and sketch the sum once: its adds are scattered, those of a sum are not."""
        assert self.weight is not None
        current.head_tokens += tokens
        current.head_block = block if current.head_block is None else current.head_block.add_(block)
        if current.head_tokens == total:
            self.weight.add_block(current.head_block, out)
            current.head_block, current.head_tokens = None, 0


def module_hook(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    names: Mapping[int, str],
    sketches: Mapping[str, ParameterSketch],
) -> Hook:
    """Choose the hook for a module with parameters that train.

    Args:
        module: The module.
        parameters: Its own parameters that train, by attribute.
        names: Name of each parameter that trains, by the parameter's ``id``.
        sketches: Sketch of each of them, by name.

    Raises:
        ProjectionError: No hook supports the module.
    """
    own = {key: sketches[names[id(p)]] for key, p in parameters.items()}
    if isinstance(module, nn.Embedding) and "weight" in own:
        return EmbeddingHook(module, own["weight"])
    if isinstance(module, nn.Linear | Conv1D):
        return LinearHook(module, own.get("weight"), own.get("bias"))
    if affine := Affine.from_module(module, parameters):
        return AffineHook(module, affine, own)
    shapes = ", ".join(f"{names[id(p)]} {tuple(p.shape)}" for p in parameters.values())
    raise ProjectionError(
        f"a module of type {type(module).__name__} with the parameters {shapes} is not supported; linear layers, "
        "embeddings, Conv1D and elementwise affine norms are. Freeze its parameters to exclude them"
    )


@torch.no_grad()
def uncovered(names: Sequence[str]) -> ProjectionError:
    """Return the error for parameters that train and that no hook covers."""
    return ProjectionError(
        f"no hook covers the parameters {', '.join(names)}, so their gradient would be missing. "
        "Freeze them to exclude them"
    )


def embedding_scale(module: nn.Embedding) -> float:
    """Return the factor an embedding multiplies its rows by: 1, or √d in Gemma.

    Raises:
        ProjectionError: The output is not a multiple of the rows.
    """
    weight = module.weight
    ids = torch.arange(min(4, len(weight)), device=weight.device)
    rows, out = weight[ids].float(), module(ids).float()
    scale = float((rows * out).sum() / rows.square().sum().clamp(min=1e-30))
    if not torch.allclose(out, scale * rows, rtol=2e-2, atol=1e-6):
        raise ProjectionError(
            f"{type(module).__name__} is not supported: its output is not its rows times one factor. "
            "Exclude the embedding from the parameters that train"
        )
    return scale


def sum_heads(product: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Sum a per-head norm's contributions over the heads of each token: (tokens, m).

    Some models normalise (1, tokens, heads, m), others (1, heads, tokens, m), a transposed view of the former.
    """
    if product.dim() == 4:
        first = product.shape[1] == tokens and (product.shape[2] != tokens or source.is_contiguous())
        product = product.sum(2 if first else 1)
    return product.reshape(tokens, product.shape[-1])
