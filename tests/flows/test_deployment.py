"""prefect.yaml against a real server, a process work pool and a worker; as a person would do it."""

import json
from pathlib import Path
from urllib.error import HTTPError

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from tests.support import processes
from tests.support.commands import CROPI, DEPLOYMENTS, Desk, answer, tiny_config
from tests.support.paths import CHECKOUT


@pytest.mark.slow
def test_every_deployment_is_there_and_none_knows_the_path_of_this_machine(desk: Desk):
    deployments = answer(f"{desk.url}/deployments/filter", {})
    flows = {flow["id"]: flow["name"] for flow in answer(f"{desk.url}/flows/filter", {})}
    assert {f"{flows[d['flow_id']]}/{d['name']}" for d in deployments} == DEPLOYMENTS
    for deployment in deployments:
        assert str(CHECKOUT) not in json.dumps(
            [deployment["pull_steps"], deployment["path"], deployment["entrypoint"]]
        )
        for name, form in deployment["parameter_openapi_schema"]["properties"].items():
            assert form.get("description"), (deployment["name"], name)
        assert deployment["enforce_parameter_schema"]
        assert deployment["job_variables"]["env"]["CROPI_ROOT"] == str(desk.root)


@pytest.mark.slow
def test_the_nightly_schedule_is_there_and_off_and_presets_are_choices(desk: Desk):
    by_name = {d["name"]: d for d in answer(f"{desk.url}/deployments/filter", {})}
    (schedule,) = by_name["nightly"]["schedules"]
    assert (schedule["slug"], schedule["active"]) == ("nightly", False)
    assert by_name["nightly"]["parameters"]["stages"] == 2
    assert not any(d["schedules"] for name, d in by_name.items() if name != "nightly")
    form = by_name["curriculum"]["parameter_openapi_schema"]["properties"]["preset"]
    assert form["enum"] == sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))


@pytest.mark.slow
def test_a_worker_runs_the_curriculum_and_then_one_step_of_it(desk: Desk):
    """Under the root of the deployment's job variables, Prefect's records beside the artifacts."""
    root = desk.root
    del desk.environment["CROPI_ROOT"]  # the worker's own is none
    config = json.dumps(tiny_config().model_dump(mode="json"))
    done = desk.work_through("cropi/curriculum", "-p", f"config={config}")
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(root)
    (run,) = list_runs(store)
    assert load_run(store, run).status == "done"
    assert list((root / ".prefect-results").iterdir())
    assert not (Path(desk.environment["PREFECT_HOME"]) / "storage").exists()
    again = desk.work_through("cropi-scores/rescore", "-p", f"run={run}", "-p", "metric=dot")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {store.manifest(key).settings["scores"]["metric"] for key in store.keys("scores")} == {
        "cosine",
        "dot",
    }
    keys = {a["key"] for a in answer(f"{desk.url}/artifacts/latest/filter", {}) if a["key"]}
    assert {"cropi-run", "cropi-scores", "cropi-evaluation"} <= keys


@pytest.mark.slow
def test_the_server_refuses_wrong_parameters_before_anything_is_scheduled(desk: Desk):
    before = len(answer(f"{desk.url}/flow_runs/filter", {}))
    (deployment,) = answer(
        f"{desk.url}/deployments/filter", {"deployments": {"name": {"any_": ["curriculum"]}}}
    )
    address = f"{desk.url}/deployments/{deployment['id']}/create_flow_run"
    for wrong in (
        {"stages": 0},
        {"ratio": 2},
        {"preset": "dem"},
        {"refresh": ["scoring"]},
        {"config": {"stages": 1}},
    ):
        with pytest.raises(HTTPError) as refused:
            answer(address, {"parameters": wrong})
        assert refused.value.code in (409, 422), wrong
    assert desk.run("deployment", "run", "cropi/curriculum", "-p", "nosuch=1", check=False).returncode != 0
    assert len(answer(f"{desk.url}/flow_runs/filter", {})) == before


@pytest.mark.slow
def test_deploying_again_from_another_shell_keeps_the_root(desk: Desk):
    environment = {name: value for name, value in desk.environment.items() if name != "CROPI_ROOT"}
    done = processes.run(
        [*CROPI, "deploy"], env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert f"the root stays {desk.root}" in done.stderr
    deployments = answer(f"{desk.url}/deployments/filter", {})
    assert {d["job_variables"]["env"]["CROPI_ROOT"] for d in deployments} == {str(desk.root)}
