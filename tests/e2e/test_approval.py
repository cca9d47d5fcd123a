"""A person approves selections: what is asked, what is trained on, and what a resumed run knows."""

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.errors import DeclinedError, SelectionError, WaitingError
from cropi_core.runs.records import load_run, run_id
from tests.support.tiny import computed, digests, go, tiny


class Person:
    """Answers in turn: None is yes, a number another ratio, an error is raised."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, stage, selection, fault):
        self.asked.append((stage, selection, fault))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def asked(config, root, person):
    store = Store(root)
    return run_curriculum(config, store, lambda spec: run_step(spec, store), approve=person)


def test_yes_to_every_stage_is_the_run_without_questions(own_copy):
    root, record = own_copy
    person = Person(None, None)
    again = asked(tiny(), root, person)
    assert [stage for stage, *_ in person.asked] == [1, 2]
    assert [ref for _, ref, _ in person.asked] == [record.slots[f"selection@{n}"].ref for n in (1, 2)]
    assert digests(again) == digests(record)
    assert not computed(again)


def test_another_ratio_is_chosen_shown_and_trained_on_and_is_that_of_a_run_with_it(own_copy):
    root, record = own_copy
    person = Person(0.5, 0.3, None, None)
    again = asked(tiny(), root, person)
    first, half, third, second = [ref for _, ref, _ in person.asked]
    store = Store(root)
    assert first == record.slots["selection@1"].ref
    assert [store.manifest(ref).summary["ratio"] for ref in (half, third, second)] == [0.5, 0.3, 0.2]
    assert again.slots["selection@1"].ref == third
    assert store.manifest(again.slots["policy@1"].ref).inputs["selection"] == third
    assert again.approved == {first.key: 0.3, second.key: 0.2}
    # Nothing but the ratio is different: another run that asks for it finds the stage.
    other = go(tiny(stages=1, selection={"ratio": 0.3}), root)
    assert other.slots["policy@1"].ref == again.slots["policy@1"].ref


def test_a_resumed_run_is_not_asked_again_and_one_without_approval_uses_its_own_ratio(own_copy):
    root, record = own_copy
    first = asked(tiny(), root, Person(0.3, None, None))
    person = Person()
    again = asked(tiny(), root, person)
    assert person.asked == []
    assert digests(again) == digests(first)
    assert digests(go(tiny(), root)) == digests(record)


def test_a_stop_after_an_approval_keeps_it(own_copy):
    root, _ = own_copy
    with pytest.raises(KeyError):
        asked(tiny(), root, Person(0.3, None, KeyError("stop")))
    person = Person(None)
    asked(tiny(), root, person)
    assert [stage for stage, *_ in person.asked] == [2]


@pytest.mark.parametrize(
    ("error", "status"), [(DeclinedError("no"), "cancelled"), (WaitingError("later"), "waiting")]
)
def test_an_unapproved_selection_is_not_trained_on_and_is_asked_for_again(tmp_path, error, status):
    config = tiny(stages=1)
    with pytest.raises(type(error)):
        asked(config, tmp_path, Person(error))
    record = load_run(Store(tmp_path), run_id(config))
    assert (record.status, record.approved) == (status, {})
    assert "policy@1" not in record.slots
    person = Person(None)
    assert asked(config, tmp_path, person).status == "done"
    assert [stage for stage, *_ in person.asked] == [1]


def test_too_few_prompts_are_reported_and_refused_even_when_approved(own_copy):
    root, _ = own_copy
    person = Person(0.05, None)
    with pytest.raises(
        SelectionError, match=r"selected 2 prompts of 40, fewer than training.prompts_per_step=4"
    ):
        asked(tiny(), root, person)
    assert person.asked[0][2] is None
    assert "selection.ratio=0.05" in person.asked[1][2]
