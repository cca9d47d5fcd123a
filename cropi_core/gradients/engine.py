"""The feature engine: projected per-prompt gradients of a weighted log-likelihood from one forward and backward pass.

Hooks (:mod:`cropi_core.gradients.hooks`) take each layer's input and the gradient of its output. No parameter
requires grad, so the backward pass computes gradients of activations only, and a hook keeps only the part of an input
that the sketch needs. Several prompts share a pass without padding (:mod:`cropi_core.gradients.packing`). The tokens of
one prompt are summed in the sketch, so a feature does not depend on the other prompts of its pass.

Every parameter that trains must have a hook. Supported are linear layers, embeddings, tied heads (both contributions),
Conv1D of GPT-2, low-rank adapters, and modules that are elementwise affine in their vectors (norms); any other module
with a parameter that trains is an error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cropi_core.errors import ProjectionError
from cropi_core.gradients.attention import NAME, attending
from cropi_core.gradients.hooks import HeadHook, Hook, Pass, module_hook, uncovered
from cropi_core.gradients.layers import parameter_names
from cropi_core.gradients.lm_head import Head, Weigh
from cropi_core.gradients.packing import Pack
from cropi_core.gradients.projection import build_sketches, dimension, fold, width
from cropi_core.gradients.recompute import recomputing
from data_schemas import Layers, Projection


class FeatureEngine:
    """Compute projected gradients of one model; its parameters are frozen, and hooks stay on it until :meth:`close`."""

    def __init__(
        self,
        model: PreTrainedModel,
        projection: Projection,
        metric: Mapping[str, Tensor] | None = None,
        layers: Layers = "all",
    ) -> None:
        """Plan the sketches and attach the hooks.

        Args:
            model: A causal language model in evaluation mode, with or without PEFT adapters.
            projection: Kind, size and seed of the projection.
            metric: See :func:`cropi_core.gradients.projection.build_sketches`; it requires that a layer's whole
                gradient is formed.
            layers: See :func:`cropi_core.gradients.layers.parameter_names`; with ``head`` there is no backward pass.

        Raises:
            ProjectionError: A parameter that trains belongs to a module that no hook supports.
        """
        base: Any = getattr(model, "get_base_model", None)
        self.model: PreTrainedModel = base() if base else model  # PEFT wraps the model that runs
        self.projection = projection
        self.layers: Layers = layers
        chosen = parameter_names(self.model, layers)
        trained = {name: p for name, p in self.model.named_parameters() if name in chosen}
        self.left_out = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        if metric is not None and layers != "all":
            metric = {name: values for name, values in metric.items() if name in chosen}
        self.sketches = build_sketches(shapes, projection, self.model.device, metric)
        self.k = dimension(self.sketches, projection)
        self._names = {id(p): name for name, p in trained.items()}
        self._pass: Pass | None = None
        self._handles: list[Any] = []
        self.head = Head(self.model, last=layers == "head")
        self._head_hook = HeadHook.make(self.head.module, self._names, self.sketches)
        self.model.set_attn_implementation(NAME)
        # Hooks need the gradient of a module's output even if nothing before it trains; see _start_graph().
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        covered = {name for module in self.model.modules() for name in self._attach(module)}
        if missing := sorted(set(trained) - covered):
            self.close()
            raise uncovered(missing)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- passes --------------------------------------------------------------------------------------------------

    def logprobs(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log π_θ of the completion tokens and the policy's entropies in nats, both (M,), without gradients."""
        with torch.no_grad(), attending(pack):
            hidden = self._body(pack)
            return self.head.logprobs(hidden[pack.predict], pack.targets, temperature)

    def project(
        self, pack: Pack, temperature: float, weigh: Weigh, out: Tensor, *, recompute: bool = False
    ) -> None:
        """Add each prompt's sketch of Σ c_it ∇ log π_θ to the accumulators.

        Args:
            pack: The completions.
            temperature: Sampling temperature of the distribution.
            weigh: Called once for each prompt; see :data:`cropi_core.gradients.lm_head.Weigh`.
            out: (prompts, width) float32 accumulators; see :meth:`accumulators`.
            recompute: Do not keep activations; see :func:`cropi_core.gradients.recompute.recomputing`. The result is
                the same.

        Raises:
            ProjectionError: A parameter got no gradient: its module was not called, or is detached from the loss.
        """
        prompts, lengths = len(pack.bounds) - 1, torch.tensor(pack.bounds).diff()
        owner = torch.arange(prompts).repeat_interleave(lengths).to(out.device)
        indicator = (owner[None] == torch.arange(prompts, device=out.device)[:, None]).float()
        self._pass = Pass(pack, out, indicator)
        memory = recomputing(self.model.get_decoder()) if recompute else nullcontext()
        try:
            with (
                torch.set_grad_enabled(self.layers != "head"),
                attending(pack),
                memory,
                _tf32_for(self.model),
            ):
                hidden = self._body(pack)
                self._pass.recorded = True
                head_gradient = self.head.backward(
                    hidden.detach()[pack.predict],
                    pack.targets,
                    pack.target_bounds,
                    temperature,
                    weigh,
                    partial(self._head_hook.add, self._pass),
                )
                if head_gradient is not None:
                    hidden_gradient = torch.zeros_like(hidden)
                    hidden_gradient.index_add_(0, pack.predict, head_gradient)
                    hidden.backward(hidden_gradient)
            unreached = sorted(set(self.sketches) - self._pass.reached)
        finally:
            self._pass = None
        if unreached:
            raise ProjectionError(
                f"the parameters {', '.join(unreached[:5])} got no gradient: their modules are used without "
                "their forward method or are detached from the loss. Freeze these parameters to exclude them"
            )

    def accumulators(self, prompts: int) -> Tensor:
        """Return zeroed accumulators (prompts, width)."""
        return torch.zeros(prompts, width(self.sketches, self.projection), device=self.model.device)

    def features(self, out: Tensor) -> Tensor:
        """Return features (prompts, k) from accumulators."""
        return fold(out, self.projection)

    def _body(self, pack: Pack) -> Tensor:
        """Run the model up to its last hidden state (N, d)."""
        body: Any = self.model.get_decoder()
        return body(
            input_ids=pack.ids[None], position_ids=pack.positions[None], use_cache=False
        ).last_hidden_state[0]

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _attach(self, module: nn.Module) -> list[str]:
        """Attach a hook for a module's own parameters; return the names of the parameters it covers."""
        parameters = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in self._names}
        names = [self._names[id(p)] for p in parameters.values()]
        if isinstance(module, nn.Embedding) and self.layers != "all":
            return []  # the input embedding is not among the layers, also where the output layer shares its matrix
        if not parameters:
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_hook(_start_graph))
            return []
        if module is self.head.module:
            return names  # its forward is never called: _head_hook adds its gradient
        hook = module_hook(module, parameters, self._names, self.sketches)

        def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # With recomputation, a backward pass calls a layer again; the hook is on the first output.
            if self._pass is None or self._pass.recorded or not torch.is_grad_enabled():
                return output
            kept = hook.keep(inputs[0].detach())
            output = _start_graph(module, inputs, output)
            output.register_hook(lambda gradient: self._add(hook, names, kept, gradient))
            return output

        self._handles.append(module.register_forward_hook(forward_hook))
        return names

    def _add(self, hook: Hook, names: list[str], kept: Any, gradient: Tensor) -> None:
        """Add a module's contribution once the backward pass has the gradient of its output."""
        assert self._pass is not None
        with torch.no_grad():
            # Most modules output (1, N, m); some flatten it first.
            hook.add(kept, gradient.reshape(-1, gradient.shape[-1]), self._pass)
        self._pass.reached.update(names)


@contextmanager
def _tf32_for(model: PreTrainedModel) -> Iterator[None]:
    """Let the sketches of a 16-bit policy use TF32 on the GPU: its error is far below that of 16-bit activations.

    Figures: docs/background/precision.md.
    """
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    switch.allow_tf32 = before or (model.device.type != "cpu" and model.dtype != torch.float32)
    try:
        yield
    finally:
        switch.allow_tf32 = before


def _start_graph(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Start the graph at a module's output when nothing before it requires grad."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output
