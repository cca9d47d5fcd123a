"""Token weights against their formulas for every choice, and the mistakes that changed the selection."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.errors import ConfigError
from cropi_core.gradients.objective import (
    advantages,
    clip_active,
    divergence,
    effective_sample_size,
    importance_ratio,
    length_scale,
    token_weights,
)
from data_schemas.gradients import Objective

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
REWARDS = torch.tensor([1.0, 0.0, 0.5])


def logprobs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(3, 4, generator=generator), -torch.rand(3, 4, generator=generator)


def test_advantages_are_those_of_the_trainer():
    """TRL: (r − mean) / (std + 1e-4) with the unbiased standard deviation."""
    expected = (REWARDS - 0.5) / (REWARDS.std(unbiased=True) + 1e-4)
    torch.testing.assert_close(advantages(REWARDS, scale=True), expected)
    torch.testing.assert_close(advantages(REWARDS, scale=False), REWARDS - 0.5)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8).filter(lambda r: np.ptp(r) > 1e-3))
def test_equal_weights_reweight_nothing(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    weights = torch.full_like(rewards, 0.3)
    torch.testing.assert_close(
        advantages(rewards, scale=True, weights=weights),
        advantages(rewards, scale=True),
        rtol=1e-6,
        atol=1e-9,
    )


def test_length_scales():
    lengths = torch.tensor([3, 1, 4])
    assert length_scale(lengths, "grpo", 10).tolist() == pytest.approx([1 / 9, 1 / 3, 1 / 12])
    assert length_scale(lengths, "dapo", 10).tolist() == pytest.approx([1 / 8] * 3)
    assert length_scale(lengths, "bnpo", 10).tolist() == pytest.approx([1 / 8] * 3)
    assert length_scale(lengths, "dr_grpo", 10).tolist() == pytest.approx([1 / 30] * 3)


def test_ratios():
    log_ratio = torch.tensor([[0.5, -0.25, 0.1, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    assert importance_ratio(log_ratio, mask, "none", 2).tolist() == [[1, 1, 1, 1]]
    torch.testing.assert_close(importance_ratio(log_ratio, mask, "token", 2), log_ratio.exp())
    assert importance_ratio(log_ratio, mask, "sequence", 2)[0, 0] == pytest.approx(np.exp(0.35 / 3))
    assert importance_ratio(log_ratio, mask, "sequence_truncated", 2)[0, 0] == pytest.approx(np.exp(0.35))
    assert importance_ratio(log_ratio * 10, mask, "sequence_truncated", 2)[0, 0] == 2


def test_on_policy_every_ratio_is_one():
    _, behavior = logprobs()
    weights = [
        token_weights(behavior, behavior, MASK, REWARDS, Objective(ratio=ratio), 4).weights
        for ratio in ("none", "token", "token_clip", "sequence", "sequence_truncated")
    ]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


def test_padding_has_no_weight_for_any_content():
    """Mistake 3: padding is never a token, not even an end-of-sequence."""
    logp, behavior = logprobs()
    for ratio in ("token", "sequence", "sequence_truncated"):
        clean = token_weights(logp, behavior, MASK, REWARDS, Objective(ratio=ratio), 4)
        dirty = token_weights(
            logp.masked_fill(~MASK, -50),
            behavior.masked_fill(~MASK, 3),
            MASK,
            REWARDS,
            Objective(ratio=ratio),
            4,
        )
        assert torch.equal(clean.weights, dirty.weights)
        assert not clean.weights[~MASK].any()
        for figure in ("ess", "max_ratio", "clip_fraction", "kl", "kl_k1"):
            assert getattr(clean, figure) == getattr(dirty, figure)


def test_a_long_completion_weighs_by_the_loss_type_alone():
    """Mistake 5: grpo gives every completion the same total, dapo every token the same share."""
    _, behavior = logprobs()
    grpo = token_weights(behavior, behavior, MASK, REWARDS, Objective(loss_type="grpo"), 4).weights
    advantage = advantages(REWARDS.double(), scale=True)
    torch.testing.assert_close(grpo.sum(1), advantage / 3)
    dapo = token_weights(behavior, behavior, MASK, REWARDS, Objective(loss_type="dapo"), 4).weights
    torch.testing.assert_close(dapo.sum(1), advantage * MASK.sum(1) / 8)


def test_clip_stops_only_what_ppo_stops():
    ratio = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]])
    active = clip_active(ratio, torch.tensor([1.0, -1.0]), 0.2)
    assert active.tolist() == [[True, False, False], [False, True, False]]
    logp, behavior = logprobs()
    objective = Objective(ratio="token_clip", clip_epsilon=0.1)
    clipped = token_weights(logp, behavior, MASK, REWARDS, objective, 4)
    free = token_weights(logp, behavior, MASK, REWARDS, Objective(ratio="token"), 4)
    stopped = (clipped.weights == 0) & (free.weights != 0)
    assert 0 < clipped.clip_fraction == pytest.approx(float(stopped.sum() / MASK.sum()))


def test_effective_sample_size():
    assert effective_sample_size(torch.zeros(8, 5)) == pytest.approx(8)
    assert effective_sample_size(torch.tensor([[500.0], [0.0]])) == pytest.approx(1)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert effective_sample_size(weights.log()[:, None]) == pytest.approx(36 / 14)


@given(st.lists(st.floats(-30, 3), min_size=1, max_size=12))
def test_k3_is_never_negative_and_both_are_zero_on_policy(log_ratio):
    values = torch.tensor([log_ratio], dtype=torch.float64)
    mask = torch.ones_like(values).bool()
    assert divergence(values, mask)[0] >= 0
    assert divergence(torch.zeros_like(values), mask) == (0, 0)


def test_both_estimates_of_the_kl_are_that_of_the_distributions():
    """Tokens of β at their exact frequencies: the estimate is Σ β log(β/π_θ), and grows with the distance."""
    beta = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    tokens = torch.repeat_interleave(torch.arange(4), (beta * 8).long())
    last = 0.0
    for step in (0.1, 0.5, 1.0):
        policy = torch.softmax(beta.log() + step * torch.tensor([1.0, -1.0, 0.5, 0.0]), 0)
        exact = float((beta * (beta / policy).log()).sum())
        found = divergence((policy / beta).log()[tokens][None], torch.ones(1, 8).bool())
        assert found == pytest.approx((exact, exact))
        assert found[0] > last
        last = found[0]


def test_unknown_choices_are_errors():
    """Mistake 16."""
    with pytest.raises(ConfigError, match="grpo, bnpo, dapo, dr_grpo"):
        length_scale(torch.tensor([1]), "ppo", 4)
    with pytest.raises(ConfigError, match="sequence_truncated"):
        importance_ratio(torch.zeros(1, 1), torch.ones(1, 1).bool(), "gspo", 1)
