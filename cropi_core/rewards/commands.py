"""The operator's rule for commands that a configuration names (``training.command``, ``runtime.launch.machines``).

A command is code, as a reward function is. Its arguments are the configuration's, so the operator allows programs, not
directories: a directory may hold an interpreter or an installer.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cropi_core.errors import ConfigError
from cropi_core.rewards.functions import ALLOWED, ANYWHERE

COMMANDS = "CROPI_COMMANDS"
"""Environment variable: programs, separated as in `PATH`, that a configuration may run; `*` allows all.

If it is unset, :data:`~cropi_core.rewards.functions.ALLOWED` decides: where that is unset too, on the command line,
every command may run; `*` allows every command, and directories allow none.
"""


def check_command(run: Sequence[str], setting: str = "training.command") -> None:
    """Check that this machine's operator allows a command.

    Args:
        run: The command.
        setting: Setting that names it.

    Raises:
        ConfigError: The operator does not allow it.
    """
    functions, programs = os.environ.get(ALLOWED), os.environ.get(COMMANDS)
    if programs is None and (functions is None or ANYWHERE in functions.split(os.pathsep)):
        return
    listed = [place for place in (programs or "").split(os.pathsep) if place]
    program = shutil.which(run[0])
    allowed = {Path(place).expanduser().absolute() for place in listed}
    if ANYWHERE in listed or (program is not None and Path(program).absolute() in allowed):
        return
    raise ConfigError(
        f"{setting} runs {program or run[0]}, and this machine allows it to no configuration ({COMMANDS} is "
        f"{programs!r}, {ALLOWED} is {functions!r}). The operator of the server or worker lists the programs in "
        f"{COMMANDS}; a run cannot"
    )
