"""Check before the first step that the packages of later steps are installed.

Otherwise a worker without an extra fails hours later, when the gradients are computed and the training starts.
"""

import importlib.util
import sys
from collections.abc import Collection

from cropi_core.curriculum.slots import pin_for, slot_names
from cropi_core.errors import ConfigError
from data_schemas import Config, Slot

TRAINING = ("trl", "accelerate", "datasets")
LORA = ("peft",)
RAY = ("prefect_ray", "ray")


def check_packages(config: Config, filled: Collection[str] = ()) -> None:
    """Check that the packages are installed that the steps of a run import.

    Args:
        config: Configuration of the run.
        filled: Slots whose artifacts an earlier execution of the run has made; their packages are not needed.

    Raises:
        ConfigError: A package is missing; names the setting, the packages, the interpreter and the remedy.
    """
    open_slots = [Slot.parse(n) for n in slot_names(config) if n not in filled and not pin_for(config.pin, n)]
    if any(slot.kind == "policy" and slot.stage for slot in open_slots):
        _check("training", TRAINING, "train")
        if config.training.lora is not None:
            _check("training.lora", LORA, "train")
        for name in config.runtime.report_to:
            _check(f"runtime.report_to: {name}", (name,), None)
    if config.runtime.ray is not None and any(slot.kind == "gradients" for slot in open_slots):
        _check("runtime.ray", RAY, "ray")


def _check(setting: str, modules: Collection[str], extra: str | None) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(missing) if extra is None else f"'cropi[{extra}]'"
        raise ConfigError(
            f"{setting} needs {', '.join(missing)}, not installed in {sys.executable}: pip install {wanted}"
        )
