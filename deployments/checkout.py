"""The pull step of every deployment: go to the directory this installation's checkout lies in.

Prefect's own step writes the deploying machine's path into the deployment, where every worker then looks for
it. This one is resolved by the worker, on the worker's machine.
"""

import os
from pathlib import Path


def enter_checkout() -> dict[str, str]:
    """Change to the checkout, or to ``CROPI_HOME`` where that is set, so that a relative root means the same.

    Returns:
        ``directory``, as Prefect's own steps do.
    """
    directory = os.environ.get("CROPI_HOME") or str(Path(__file__).resolve().parent.parent)
    os.chdir(directory)
    return {"directory": directory}
