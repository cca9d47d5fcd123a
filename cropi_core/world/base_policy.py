"""The embedded base policies, checkpoints that are part of the package."""

from pathlib import Path

from cropi_core.errors import PolicyError


def base_checkpoint() -> Path:
    """Return the directory of the embedded base policy, in the format that ``from_pretrained`` reads.

    Raises:
        PolicyError: The installation does not contain the checkpoint.
    """
    return _shipped("base", "")


def ladder_checkpoint() -> Path:
    """Return the directory of the embedded policy whose accuracy on `reverse` falls with the length of the word.

    Raises:
        PolicyError: The installation does not contain the checkpoint.
    """
    return _shipped("ladder", "--ladder ")


def _shipped(folder: str, option: str) -> Path:
    path = Path(__file__).parent / folder
    if not (path / "model.safetensors").is_file():
        raise PolicyError(
            f"the embedded policy is missing from {path}; reinstall cropi, or train it again with "
            f"`python -m cropi_core.world.train_base {option}--out {path}`"
        )
    return path
