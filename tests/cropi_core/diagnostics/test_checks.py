"""Limits: each has only its documented effect, and every effect is reported."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.diagnostics.limits import (
    FIGURES,
    GRADIENT_RULES,
    RULES,
    check_grid,
    collect_figures,
    consequence,
    judge,
    random_limits,
)
from data_schemas.diagnostics import Diagnostics
from data_schemas.records import StageCheck

RULED = {figure.rule: figure for figure in FIGURES if figure.rule}
FOUND = dict.fromkeys(
    ("kl", "ess_share", "dead_share", "target_agreement", "top_agreement", "spot_correlation"), 0.3
)
WORDS = {"refresh": "the trajectories are collected again", "random": "the prompts are selected at random"}


def limits(**changes):
    return Diagnostics.model_validate(changes)


def passing(rule):
    """Return a limit that the value 0.3 satisfies, and one that it exceeds."""
    return (0.2, 0.4) if rule.startswith("max_") else (0.4, 0.2)


def judged(settings, found=FOUND, trajectories="stored", rules=RULES):
    return judge(2, found, limits(**settings), trajectories=trajectories, rules=rules)


def test_every_rule_has_a_figure_a_limit_and_an_action():
    assert list(RULED) == list(RULES)
    assert {name for name in Diagnostics.model_fields if name.endswith("_action")} == {
        f"{rule}_action" for rule in RULES
    }
    assert all(getattr(Diagnostics(), rule) is None for rule in RULES), "off by default"


def test_without_limits_every_figure_is_measured_and_no_action_is_taken():
    check = judged({})
    assert check.action == "none"
    assert consequence(check) is None
    assert [f.figure for f in check.findings] == [figure.name for figure in FIGURES]
    assert {f.figure: f.value for f in check.findings if f.value is not None} == FOUND


@pytest.mark.parametrize("action", ["refresh", "random"])
@pytest.mark.parametrize("rule", RULES)
def test_an_exceeded_limit_triggers_its_own_action(rule, action):
    passed, kept = passing(rule)
    check = judged({rule: passed, f"{rule}_action": action, "spot_check": 9})
    assert check.action == action
    (finding,) = [f for f in check.findings if f.passed]
    assert (finding.rule, finding.limit, finding.value) == (rule, passed, 0.3)
    said = consequence(check)
    assert said is not None
    for word in ("stage 2", "0.3", f"diagnostics.{rule}={passed}", RULED[rule].label, WORDS[action]):
        assert word in said
    assert random_limits(check) == ([rule] if action == "random" else [])
    calm = judged({rule: kept, f"{rule}_action": action, "spot_check": 9})
    assert (calm.action, consequence(calm)) == ("none", None)
    at = judged({rule: 0.3, f"{rule}_action": action, "spot_check": 9})
    assert at.action == "none", "a value at its limit keeps it"


@pytest.mark.parametrize(("trajectories", "why"), [("own", "from the current policy"), ("pinned", "pinned")])
def test_figures_that_a_refresh_cannot_change_cause_no_refresh_and_are_reported(trajectories, why):
    check = judged({"max_kl": 0.2}, trajectories=trajectories)
    assert check.action == "none"
    said = consequence(check)
    assert said is not None
    assert why in said
    assert "used anyway" in said
    both = judged({"max_kl": 0.2, "min_target_agreement": 0.4}, trajectories=trajectories)
    assert (both.action, random_limits(both)) == ("random", ["min_target_agreement"])


def test_a_refresh_comes_before_a_random_selection():
    assert judged({"max_kl": 0.2, "min_target_agreement": 0.4}).action == "refresh"


def test_unmeasured_figures_exceed_no_limit_and_are_reported():
    check = judged({"min_target_agreement": 0.4}, found=FOUND | {"target_agreement": None})
    assert check.action == "none"
    said = consequence(check)
    assert said is not None
    assert "diagnostics.min_target_agreement could not be checked" in said


def test_rules_that_do_not_apply_are_silent():
    check = judged({"min_target_agreement": 0.4}, rules=GRADIENT_RULES)
    assert (check.action, consequence(check)) == ("none", None)


@given(
    st.dictionaries(st.sampled_from(RULES), st.floats(0.01, 1), max_size=5),
    st.dictionaries(st.sampled_from(sorted(FOUND)), st.none() | st.floats(0, 1), max_size=5),
    st.sampled_from(["own", "pinned", "stored"]),
)
def test_a_check_survives_json_and_is_shown_with_every_limit(chosen, found, trajectories):
    check = judged(chosen | {"spot_check": 9}, found=found, trajectories=trajectories)
    assert StageCheck.model_validate_json(check.model_dump_json()) == check
    assert check.action != "refresh" or trajectories == "stored"
    assert (consequence(check) is None) <= (check.action == "none")
    header, rows = check_grid([check])
    assert {len(row) for row in rows} <= {len(header)}
    text = [cell for row in rows for cell in row]
    assert sum(cell.endswith(" !") for cell in text) == sum(f.passed for f in check.findings)
    for rule in chosen:
        assert RULED[rule].label in text


def test_figures_are_those_of_the_manifests():
    gradients = {"prompts": 8, "status": {"ok": 2}, "kl": 0.1, "median_ess_share": 0.5}
    scores = {
        "sets": {
            "a": {"split_half_cosine": 0.5, "split_half_top_overlap": 0.1},
            "b": {"split_half_cosine": 0.2, "split_half_top_overlap": 0.3},
            "one prompt": {"split_half_cosine": None, "split_half_top_overlap": None},
        }
    }
    found = collect_figures(gradients, scores, {"spearman": 0.7, "overlap": 0.4, "chance": 0.1})
    assert found["dead_share"] == 0.75
    assert (found["target_agreement"], found["top_agreement"]) == (0.2, 0.1)
    assert (found["spot_correlation"], found["spot_overlap"], found["spot_chance"]) == (0.7, 0.4, 0.1)
    assert list(found) == [figure.name for figure in FIGURES]
    assert set(collect_figures({}).values()) == {None}, "an imported artifact has no figures"
