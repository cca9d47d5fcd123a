"""Derivatives of modules that are elementwise affine in their vectors, such as norms.

The derivative of the output by a parameter is the output at parameter 1 minus the output at parameter 0. The module
itself is evaluated, so its architecture need not be known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Affine:
    """Describe how the vectors of a module enter its output.

    Attributes:
        keys: Attribute names of the vectors that train.
        through_zero: The vectors whose output is 0 at 0, for which one evaluation is enough.
    """

    keys: tuple[str, ...]
    through_zero: frozenset[str]

    @classmethod
    @torch.no_grad()
    def from_module(cls, module: nn.Module, parameters: dict[str, nn.Parameter]) -> "Affine | None":
        """Test on random input whether each parameter enters elementwise and affinely; None if one does not."""
        first = next(iter(parameters.values()))
        if any(p.dim() != 1 or p.shape != first.shape for p in parameters.values()):
            return None
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(first.device)

        # In float32 for every type of weights: the rounding of bfloat16 exceeds the tolerance of the test.
        values: dict[str, Tensor] = {key: p.float() for key, p in module.named_parameters(recurse=False)}
        source, zero = draw(1, 6, len(first)), set()
        for key in parameters:

            def at(value: Tensor, key: str = key) -> Tensor:
                return functional_call(module, values | {key: value}, (source,))

            try:
                at_zero = at(torch.zeros_like(values[key]))
                slope = at(torch.ones_like(values[key])) - at_zero
                change = draw(len(first))
                moved = at(values[key] + change) - at(values[key])
            except (TypeError, RuntimeError):
                return None
            if moved.shape != source.shape or not torch.allclose(moved, slope * change, rtol=1e-3, atol=1e-3):
                return None
            if not at_zero.any():
                zero.add(key)
        return cls(tuple(parameters), frozenset(zero))

    def slope(self, module: nn.Module, key: str, source: Tensor) -> Tensor:
        """Return ∂output/∂parameter at ``source``, in the shape of the output."""
        at_one = _evaluate(module, key, source, 1.0)
        return at_one if key in self.through_zero else at_one - _evaluate(module, key, source, 0.0)


def _evaluate(module: nn.Module, key: str, source: Tensor, value: float) -> Tensor:
    """Evaluate a module with every entry of one parameter set to ``value``."""
    values: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    return functional_call(module, values | {key: torch.full_like(values[key], value)}, (source,))
