"""Features of the prompts of a trainer's micro-batch, from the trainer's own forward and backward pass.

    collected = TrainingPass(model, Projection())
    collected.begin(ids, mask, places, completion_tokens=16)
    ...                                        # the trainer's forward pass
    collected.head(weights, logprobs, 1.0)     # once the gradient of the loss by the log-probabilities is known
    ...                                        # the rest of its backward pass
    places, features = collected.end()

The hooks, the projection and the layers are those of :class:`cropi_core.gradients.engine.FeatureEngine`; the model and
its gradients stay as they are. Rows are padded, and several rows may belong to one prompt, in any order. Padding, and
rows that are left out because their prompt has no gradient, cost nothing but the selection of the others.

A trainer that fuses the output layer with the loss never calls that layer. Its gradient follows from the inputs of the
layer and the gradient of the loss by the log-probabilities, in closed form and in pieces.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cropi_core.errors import ProjectionError
from cropi_core.gradients.hooks import (
    AffineHook,
    EmbeddingHook,
    HeadHook,
    Hook,
    Pass,
    Spans,
    module_hook,
    uncovered,
)
from cropi_core.gradients.layers import parameter_names
from cropi_core.gradients.lm_head import Head
from cropi_core.gradients.projection import build_sketches, dimension, fold, width
from data_schemas import Layers, Projection

NOTHING: tuple[int, Any, Any] = (0, None, None)
CHECKED_TOKENS = 64
TOLERANCE, TOLERANCE_HALF = 2e-3, 0.1
"""Largest mean difference of log-probabilities in nats, for a float32 output layer and for 16-bit inputs of it."""


class TrainingPass:
    """Collects features of one model while it is trained; the hooks stay on it until :meth:`close`."""

    def __init__(self, model: Any, projection: Projection, layers: Layers = "all") -> None:
        """Plan the sketches and attach the hooks.

        Args:
            model: A causal language model, with or without PEFT adapters.
            projection: Kind, size and seed of the projection.
            layers: See :func:`cropi_core.gradients.layers.parameter_names`.

        Raises:
            ProjectionError: A parameter that trains belongs to a module that no hook supports.
        """
        base: Any = getattr(model, "get_base_model", None)
        self.model: PreTrainedModel = base() if base else model
        self.projection = projection
        self.layers: Layers = layers
        chosen = parameter_names(self.model, layers)
        trained = {name: p for name, p in self.model.named_parameters() if name in chosen}
        self.left_out = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self.sketches = build_sketches(shapes, projection, self.model.device)
        self.k = dimension(self.sketches, projection)
        self._names = {id(p): name for name, p in trained.items()}
        self._head = Head(self.model, last=True)
        self._head_hook = HeadHook.make(self._head.module, self._names, self.sketches)
        self._checked = False
        self._pass: Pass | None = None
        self._seen: set[int] = set()
        self._gathered: tuple[int, Any, Any] = NOTHING
        self._hidden: Tensor | None = None
        decoder: Any = self.model.get_decoder()
        self._handles: list[Any] = [decoder.register_forward_hook(self._keep_hidden)]
        covered = {name for module in self.model.modules() for name in self._attach(module)}
        if missing := sorted(set(trained) - covered):
            self.close()
            raise uncovered(missing)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, ids: Tensor, mask: Tensor, places: Tensor, completion_tokens: int) -> None:
        """Begin the pass of a micro-batch.

        Args:
            ids: (B, T) tokens: prompts padded on the left, completions on the right.
            mask: (B, T) bool, false on padding.
            places: (B,) number of each row's prompt; -1 leaves the row out.
            completion_tokens: Number of columns that are completions, the last ones.
        """
        self._pass, self._hidden, self._gathered = None, None, NOTHING
        self._seen.clear()
        if not (places >= 0).any():
            return
        order = places.argsort(stable=True)
        order = order[places[order] >= 0]
        self._prompts, owners = places[order].unique(return_inverse=True)
        real, size = mask.bool()[order], ids.shape[1]
        row, column = real.nonzero(as_tuple=True)
        self._shape = tuple(ids.shape)
        self._index = order[row] * size + column
        scored = column >= size - completion_tokens
        self._predict = self._index[scored] - 1
        self._scored = order[row[scored]], column[scored] - (size - completion_tokens)
        flat = ids.reshape(-1)[self._index]
        self._targets = flat[scored]
        count, owner = len(self._prompts), owners[row]
        out = torch.zeros(count, width(self.sketches, self.projection), device=ids.device)
        spans = Spans(flat, _bounds(owner, count), _bounds(owner[scored], count))
        indicator = (owner[None] == torch.arange(count, device=ids.device)[:, None]).float()
        self._pass = Pass(spans, out, indicator)

    @torch.no_grad()
    def head(self, weights: Tensor, logprobs: Tensor, temperature: float) -> None:
        """Add the output layer's contribution.

        Args:
            weights: (B, C) gradient of the loss by the log-probabilities of the completion tokens.
            logprobs: (B, C) these log-probabilities, as the trainer computed them.
            temperature: The logits are divided by it.

        Raises:
            ProjectionError: The output layer does not give the trainer's log-probabilities.
        """
        if self._pass is None:
            return
        if self._hidden is None:
            raise ProjectionError(
                f"the trainer did not call {type(self.model.get_decoder()).__name__}, so the inputs of the output "
                "layer are unknown. Features from training are not supported for this model"
            )
        weight = self._head.module.weight
        hidden = self._hidden.reshape(-1, self._hidden.shape[-1])[self._predict].to(weight.dtype)
        if not self._checked:
            half = self._hidden.dtype != torch.float32
            self._check(hidden, logprobs[self._scored], temperature, TOLERANCE_HALF if half else TOLERANCE)
        self._head.project(
            hidden,
            self._targets,
            self._pass.pack.target_bounds,
            temperature,
            weights[self._scored],
            lambda *piece: self._head_hook.add(self._required(), *piece),
        )

    def end(self) -> tuple[Tensor, Tensor]:
        """End the pass.

        Returns:
            Numbers of the prompts (P,), and the projected gradient of the loss for each (P, k).

        Raises:
            ProjectionError: A parameter got no gradient.
        """
        current, self._pass, self._hidden, self._gathered = self._pass, None, None, NOTHING
        if current is None:
            return torch.empty(0, dtype=torch.long), torch.empty(0, self.k)
        if unreached := sorted(set(self.sketches) - current.reached):
            raise ProjectionError(
                f"the parameters {', '.join(unreached[:5])} got no gradient in a training pass: their modules are "
                "used without their forward method. Freeze these parameters to exclude them"
            )
        return self._prompts, fold(current.out, self.projection)

    def _check(self, hidden: Tensor, logprobs: Tensor, temperature: float, limit: float) -> None:
        """Compare log-probabilities of some tokens with the trainer's, once."""
        few = slice(0, CHECKED_TOKENS)
        computed, _ = self._head.logprobs(hidden[few], self._targets[few], temperature)
        difference = float((computed - logprobs[few].float()).abs().mean())
        if not difference <= limit:
            raise ProjectionError(
                f"the output layer of {type(self.model).__name__} gives log-probabilities that differ from the "
                f"trainer's by {difference:.3g} nats on average, more than {limit}: its logits are transformed in an "
                "unsupported way. Train without features"
            )
        self._checked = True

    def _required(self) -> Pass:
        assert self._pass is not None
        return self._pass

    def _keep_hidden(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._pass is not None and torch.is_grad_enabled() and self._hidden is None:
            self._hidden = output.last_hidden_state.detach()

    def _attach(self, module: nn.Module) -> list[str]:
        """Attach a hook for a module's own parameters; return the names of the parameters it covers."""
        parameters = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in self._names}
        names = [self._names[id(p)] for p in parameters.values()]
        if not parameters or (isinstance(module, nn.Embedding) and self.layers != "all"):
            return []
        if module is self._head.module:
            return names
        hook = module_hook(module, parameters, self._names, self.sketches)

        def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A layer that is recomputed is called again, and the hook is on the output that is in the graph: the
            # first one, unless that call made no graph.
            skipped = self._pass is None or not torch.is_grad_enabled() or id(module) in self._seen
            if skipped or not output.requires_grad:
                return
            self._seen.add(id(module))
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                kept = self._kept(hook, inputs[0].detach())
            output.register_hook(lambda gradient: self._add(hook, names, kept, gradient))

        self._handles.append(module.register_forward_hook(forward_hook))
        return names

    def _kept(self, hook: Hook, source: Tensor) -> Any:
        """Keep the part of a layer's input that its sketches need; a norm's is a reference until the backward pass."""
        if isinstance(hook, AffineHook):
            return source
        if isinstance(hook, EmbeddingHook):
            if tuple(source.shape) != self._shape:  # learned positions: one row of them is added to all rows
                raise ProjectionError(
                    f"an embedding of {type(self.model).__name__} gets input of shape {tuple(source.shape)} for all "
                    f"rows of a micro-batch of shape {self._shape}, so its gradient is not that of single prompts. "
                    "Train without features, or with features of other layers"
                )
            return hook.keep(source.reshape(-1)[self._index])
        pointer, last, _ = self._gathered
        if (
            source.data_ptr() != pointer or source.shape != last.shape
        ):  # queries, keys and values have one input
            self._gathered = source.data_ptr(), source, self._rows(source)
        return hook.keep(self._gathered[2])

    @torch.no_grad()
    def _add(self, hook: Hook, names: list[str], kept: Any, gradient: Tensor) -> None:
        """Add a module's contribution once the backward pass has the gradient of its output."""
        current = self._required()
        gradient = self._rows(gradient)
        source = self._rows(kept)[None] if isinstance(hook, AffineHook) else kept
        hook.add(source, gradient.reshape(-1, gradient.shape[-1]), current)
        current.reached.update(names)

    def _rows(self, x: Tensor) -> Tensor:
        """Gather the tokens of the pass, ordered by prompt: (N, m), or (N, heads, m)."""
        rows, size = self._shape
        if x.dim() == 4 and not (x.shape[1] == size and (x.shape[2] != size or x.is_contiguous())):
            x = x.transpose(1, 2)  # (B, heads, T, m), as some norms of heads see it
        flat = x if x.dim() == 2 else x.reshape(rows * size, *x.shape[2:])
        return flat[self._index]


def _bounds(owner: Tensor, count: int) -> list[int]:
    """Return the start of each prompt's tokens, which are ordered by prompt, and the end."""
    return [0, *accumulate(torch.bincount(owner, minlength=count).tolist())]
