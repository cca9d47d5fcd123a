"""The configuration: strict, frozen, free of contradictions, and the same after a trip through JSON."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from cropi_core.config.loading import load_config
from data_schemas.config import Config
from data_schemas.runtime import Runtime
from data_schemas.section import LATER, Section
from tests.support.paths import CHECKOUT

WORLD = {"kind": "world", "families": {"sort": 4}}
PRESETS = sorted((CHECKOUT / "configs").glob("*.yaml"))


def config(**changes):
    return Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}}, **changes})


def test_there_are_presets():
    assert PRESETS


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_shipped_preset_is_a_configuration(path):
    assert load_config(str(path)) == load_config(path.stem)


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 99),
            "stages": st.integers(1, 9),
            "selection": st.fixed_dictionaries({"ratio": st.floats(0.01, 1)}),
            "training": st.fixed_dictionaries({"learning_rate": st.floats(1e-9, 1)}),
            "pin": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
        },
    )
)
def test_a_configuration_is_the_same_after_a_trip_through_json(changes):
    one = config(**changes)
    assert Config.model_validate_json(one.model_dump_json()) == one


def sections(model=Config, path=()):
    yield path, model
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from sections(inner, (*path, name))


SECTIONS = {".".join(path) or "config": (path, model) for path, model in sections()}


@pytest.mark.parametrize(("path", "model"), SECTIONS.values(), ids=SECTIONS)
def test_no_section_takes_an_unknown_field_or_changes_afterwards(path, model):
    assert issubclass(model, Section)
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]
    node = config()
    for part in path:
        node = getattr(node, part)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, next(iter(model.model_fields)), None)


CONTRADICTIONS = {
    "block_rows": {"gradients": {"rows_per_shard": 100, "block_rows": 32}},
    "group of one": {"training": {"sampling": {"samples": 1}}},
    "min_gradable": {"rollouts": {"pool": {"samples": 2}}, "objective": {"min_gradable": 3}},
    "training.beta": {"training": {"reference": "base"}},
    "draw.drift": {"training": {"draw": {"drift": 0.2}}},
    "without training.draw.oversampling": {"training": {"draw": {"first_samples": 4}}},
    "leaves no completion": {"training": {"draw": {"oversampling": 2, "first_samples": 8}}},
    "end.min_steps": {"training": {"steps": 3, "end": {"mixed_below": 0.5}}},
    "draw.sharpness": {"training": {"draw": {"method": "thompson", "sharpness": 2.0}}},
    "warmup_steps": {"training": {"steps": 3, "warmup_steps": 4}},
    "needs rollouts of every prompt": {
        "rollouts": {"pool_share": 0.5},
        "selection": {"strategy": "pass_rate"},
    },
    "leaves prompts without a score": {"rollouts": {"pool_share": 0.5}},
    "rescore=once": {"rescore": "once", "rollouts": {"refresh": "always"}},
    "strategy=full": {"selection": {"strategy": "full", "ratio": 0.5}},
    "projection.dtype": {"projection": {"kind": "none"}},
    "share the names": {"data": {"pool": WORLD, "validation": {"v": WORLD}, "test": {"v": WORLD}}},
    "columns of the scores table": {"data": {"pool": WORLD, "validation": {"rank": WORLD}}},
    "reserved for slots": {"data": {"pool": WORLD, "validation": {"spot": WORLD}, "test": {"pool": WORLD}}},
    "needs a spot check": {"diagnostics": {"min_spot_correlation": 0.2}},
    "has no Prefect": {"runtime": {"ray": {}, "mode": "subprocess"}},
    "set runtime.ray.workers": {"runtime": {"ray": {}, "workers": 4}},
    "set auto or cuda": {"runtime": {"ray": {}, "device": "cuda:1"}},
}


@pytest.mark.parametrize("word", CONTRADICTIONS)
def test_settings_that_cannot_hold_together_are_named(word):
    with pytest.raises(ValidationError, match=word):
        config(**CONTRADICTIONS[word])


def test_all_contradictions_are_reported_together():
    changes = {
        k: v
        for name in ("block_rows", "strategy=full", "projection.dtype")
        for k, v in CONTRADICTIONS[name].items()
    }
    with pytest.raises(ValidationError) as raised:
        config(**changes)
    for word in ("block_rows", "strategy=full", "projection.dtype"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "strategy", ["influence", "grad_norm", "learnability", "pass_rate", "random", "full", "text_similarity"]
)
def test_a_strategy_says_what_it_reads(strategy):
    made = config(selection={"strategy": strategy, "ratio": 1.0})
    assert made.needs_gradients == (strategy in ("influence", "grad_norm"))
    assert made.needs_rollouts == (strategy not in ("random", "full", "text_similarity"))


def test_a_later_strategy_is_that_of_all_stages_but_the_first():
    made = config(selection={"strategy": "influence", "later": "pass_rate"}, stages=3)
    assert [made.selection.at(stage).strategy for stage in (1, 2, 3)] == [
        "influence",
        "pass_rate",
        "pass_rate",
    ]
    assert [made.scores_at(stage) for stage in (1, 2, 3)] == [True, False, False]
    assert made.selection.at(1).for_key() == config(selection={"strategy": "influence"}).selection.for_key()
    assert config(selection={"strategy": "random", "later": "pass_rate"}).needs_rollouts


@pytest.mark.parametrize("strategy", ["influence", "grad_norm", "learnability", "random"])
def test_limits_and_the_spot_check_are_for_strategies_that_have_something_to_check(strategy):
    made = config(selection={"strategy": strategy}, diagnostics={"max_kl": 1.0, "spot_check": 9})
    assert made.needs_spot_check == (strategy == "influence")
    assert made.may_refresh == made.needs_gradients
    assert not config(diagnostics={"max_kl": 1.0, "max_kl_action": "random"}).may_refresh
    assert not config(diagnostics={"min_target_agreement": 0.1}).may_refresh
    assert config(selection={"strategy": strategy}, rollouts={"refresh": "always"}).may_refresh


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "inf"])
def test_numbers_that_no_key_can_hold_are_refused(value):
    with pytest.raises(ValidationError, match="finite"):
        config(training={"learning_rate": value})


def test_an_unknown_strategy_is_refused():
    """Estimator mistake 16: a strategy name that was accepted and did something else."""
    with pytest.raises(ValidationError, match="influence"):
        config(selection={"strategy": "influense"})


@pytest.mark.parametrize("name", ["Pool", "a b", "../x", "", "_a", "a" * 41])
def test_names_that_cannot_be_files_or_columns_are_refused(name):
    with pytest.raises(ValidationError):
        config(name=name)
    with pytest.raises(ValidationError):
        config(data={"pool": WORLD, "validation": {name: WORLD}})


def test_every_setting_but_the_plain_ones_says_what_it_is():
    """The form of an orchestrator shows these descriptions; what only changes speed must all be explained."""
    undescribed = [name for name, field in Runtime.model_fields.items() if not field.description]
    assert set(undescribed) <= {"mode"}  # its two values speak for themselves


def test_a_field_that_came_later_is_part_of_a_key_only_where_it_is_set():
    class Inner(Section):
        old: int = 1
        new: Annotated[int | None, LATER] = None

    class Outer(Section):
        inner: Inner = Inner()
        named: dict[str, Inner] = Field(default_factory=dict)

    assert Outer(named={"a": Inner()}).for_key() == {"inner": {"old": 1}, "named": {"a": {"old": 1}}}
    assert Outer(inner=Inner(new=2)).for_key() == {"inner": {"old": 1, "new": 2}, "named": {}}
    assert Outer(named={"a": Inner(new=0)}).for_key()["named"] == {"a": {"old": 1, "new": 0}}


def test_training_processes_are_shared_out_over_machines():
    launch = {"processes": 2, "machines": ["ssh node2", ""]}
    with pytest.raises(ValidationError) as raised:
        config(training={"prompts_per_step": 6}, runtime={"launch": launch})
    told = str(raised.value)
    assert "runtime.launch.processes=2 is not a multiple of the 3 machines" in told
    assert "runtime.launch.machines without runtime.launch.address" in told
    assert "runtime.launch.machines: '' is not a command line" in told
