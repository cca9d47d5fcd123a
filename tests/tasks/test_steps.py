import json
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.states import State
from prefect.testing.utilities import (
    prefect_test_harness,
)  # Prefect's server fails to import with a wrong FastAPI

from cropi_core.progress import Progress
from data_schemas.records import STEP_NAMES, ArtifactRef
from data_schemas.steps import StepSpec
from tasks import progress
from tasks.steps import TASKS, artifact_cache_key, make_artifact, step_task
from tests.support.prefect_records import spec


def test_prefects_server_can_be_imported():
    assert callable(prefect_test_harness)


def test_every_step_has_a_task_of_its_own_name():
    assert [TASKS[step].name for step in STEP_NAMES] == list(STEP_NAMES)


def test_a_task_is_cached_by_its_artifacts_key_and_nothing_else(tmp_path: Path):
    def key(value: StepSpec) -> str:
        return artifact_cache_key(None, {"spec": value, "root": str(tmp_path), "refresh": True})  # type: ignore[arg-type]

    assert key(spec()) == spec().key
    assert key(spec(slot="prompts/other", runtime={"device": "cuda"})) == key(spec())
    assert key(spec(seed=1)) != key(spec())


def test_no_record_is_a_pickle_and_all_are_next_to_the_artifacts(tmp_path: Path):
    for step in STEP_NAMES:
        task = step_task(step, str(tmp_path), refresh_record=False)
        assert task.result_serializer == "json"
        assert task.result_storage == tmp_path / ".prefect-results"


def test_a_tasks_function_needs_no_server(tmp_path: Path):
    ref = make_artifact(spec(), str(tmp_path))
    assert isinstance(ref, ArtifactRef)
    manifest = json.loads((tmp_path / "prompts" / ref.key / "manifest.json").read_text())
    assert manifest["digest"] == ref.digest
    found = make_artifact(spec(), str(tmp_path))
    assert isinstance(found, State)
    assert (found.name, found.data) == ("Cached", ref)


def test_the_bar_of_a_failed_step_ends(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "create_progress_artifact", lambda _, description: uuid4())
    monkeypatch.setattr(
        progress, "update_progress_artifact", lambda *_, description: said.append(description)
    )

    def step() -> None:
        with progress.in_the_ui("policy@1", lambda p: None) as report:
            report(Progress(2, 5, "steps"))
            raise ValueError("no space")

    with pytest.raises(ValueError, match="no space"):
        step()
    assert said == ["policy@1: stopped at 40 %"]


def test_a_bar_costs_nothing_for_a_short_step_and_little_for_a_long_one(monkeypatch: pytest.MonkeyPatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(
        progress, "create_progress_artifact", lambda percent, **_: calls.append(percent) or uuid4()
    )
    monkeypatch.setattr(progress, "update_progress_artifact", lambda _, percent, **__: calls.append(percent))
    told = []
    with progress.in_the_ui("rollouts/pool@1", told.append) as report:
        for done in range(100):
            clock[0] += 0.02
            report(Progress(done, 100, "prompts"))
    assert calls == []
    with progress.in_the_ui("rollouts/pool@1", told.append) as report:
        for done in range(1000):
            clock[0] += 0.02
            report(Progress(done, 1000, "prompts"))
    assert len(calls) == 4
    assert calls[-1] == 100
    assert len(told) == 1100


def test_a_server_that_is_away_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch):
    def gone(*args, **kwargs):
        raise ConnectionError("away")

    monkeypatch.setattr(progress, "create_progress_artifact", gone)
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    with progress.in_the_ui("slot", lambda p: None) as report:
        report(Progress(1, 2, "prompts"))
