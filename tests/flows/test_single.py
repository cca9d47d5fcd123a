import pytest

from cropi_core.artifacts.store import Store
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.runs.records import load_run
from flows import single_steps as single
from flows.curriculum import curriculum
from tests.support.commands import tiny_config


def test_unchanged_settings_find_the_runs_own_artifact(own_copy):
    root, run = own_copy
    for flow, slot in (
        (single.rollouts, "rollouts/pool@1"),
        (single.gradients, "gradients/pool@1"),
        (single.scores, "scores@1"),
        (single.selection, "selection@1"),
        (single.training, "policy@1"),
        (single.evaluation, "evaluation@1"),
    ):
        made = flow(run=run["run"], stage=1, root=str(root))
        assert made["slot"] == slot
        assert made["origin"] == "cached"
        assert made["ref"]["key"] == run["slots"][slot]["key"]


def test_another_fusion_is_another_artifact_and_the_run_stays_as_it_was(own_copy):
    root, run = own_copy
    store = Store(root)
    before = load_run(store, run["run"])
    made = single.scores(run=run["run"], root=str(root), fusion="max", metric="dot")
    assert made["origin"] == "computed"
    scores = store.manifest(made["ref"]["key"]).settings["scores"]
    assert (scores["fusion"], scores["metric"], scores["target"]) == ("max", "dot", "nearest")
    assert load_run(store, run["run"]) == before


def test_an_earlier_run_is_rescored_with_memory_of_its_stage_before(own_copy):
    root, _ = own_copy
    run = curriculum(config=tiny_config(stages=2), root=str(root))
    made = single.scores(run=run["run"], stage=2, root=str(root), memory=0.5)
    manifest = Store(root).manifest(made["ref"]["key"])
    assert manifest.settings["scores"]["memory"] == 0.5
    assert manifest.inputs["previous"].key == run["slots"]["scores@1"]["key"]
    with pytest.raises(ArtifactError, match="has no 'scores@0'"):
        single.scores(run=run["run"], stage=1, root=str(root), memory=0.5)


def test_single_steps_can_be_chained_and_pinned(own_copy):
    root, run = own_copy
    scores = single.scores(run=run["run"], root=str(root), metric="dot")
    chosen = single.selection(run=run["run"], root=str(root), scores=scores["ref"]["key"], ratio=0.5)
    assert Store(root).manifest(chosen["ref"]["key"]).inputs["scores"].key == scores["ref"]["key"]
    pinned = curriculum(config=tiny_config(pin=chosen["pin"]), root=str(root))
    assert pinned["slots"]["selection@1"]["key"] == chosen["ref"]["key"]
    assert pinned["slots"]["selection@1"]["origin"] == "pinned"


@pytest.mark.parametrize("strategy", ["random", "learnability", "pass_rate", "grad_norm"])
def test_every_strategy_can_be_tried_on_a_run_that_used_influence(own_copy, strategy):
    root, run = own_copy
    made = single.selection(run=run["run"], root=str(root), strategy=strategy)
    assert Store(root).manifest(made["ref"]["key"]).summary["strategy"] == strategy


def test_impossible_settings_are_reported(own_copy):
    root, run = own_copy
    with pytest.raises(ArtifactError, match="has no 'scores@7'"):
        single.scores(run=run["run"], stage=7, root=str(root))
    with pytest.raises(ArtifactError, match="no run"):
        single.scores(run="nosuch", root=str(root))
    with pytest.raises(ConfigError, match="full"):
        single.selection(run=run["run"], root=str(root), strategy="full", ratio=0.5)


OVERRIDES = {
    "rollouts": ["sampling.top_p=0.9"],
    "gradients": ["projection.k=128", "objective.ratio=one"],
    "scores": ["scores.metric=dot", "scores.rrf_k0=60"],
    "selection": ["selection.ratio=0.5"],
    "training": ["training.steps=3", "objective.clip_epsilon=0.3", "training.lora.r=4"],
    "evaluation": ["evaluation.sampling.samples=3", "evaluation.seed=5"],
}


def fits(form: dict, value: list[str]) -> bool:
    from prefect.utilities.schema_tools.validation import is_valid

    return is_valid({"overrides": value}, {"type": "object", "properties": {"overrides": form}})


@pytest.mark.parametrize("step", OVERRIDES)
def test_the_form_takes_the_settings_of_its_step_and_refuses_all_others(step):
    form = getattr(single, step).parameters.model_dump()["properties"]["overrides"]
    assert fits(form, OVERRIDES[step])
    others = [text for name, texts in OVERRIDES.items() if name != step for text in texts]
    own = tuple(text.partition(".")[0] for text in OVERRIDES[step])
    for wrong in ["", "seed=3", "stages=2", *(text for text in others if not text.startswith(own))]:
        assert not fits(form, [wrong]), wrong


def test_overrides_change_a_step_and_fields_of_the_form_win_and_the_tag_pins_it(own_copy):
    root, run = own_copy
    given = ["scores.fusion=max", "scores.metric=dot"]
    made = single.scores(run=run["run"], root=str(root), metric="cosine", overrides=given, tag="mine")
    store = Store(root)
    scores = store.manifest(made["ref"]["key"]).settings["scores"]
    assert (scores["fusion"], scores["metric"]) == ("max", "cosine")
    assert store.tags()["mine"] == made["ref"]["key"]
    pinned = curriculum(config=tiny_config(pin={"scores@1": "mine"}), root=str(root))
    assert pinned["slots"]["scores@1"]["key"] == made["ref"]["key"]
    with pytest.raises(ConfigError, match=r"scores\.rrf_top"):
        single.scores(run=run["run"], root=str(root), overrides=["scores.rrf_top=-3"])
