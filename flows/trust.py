"""Restrictions on runs submitted through a server: which code their configuration may execute on this machine.

On the command line the user is the operator. A run of a deployment may come from every person with access to the
server, so every setting that names code is checked against the operator's setting: the variable
:data:`cropi_core.rewards.functions.ALLOWED` of the process that serves or works (docs/guides/security.md).
"""

import os
import shlex
from pathlib import Path

from prefect.runtime import deployment

from cropi_core.errors import ConfigError
from cropi_core.rewards import ALLOWED, ANYWHERE, check_allowed, check_command
from data_schemas import Config, Vllm

SIZES = {
    "--block-size",
    "--data-parallel-size",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--no-enable-prefix-caching",
    "--pipeline-parallel-size",
    "--seed",
    "--tensor-parallel-size",
}
"""vLLM arguments that only set sizes; other arguments load modules and plugins."""


def through_a_server() -> bool:
    """Return whether this flow run belongs to a deployment."""
    return "PREFECT__FLOW_RUN_ID" in os.environ or deployment.id is not None


def check_code(config: Config) -> None:
    """Refuse code that the operator has not allowed, in a run submitted through a server.

    The setting is written to the environment, which the step processes inherit.

    Raises:
        ConfigError: The configuration names code that is not allowed.
    """
    if not through_a_server():
        return
    allowed = os.environ.setdefault(ALLOWED, "")
    if ANYWHERE in allowed.split(os.pathsep):
        return
    if config.training.command is not None:
        check_command(config.training.command.run)
    for machine in config.runtime.launch.machines if config.runtime.launch else ():
        check_command(shlex.split(machine), "runtime.launch.machines")
    vllm = config.runtime.vllm
    if vllm.python is not None:
        check_allowed(f"runtime.vllm.python={vllm.python}", Path(vllm.python).expanduser())
    if named := foreign_settings(vllm):
        raise ConfigError(
            f"runtime.vllm: {', '.join(named)} may load code, and a run through a server cannot name code. The "
            f"operator of the server or worker allows it with {ALLOWED}='*'"
        )


def foreign_settings(vllm: Vllm) -> list[str]:
    """List the arguments and variables of vLLM's servers that set more than a size."""
    # An argument's value may be the next word.
    named = [word.partition("=")[0] for word in vllm.arguments if word.startswith("-")]
    return [word for word in named if word not in SIZES] + sorted(vllm.environment)
