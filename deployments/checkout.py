"""The pull step of every deployment. It pulls nothing, because the worker has cropi installed.

Without a pull step Prefect writes the deploying machine's path into the deployment. This one imports the flows, so that
an installation in which they cannot be imported is the reason of the run's state: Prefect alone would record
"Process exited with status code: 1". The flow itself changes to the worker's directory
(:func:`flows.serving.environment.enter_home`). An error in that step therefore appears in the run's log and state, and
the flow is imported before the process enters a directory that may contain modules of the same names.
"""

import importlib
import sys
from uuid import UUID

FLOWS = ("flows.curriculum", "flows.select", "flows.single_steps")


def enter_checkout() -> dict[str, str]:
    """Import the flows, and return an empty step result; the deployments refer to this function by name.

    Raises:
        Abort: A flow cannot be imported. The flow run is recorded as Failed with the reason.
    """
    try:
        for name in FLOWS:
            importlib.import_module(name)
    except Exception as error:
        _fail(error)
    return {}


def _fail(error: Exception) -> None:
    """Log why the flows cannot be imported, record the flow run as Failed, and end the process."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Abort
    from prefect.logging.loggers import flow_run_logger
    from prefect.runtime import flow_run
    from prefect.states import Failed

    message = (
        f"cropi cannot be imported in the worker's environment, {sys.executable}: {type(error).__name__}: {error}. "
        "Install cropi there again, with the extras that the run needs: pip install 'cropi[all]'"
    )
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(flow_run.get_id()))
        flow_run_logger(run).error(message, exc_info=error)
        client.set_flow_run_state(run.id, Failed(message=message), force=True)
    raise Abort(message) from error
