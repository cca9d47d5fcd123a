"""The cost of a run by purpose: tokens of manifests, and seconds then and now."""

from types import SimpleNamespace

from cropi_core.runs.summary import (
    SlotSummary,
    Tokens,
    cost_grid,
    selection_in_steps,
    spending,
    tokens_of,
)


def manifest(step, summary, settings=None):
    return SimpleNamespace(step=step, summary=summary, settings=settings or {})


def test_tokens_are_those_of_the_manifest():
    assert tokens_of(manifest("rollouts", {"tokens": 5})) == Tokens(generated=5)
    assert tokens_of(manifest("evaluation", {"tokens": 6})) == Tokens(generated=6)
    trained = {"tokens_generated": 7, "tokens_trained": 20}
    assert tokens_of(manifest("training", trained)) == Tokens(generated=7, passed=20)
    assert tokens_of(manifest("gradients", {"tokens": 9}, {"layout": {}})) == Tokens(passed=9)
    assert tokens_of(manifest("gradients", {"tokens": 9}, {"layout": {"layers": "head"}})) == Tokens(
        forward=9
    )
    assert tokens_of(manifest("selection", {"pool": 3})) == Tokens()
    assert tokens_of(manifest("rollouts", {})) == Tokens()  # imported


def test_cost_is_summed_by_purpose_and_an_artifact_counts_once():
    def slot(name, step, key, spent, tokens):
        return SlotSummary(name, step, key, "", "computed", 2.0, spent, [], tokens)

    slots = [
        slot("rollouts/pool@1", "rollouts", "r", 2.0, Tokens(generated=1000)),
        slot("gradients/pool@1", "gradients", "g", 0.0, Tokens(passed=4000)),
        slot("gradients/pool@2", "gradients", "g", 0.0, Tokens(passed=4000)),
        slot("policy@1", "training", "p", 1.0, Tokens(generated=500, passed=900)),
        slot("evaluation@1", "evaluation", "e", 1.0, Tokens(generated=70)),
    ]
    cost = spending(slots)
    assert list(cost) == ["selection", "training", "evaluation"]
    assert cost["selection"].tokens == Tokens(1000, 4000)
    assert (cost["selection"].seconds, cost["selection"].spent) == (4.0, 2.0)
    assert cost_grid(slots)[1][:2] == [
        ["selection", "1,000", "4,000", "0", "4.0", "2.0"],
        ["training", "500", "900", "0", "2.0", "1.0"],
    ]


def test_the_cost_of_the_selection_is_expressed_in_training_steps():
    def slot(step, key, tokens, steps=0):
        return SlotSummary(key, step, key, "", "computed", 2.0, 1.0, [], tokens, steps)

    pool = slot("rollouts", "r", Tokens(generated=1000))
    gradients = slot("gradients", "g", Tokens(passed=500))
    stages = [slot("training", f"p{i}", Tokens(generated=500, passed=900), steps=10) for i in (1, 2)]
    generated, forwards = selection_in_steps([pool, gradients, *stages])
    assert generated == 20.0  # 1000 of the 50 tokens a step
    assert forwards == 20 * (1000 + 3 * 500) / (2 * (500 + 3 * 900))
    assert selection_in_steps([pool, gradients]) is None
    assert selection_in_steps(stages) is None
