"""A short form of each campaign: the first cases of a kind, until a minute is over (docs/background/reliability.md)."""

import importlib
import os
import subprocess
import time

import pytest
from s3fs import S3FileSystem

from tests.campaigns.ledger import Ledger
from tests.support import hosts
from tests.support.paths import CHECKOUT

pytestmark = [pytest.mark.slow, pytest.mark.extended]

SECONDS = 50
CAMPAIGNS = {
    "damage": 60,
    "power": 12,
    "malformed": 2000,
    "kills": 9,
    "faults": 10,
    "verifiers": 33,
    "servers": 15,
}


@pytest.fixture(autouse=True)
def restored_environment():
    """Undo what a campaign sets here: variables, and file systems that remember the address of its server."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_the_first_cases_of_a_campaign_are_ok(name, tmp_path):
    campaign = importlib.import_module(f"tests.campaigns.{name}").campaign
    end = time.monotonic() + SECONDS
    ledger = Ledger(tmp_path / "cases.jsonl")
    for case in campaign(CAMPAIGNS[name], tmp_path):
        ledger.run([case])
        if time.monotonic() > end:
            break
    assert not ledger.summary()["failures"]
    assert ledger.outcomes


def test_a_host_that_is_lost_while_two_train_is_named_and_the_stage_resumes(tmp_path):
    if why := hosts.missing():
        pytest.skip(why)
    command = hosts.inside("tests.campaigns.hosts", "--count", "1", "--root", str(tmp_path))
    done = subprocess.run(
        command,
        env=os.environ | {"CROPI_CAMPAIGN_HUB": "1"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"resumed from step' in done.stdout


def test_a_campaign_resumes_after_its_last_whole_line(tmp_path):
    path, seen = tmp_path / "cases.jsonl", []

    def case(name):
        return name, lambda: seen.append(name) or {"ok": name != "b:1"}

    Ledger(path).run([case("a:0"), case("b:1")])
    with path.open("a") as stream:
        stream.write('{"case": "c:2", "o')
    summary = Ledger(path).run([case(name) for name in ("a:0", "b:1", "c:2")])
    assert seen == ["a:0", "b:1", "c:2"]
    assert (summary["cases"], summary["failed"], summary["groups"]) == (3, 1, {"a": 1, "b": 1, "c": 1})


def test_a_case_that_raises_is_a_failure_and_not_the_end(tmp_path):
    def broken():
        raise ValueError("no")

    summary = Ledger(tmp_path / "cases.jsonl").run([("a:0", broken), ("b:0", lambda: {"ok": True})])
    assert (summary["cases"], summary["failed"]) == (2, 1)
