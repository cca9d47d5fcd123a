"""Log-probabilities of completions in batches are those of one completion after another."""

import pytest

from cropi_core.rollouts import parity
from cropi_core.rollouts.parity import batches, completion_logprobs, measure
from data_schemas.rollouts import Sampling
from tests.support.models import tiny_model

SAMPLING = Sampling(temperature=0.7, top_p=0.9)


def rows_of(model, lengths):
    rows = []
    for number, (prompt, completion) in enumerate(lengths):
        ids = [(7 * number + 3 * place) % 30 + 4 for place in range(prompt + completion)]
        logprobs, _ = completion_logprobs(model, ids[:prompt], ids[prompt:], SAMPLING)
        rows.append((ids[:prompt], ids[prompt:], logprobs.tolist()))
    return rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_rows_of_a_batch_do_not_affect_each_other(kind):
    """Prompts and completions of different lengths, one of a single token; windows are shorter than the rows."""
    model, _ = tiny_model(kind)
    rows = rows_of(model, [(3, 9), (8, 1), (1, 20), (5, 5)])
    assert len(batches(rows, model.config.vocab_size)) == 1
    found = measure(model, rows, SAMPLING)
    assert (found.completions, found.tokens) == (4, 35)
    assert found.maximum < 1e-5
    wrong = [*rows[:3], (rows[3][0], rows[3][1], [x - 0.5 for x in rows[3][2]])]
    assert measure(model, wrong, SAMPLING).total == pytest.approx(2.5, abs=1e-4)


def test_batches_keep_their_logits_within_the_limit(monkeypatch):
    monkeypatch.setattr(parity, "BATCH_BYTES", 4 * 100 * 30)
    rows = [([1] * 5, [2] * n, [0.0] * n) for n in (10, 1, 40, 5, 9)]
    cut = batches(rows, 100)
    assert [[len(c) for _, c, _ in batch] for batch in cut] == [[40], [10, 9], [5, 1]]
