"""Flows on an S3 root: a run here, one of its steps again on another machine, a study, a deployment's worker."""

import json

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import load_run
from flows import single_steps as single
from flows.curriculum import curriculum
from tasks.steps import store_at
from tests.support import processes
from tests.support.bucket import new_bucket, objects
from tests.support.commands import CROPI, person, tiny_config
from tests.support.paths import CHECKOUT
from tests.support.studies import written

pytestmark = pytest.mark.slow


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Go to a machine: its cache, and no store that this process has opened before."""

    def go(name):
        monkeypatch.setenv("CROPI_CACHE", str(tmp_path / name))
        store_at.cache_clear()

    yield go
    store_at.cache_clear()


@pytest.mark.extended
def test_a_step_again_on_a_machine_that_has_nothing(s3_server, at):
    url = new_bucket()
    at("one")
    run = curriculum(config=tiny_config(), root=url)
    at("other")
    again = curriculum(config=tiny_config(), root=url)
    assert {slot["origin"] for slot in again["slots"].values()} == {"cached"}
    made = single.scores(run=run["run"], root=url, fusion="max", metric="dot")
    assert made["origin"] == "computed"
    assert f"manifests/{made['ref']['key']}.json" in objects(url)
    chosen = single.selection(run=run["run"], root=url, scores=made["ref"]["key"], ratio=0.5)
    at("third")
    pinned = curriculum(config=tiny_config(pin=chosen["pin"]), root=url)
    assert pinned["slots"]["selection@1"]["origin"] == "pinned"
    found = single.evaluation(run=run["run"], stage=1, root=url)
    assert found["path"].startswith(f"{url}/files/"), "found, and not fetched"


@pytest.mark.extended
def test_a_study_on_an_address(s3_server, tmp_path):
    url = new_bucket()
    environment = person(OMP_NUM_THREADS="1", CROPI_CACHE=str(tmp_path / "cache"))
    command = [
        *CROPI,
        "study",
        str(written(tmp_path / "study.yaml")),
        "--root",
        url,
        "--json",
        "--seeds",
        "1",
    ]
    done = processes.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == []
    assert sum(name.startswith("runs/") for name in objects(url)) == 2
    again = processes.run(
        [*command, "--tabulate"],
        env=environment | {"CROPI_CACHE": str(tmp_path / "other")},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    figures, before = json.loads(again.stdout), json.loads(done.stdout)
    assert {k: v for k, v in figures.items() if k != "files"} == {
        k: v for k, v in before.items() if k != "files"
    }


@pytest.mark.extended
def test_a_worker_of_a_deployment_whose_root_is_an_address(s3_server, desk, tmp_path):
    url = new_bucket()
    desk.environment |= s3_server.environment | {"CROPI_ROOT": url, "CROPI_CACHE": str(tmp_path / "cache")}
    desk.run("--no-prompt", "deploy", "--all")
    config = json.dumps(tiny_config().model_dump(mode="json"))
    done = desk.work_through("cropi/curriculum", "-p", f"config={config}")
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = [n for n in objects(url) if n.startswith("runs/") and n.endswith(".json")]
    assert load_run(Store(url), name.removeprefix("runs/").removesuffix(".json")).status == "done"
