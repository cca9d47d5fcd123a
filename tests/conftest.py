"""Isolate every test from the user's Prefect and from the network; set before anything imports Prefect."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest

from cropi_core.system import warm
from tests.support import processes

HERE = Path(__file__).parent
HOME = tempfile.mkdtemp(prefix="cropi-tests-")

for name in [n for n in os.environ if n.startswith("PREFECT_")]:
    del os.environ[name]  # otherwise a configured server would receive the tests' runs
os.environ |= {
    # Not in HOME: processes of one run of the tests copy each other's roots.
    "XDG_STATE_HOME": f"{tempfile.gettempdir()}/cropi-tests-state-{os.getuid()}",
    "XDG_CACHE_HOME": f"{tempfile.gettempdir()}/cropi-tests-cache-{os.getuid()}",
    "PREFECT_HOME": f"{HOME}/prefect",
    "PREFECT_PROFILES_PATH": f"{HOME}/profiles.toml",
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH": f"{HOME}/results",
    # Outside the tests of flows, an accidental call to a server is an error instead of a server start of 15 s.
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # PyTorch sets it when a process first trains; set before, it starts no second warm process.
    "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/cropi-tests-inductor-{os.getuid()}",
    # Forked processes show their own variables in its place (tests/support/entry.py).
    "ROOM_OF_MARKS": "." * 2000,
}

# A deadline for one example fails on a busy machine and says nothing of the property.
hypothesis.settings.register_profile("cropi", deadline=None)
hypothesis.settings.load_profile("cropi")

# One warm process for what the tests start and for what cropi starts in the process of the tests, though each test has
# other variables: pytest writes its name to the environment.
warm.SERVER = processes.SERVER

# When a script starts the tests in the background, they inherit an ignored SIGINT, and so would every command that a
# test interrupts with it. A handler set here is reset to the default in child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()  # until the tests are collected: it takes a fifth of the time of their imports, and finds nothing

FIRST = ("flows", "e2e")
"""Folders of tests whose files take longest. They start first, so that no process has a long file left at the end."""


def pytest_collection_modifyitems(items):
    """Order the tests by folder, and otherwise as they are in their files."""
    places = [HERE / name for name in FIRST]
    items.sort(
        key=lambda item: next((n for n, p in enumerate(places) if p in item.path.parents), len(places))
    )


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Exempt what has been imported from garbage collection: a full collection then takes 10 ms, not 300 ms."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """Start an S3 server on the loopback, and set its address and credentials in the environment."""
    from tests.support.bucket import Server

    server = Server(tmp_path_factory.mktemp("s3"))
    before = dict(os.environ)
    os.environ |= server.environment
    try:
        yield server
    finally:
        server.stop()
        os.environ.clear()
        os.environ |= before
