"""The feature engine: projected per-prompt gradients of a weighted log-likelihood from one forward and one backward.

Hooks take each layer's input and the gradient of its output; weights' gradients are never formed as such and no
parameter requires grad, so the backward pass goes to activations only. Several prompts share a pass: rows of one
prompt are summed in the sketch, so a feature does not depend on its neighbours.

Every parameter that trains must be seen by a hook: linear layers, embeddings, tied heads (both contributions),
Conv1D of GPT-2, and modules that are elementwise affine in their vectors (norms). Anything else is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cropi_core.errors import ProjectionError
from cropi_core.projection import ParameterSketch, build_sketches, dimension, fold, width
from data_schemas.config import Projection


@dataclass(frozen=True)
class Batch:
    """Completions of several prompts, the same number each, prompt by prompt.

    Attributes:
        ids: (rows, P + T) token ids: prompts padded on the left, completions on the right.
        mask: (rows, P + T) bool, true on real tokens.
        completion: (rows, T) bool, true on completion tokens.
        prompts: Number of prompts; rows / prompts completions each.
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor
    prompts: int


@dataclass
class _Pass:
    """State of the pass under way."""

    prompts: int
    out: Tensor
    seen: set[str] = field(default_factory=set)


class FeatureEngine:
    """Projected gradients of one model. The model's parameters are frozen and hooks stay on it until :meth:`close`."""

    def __init__(self, model: PreTrainedModel, projection: Projection) -> None:
        """Plan the sketches and place the hooks.

        Raises:
            ProjectionError: A parameter that trains lies in a module no hook understands.
        """
        self.model = model
        self.projection = projection
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.left_out = [name for name, p in model.named_parameters() if not p.requires_grad]
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self.sketches = build_sketches(shapes, projection, model.device)
        self.k = dimension(self.sketches, projection)
        self._names = {id(p): name for name, p in trained.items()}
        self._pass: _Pass | None = None
        self._handles: list[Any] = []
        # The backward pass below must reach a module's output even where nothing before it trains.
        for parameter in trained.values():
            parameter.requires_grad_(False)
        covered = {name for module in model.modules() for name in self._hook(module)}
        if unseen := sorted(set(trained) - covered):
            self.close()
            raise ProjectionError(
                f"no hook sees the parameters {', '.join(unseen)}; their gradient would be missing"
            )

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- passes --------------------------------------------------------------------------------------------------

    def logprobs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log π_θ of the completion tokens and the policy's entropy there, without gradients.

        Args:
            batch: The completions.
            temperature: Of the distribution.

        Returns:
            (rows, T) log-probabilities and (rows, T) entropies in nats; zero on padding.
        """
        with torch.no_grad():
            return self._token_logprobs(batch, temperature)

    def project(
        self, batch: Batch, temperature: float, weigh: Callable[[Tensor, Tensor], Tensor], out: Tensor
    ) -> None:
        """Add the sketches of Σ c_it ∇ log π_θ of every prompt.

        Args:
            batch: The completions.
            temperature: Of the distribution.
            weigh: Called once with (rows, T) log-probabilities and entropies; returns (rows, T) weights c.
            out: (prompts, width) float32 accumulators, see :meth:`accumulators`.

        Raises:
            ProjectionError: A planned parameter got no contribution: its module was not called, or is cut off.
        """
        self._pass = _Pass(batch.prompts, out)
        try:
            with torch.enable_grad():
                logprobs, entropy = self._token_logprobs(batch, temperature)
                weights = weigh(logprobs.detach(), entropy.detach())
                (logprobs * weights.to(logprobs)).sum().backward()
            silent = sorted(set(self.sketches) - self._pass.seen)
        finally:
            self._pass = None
        if silent:
            raise ProjectionError(
                f"the parameters {', '.join(silent[:5])} got no gradient: their modules are used past their forward "
                "method or cut off from the loss, so the engine cannot see them"
            )

    def accumulators(self, prompts: int) -> Tensor:
        """Return zeroed accumulators (prompts, width)."""
        return torch.zeros(prompts, width(self.sketches, self.projection), device=self.model.device)

    def features(self, out: Tensor) -> Tensor:
        """Return features (prompts, k) from accumulators."""
        return fold(out, self.projection)

    def _token_logprobs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        length = batch.completion.shape[1]
        positions = (batch.mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=positions,
            logits_to_keep=length + 1,
            use_cache=False,
        ).logits[:, :-1]
        log_probabilities = (logits.float() / temperature).log_softmax(-1)
        targets = batch.ids[:, -length:].unsqueeze(-1)
        chosen = log_probabilities.gather(-1, targets).squeeze(-1)
        with torch.no_grad():
            entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        # Padding is masked here, by length, and never by token id: the pad token may be a real one.
        return chosen.masked_fill(~batch.completion, 0.0), entropy.masked_fill(~batch.completion, 0.0)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _sketch(self, parameter: Tensor | None) -> ParameterSketch | None:
        name = self._names.get(id(parameter))
        return self.sketches[name] if name is not None else None

    def _hook(self, module: nn.Module) -> list[str]:
        """Place the hook for a module's own parameters; returns the names it covers."""
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in self._names}
        if not own:
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_hook(_start_graph))
            return []
        if isinstance(module, nn.Embedding):
            deliver = self._embedding
        elif isinstance(module, nn.Linear | Conv1D):
            deliver = self._linear
        elif all(p.dim() == 1 for p in own.values()) and _is_affine(module, own):
            deliver = self._affine
        else:
            shapes = {key: tuple(p.shape) for key, p in own.items()}
            raise ProjectionError(
                f"module of type {type(module).__name__} with parameters "
                f"{', '.join(f'{self._names[id(own[k])]} {s}' for k, s in shapes.items())} is not supported: "
                "linear layers, embeddings, Conv1D and elementwise affine norms are"
            )

        def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._pass is None or not torch.is_grad_enabled():
                return output
            source = inputs[0].detach()
            output = _start_graph(module, inputs, output)
            output.register_hook(lambda gradient: self._deliver(deliver, module, source, gradient))
            return output

        self._handles.append(module.register_forward_hook(forward_hook))
        return [self._names[id(p)] for p in own.values()]

    def _deliver(
        self, deliver: Callable[..., None], module: nn.Module, source: Tensor, gradient: Tensor
    ) -> None:
        assert self._pass is not None
        with torch.no_grad():
            deliver(module, self._grouped(source), self._grouped(gradient), self._pass.out)
        self._pass.seen |= {
            self._names[id(p)] for p in module.parameters(recurse=False) if id(p) in self._names
        }

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Reshape (rows, S, …) to (prompts, rows/prompts·S, …): a prompt's tokens in one row."""
        assert self._pass is not None
        return tensor.reshape(self._pass.prompts, -1, *tensor.shape[2:])

    def _linear(self, module: nn.Module, source: Tensor, gradient: Tensor, out: Tensor) -> None:
        weight, bias = self._sketch(module.weight), self._sketch(module.bias)  # type: ignore[arg-type]
        if weight is not None:
            # Conv1D keeps its weight as (in, out), nn.Linear as (out, in).
            pair = (source, gradient) if isinstance(module, Conv1D) else (gradient, source)
            weight.add_outer(*pair, out)
        if bias is not None:
            bias.add_vector(gradient.float().sum(1), out)

    def _embedding(self, module: nn.Embedding, source: Tensor, gradient: Tensor, out: Tensor) -> None:
        weight = self._sketch(module.weight)
        if weight is None:
            return
        if module.padding_idx is not None:
            # Torch gives that row no gradient, and the trainer trains with torch.
            gradient = gradient.masked_fill(source.eq(module.padding_idx).unsqueeze(-1), 0.0)
        weight.add_rows(source, gradient, out)

    def _affine(self, module: nn.Module, source: Tensor, gradient: Tensor, out: Tensor) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            sketch = self._sketch(parameter)
            if sketch is not None:
                slope = _slope(module, key, source)
                sketch.add_vector((gradient.float() * slope.float()).sum(1), out)


def _start_graph(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Let the graph begin at a module's output when nothing before it requires grad."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _slope(module: nn.Module, key: str, source: Tensor) -> Tensor:
    """Return ∂output/∂parameter of an elementwise affine module: its output at 1 minus its output at 0."""
    values: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    one, zero = torch.ones_like(values[key]), torch.zeros_like(values[key])
    at_one = functional_call(module, values | {key: one}, (source,))
    return at_one - functional_call(module, values | {key: zero}, (source,))


@torch.no_grad()
def _is_affine(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    """Try on random input whether each parameter enters elementwise and affinely."""
    size = next(iter(own.values())).shape[0]
    generator = torch.Generator().manual_seed(0)
    first = next(iter(own.values()))
    source = torch.randn(2, 3, size, generator=generator).to(first)
    for key, parameter in own.items():
        if parameter.shape[0] != size:
            return False
        try:
            slope = _slope(module, key, source)
            values: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            change = torch.randn(size, generator=generator).to(first)
            moved = functional_call(module, values | {key: parameter + change}, (source,))
            still = functional_call(module, values, (source,))
        except (TypeError, RuntimeError):
            return False
        if moved.shape != source.shape or not torch.allclose(
            moved - still, slope * change, rtol=1e-2, atol=1e-2
        ):
            return False
    return True
