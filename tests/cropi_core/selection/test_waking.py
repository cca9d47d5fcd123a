"""Prompts that a later stage samples again: those that read like validation prompts whose rewards differ now."""

import numpy as np
import pytest

from cropi_core.errors import DataError
from cropi_core.selection.waking import Sampled, likeness, waking_prompts, waking_values
from cropi_core.world import build
from data_schemas import Waking

POOL = build({f"reverse-{n}": 20 for n in (4, 6, 8, 10)} | {"copy": 20, "add3": 20}, "pool", 0)
GOAL = build({f"reverse-{n}": 8 for n in (6, 8, 10)}, "validation", 0)
SOURCES = POOL["source"].to_pylist()


def sampled(rates: dict[str, float]) -> Sampled:
    """Validation prompts of 8 samples whose pass rates are those of their families."""
    passed = np.array([8 * rates[name] for name in GOAL["source"].to_pylist()])
    return Sampled(GOAL, passed, np.full(GOAL.num_rows, 8.0))


def woken(rates: dict[str, float], tokens: int = 600, seed: int = 0) -> list[str]:
    settings = Waking(tokens=tokens, neighbours=4)
    table = waking_prompts(POOL, [sampled(rates)], settings, group=8, tokens=30, seed=seed)
    return table["source"].to_pylist()


def test_the_level_that_begins_to_be_solved_wakes_and_moves_on():
    """All of level 6 is solved, some of level 8: level 8 is sampled. A stage later it is level 10's turn."""
    assert set(woken({"reverse-6": 1.0, "reverse-8": 0.5, "reverse-10": 0.0})) == {"reverse-8"}
    assert set(woken({"reverse-6": 1.0, "reverse-8": 1.0, "reverse-10": 0.25})) == {"reverse-10"}


def test_the_budget_says_how_many():
    rates = {"reverse-6": 0.5, "reverse-8": 0.5, "reverse-10": 0.0}
    assert [len(woken(rates, tokens)) for tokens in (1, 300, 600, 10**6)] == [1, 10, 20, POOL.num_rows]


def test_another_set_wakes_its_own_prompts():
    copies = build({"copy": 8}, "validation", 0)
    other = Sampled(copies, np.full(8, 4.0), np.full(8, 8.0))
    goal = sampled({"reverse-6": 0.5, "reverse-8": 0.0, "reverse-10": 0.0})
    alone, both = (waking_values(POOL, sets, group=8, neighbours=4) for sets in ([goal], [goal, other]))
    of_copies = np.array([source == "copy" for source in SOURCES])
    assert (both[of_copies] > 2 * alone[of_copies]).all()
    assert (both >= alone).all()


def test_the_order_of_the_pool_does_not_decide():
    rates = {"reverse-6": 0.5, "reverse-8": 0.5, "reverse-10": 0.5}
    turned = np.arange(POOL.num_rows)[::-1]
    first = waking_prompts(POOL, [sampled(rates)], Waking(tokens=300), group=8, tokens=30, seed=3)
    again = waking_prompts(
        POOL.take(turned), [sampled(rates)], Waking(tokens=300), group=8, tokens=30, seed=3
    )
    assert set(first["prompt_id"].to_pylist()) == set(again["prompt_id"].to_pylist())


def test_equal_texts_are_alike_and_length_counts():
    ((_, alike),) = likeness(["rev:abcdef=", "rev:abcdefgh="], ["rev:abcdef="])
    assert alike[0, 0] == pytest.approx(1)
    assert alike[1, 0] < 0.05


def test_blocks_of_a_pool_have_the_values_of_the_whole(monkeypatch):
    rates = {"reverse-6": 0.5, "reverse-8": 0.25, "reverse-10": 0.0}
    whole = waking_values(POOL, [sampled(rates)], group=8, neighbours=4)
    monkeypatch.setattr("cropi_core.prompts.similarity.BLOCK", 7)
    np.testing.assert_allclose(
        waking_values(POOL, [sampled(rates)], group=8, neighbours=4), whole, atol=1e-12
    )


def test_a_set_that_was_not_graded_is_refused():
    with pytest.raises(DataError, match=r"rollouts\.refresh=never"):
        waking_values(POOL, [Sampled(GOAL, np.zeros(24), np.zeros(24))], group=8, neighbours=4)
