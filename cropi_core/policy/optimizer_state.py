"""Adam's state at the end of a stage, from which the next one continues (``training.optimizer_state: carried``).

Adam's first steps move every coordinate by the learning rate, whatever its gradient, until its moments have adapted. A
curriculum that restarts Adam pays for that in every stage; docs/background/evidence.md has the figures.

The state is stored in float32, eight bytes a parameter, so that a continued stage does what one without a break does.
It is next to the second moments, in a directory that no program reads as weights.
"""

import contextlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from cropi_core.errors import PolicyError, foreign_errors

STATE = Path("optimizer") / "state.safetensors"
"""Path of the state in a checkpoint directory."""

PARTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Write the state of every parameter that was trained into a checkpoint directory.

    Args:
        model: The model that was trained.
        optimizer: AdamW after at least one step.
        checkpoint: Directory of the trained policy.
    """
    state = {
        f"{part}/{name}": optimizer.state[parameter][part].float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
        for part in PARTS
    }
    path = checkpoint / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def restore_state(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> int:
    """Restore the state that a policy was saved with into an optimizer that has taken no step.

    Args:
        model: The model, on its device.
        optimizer: AdamW over its parameters.
        checkpoint: Directory of the policy that the stage starts from.

    Returns:
        The optimizer steps in the state; 0 if the policy has no state, as a base policy, and nothing is changed.

    Raises:
        PolicyError: The state cannot be read, or belongs to other parameters.
    """
    path = checkpoint / STATE
    if not path.is_file():
        return 0
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    steps = 0
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(safe_open(path, framework="pt"))
            keys = set(file.keys())
        for name, parameter in model.named_parameters():
            if id(parameter) not in trained:
                continue
            moments = {part: _part(file, keys, f"{part}/{name}", path) for part in PARTS}
            for part in ("exp_avg", "exp_avg_sq"):
                _check_shape(moments[part], parameter, f"{part}/{name}", path)
                moments[part] = moments[part].to(parameter.device, parameter.dtype)
            optimizer.state[parameter] = moments
            steps = max(steps, int(moments["step"]))
    return steps


def _readable(path: Path) -> contextlib.AbstractContextManager[None]:
    remedy = "Train the stage again, or set training.optimizer_state=fresh"
    return foreign_errors(f"{path} is not a safetensors file", PolicyError, remedy)


def _part(file: safe_open, keys: set[str], key: str, path: Path) -> Tensor:
    if key not in keys:
        raise PolicyError(
            f"{path} has no {key}: it was saved by a stage that trained other parameters; train that stage again, or "
            "set training.optimizer_state=fresh"
        )
    with _readable(path):
        return file.get_tensor(key)


def _check_shape(value: Tensor, parameter: nn.Parameter, key: str, path: Path) -> None:
    if value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
        raise PolicyError(
            f"{path}: {key} has shape {tuple(value.shape)} and the parameter {tuple(parameter.shape)}, or not all "
            "values are finite; train that stage again, or set training.optimizer_state=fresh"
        )
