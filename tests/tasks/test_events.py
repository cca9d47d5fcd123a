"""Events of Prefect that the steps of a run announce."""

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import StepResult
from data_schemas.steps import StepSpec
from tasks import events
from tests.support.stores import publish


def test_rollouts_with_a_suspicious_verifier_are_announced_once(tmp_path, monkeypatch):
    store, sent = Store(tmp_path), []
    monkeypatch.setattr(events, "emit_event", lambda event, resource, payload: sent.append((event, payload)))
    text = "the verifier math gave none of the first 64 completions a reward"
    ref = publish(store, kind="rollouts", summary={"verifier_warnings": [text]})
    spec = StepSpec(step="rollouts", slot="rollouts/pool@1", settings={})
    for cached in (True, False):
        events.announced(lambda _, cached=cached: StepResult(ref, cached, 1.0), "demo-1", store)(spec)
    ((event, payload),) = sent
    assert event == "cropi.verifier.suspicious"
    assert payload["slot"] == "rollouts/pool@1"
    assert text in payload["text"]
