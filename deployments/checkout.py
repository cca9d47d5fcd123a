"""The pull step of every deployment: go to the directory this installation's checkout lies in.

Prefect's own step writes the deploying machine's path into the deployment, where every worker then looks for
it. This one is resolved by the worker, on the worker's machine.
"""

import os
from pathlib import Path

from cropi_core.errors import ConfigError


def enter_checkout() -> dict[str, str]:
    """Change to the checkout, or to ``CROPI_HOME`` where that is set, so that a relative root means the same.

    Returns:
        ``directory``, as Prefect's own steps do.

    Raises:
        ConfigError: There is neither; artifacts below ``site-packages`` would be lost at the next update.
    """
    here = Path(__file__).resolve().parent.parent
    directory = os.environ.get("CROPI_HOME") or str(here)
    if directory == str(here) and not (here / "pyproject.toml").is_file():
        raise ConfigError(
            f"cropi is installed in {here}, which is no checkout, and the worker has no CROPI_HOME; start the "
            "worker with CROPI_HOME=DIR, where relative paths begin and, below .cropi, artifacts go"
        )
    os.chdir(directory)
    return {"directory": directory}
