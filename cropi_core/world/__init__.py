"""The embedded world: a small policy and generated tasks, so that all runs anywhere without a download.

families.py     generators of tasks, and the prompt tables built from them
tokenizer.py    the character tokenizer
train_base.py   the script that trained the checkpoint in base/
base/           the checkpoint: Llama architecture, 0.9 M parameters, safetensors
"""

from pathlib import Path

from cropi_core.errors import PolicyError
from cropi_core.world.families import FAMILIES, build

__all__ = ["FAMILIES", "base_checkpoint", "build"]


def base_checkpoint() -> Path:
    """Return the directory of the embedded base, in the form that ``from_pretrained`` takes.

    Raises:
        PolicyError: The installation lacks the checkpoint.
    """
    path = Path(__file__).parent / "base"
    if not (path / "model.safetensors").is_file():
        raise PolicyError(
            f"the embedded base is missing from {path}; reinstall cropi, or train it again with "
            f"`python -m cropi_core.world.train_base --out {path}`"
        )
    return path
