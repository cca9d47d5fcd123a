"""The flow `cropi-select`: selects the prompts of a stage for another trainer, without training.

It prepares the configuration of a run that ends with its selection, and runs it with the flow `cropi`.
"""

from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import State
from pydantic import Field

from cropi_core.exporting import selecting
from flows.curriculum import Overrides, Preset, WholeConfig, configured, curriculum
from flows.serving import artifact_root
from flows.trust import check_code
from tasks import Executor

Name = Annotated[str | None, Field(min_length=1)]


@flow(name="cropi-select", flow_run_name="select {preset}")
def select(
    config: WholeConfig = None,
    preset: Preset = "demo",
    file: Annotated[str | None, Field(min_length=1, max_length=500)] = None,
    root: Name = None,
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None,
    ratio: Annotated[float | None, Field(gt=0, le=1)] = None,
    after: Name = None,
    policy: Name = None,
    rollouts: Name = None,
    overrides: Overrides = None,
) -> dict[str, Any] | State[Any]:
    """Select prompts for another trainer, or resume a selection.

    Args:
        config: A complete configuration. Empty: the preset's.
        preset: Name of a file in `configs/`.
        file: A YAML file on the machine that runs this flow, instead of a preset.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        seed: Seed; overrides the configuration's.
        ratio: Share of the pool that is selected; overrides the configuration's.
        after: Run of the selection before, which another trainer has trained on.
        policy: Key, tag, RUN:slot, directory or hub id of the policy that it trained.
        rollouts: Key, tag or RUN:slot of rollouts of that policy on the pool.
        overrides: Other settings as on the command line, such as `selection.strategy=learnability`.

    Returns:
        The run's summary. `cropi artifacts export RUN:selection@STAGE OUT --format FORMAT` writes the prompts.
    """
    root = artifact_root(root)
    settings = configured(config, file, preset, None, seed, ratio, overrides)
    check_code(settings)
    execute = Executor(root, get_run_logger())
    settings = selecting(settings, execute.store, execute, after=after, policy=policy, rollouts=rollouts)
    return curriculum(config=settings, root=root)
