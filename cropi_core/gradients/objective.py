"""The GRPO surrogate as one weight per token.

With ratio and advantage held constant, the gradient of the objective for one prompt is a weighted sum of
log-likelihood gradients (CROPI, arXiv 2510.26491, section 3):

    ∇J = Σ_i Σ_t c_it ∇ log π_θ(y_it | x, y_i<t),    c_it = s_i ρ_it A_i

This module computes c, without a model. Shapes: G completions of one prompt, T padded tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cropi_core.errors import ConfigError
from data_schemas import Objective

STD_EPSILON = 1e-4
"""Added to the group's standard deviation; the trainer (TRL, grpo_trainer.py) adds the same."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights of one prompt's tokens, and diagnostics of the completions.

    Attributes:
        weights: (G, T) c_it, zero on padding.
        ess: Effective sample size of the sequence ratios, 1..G.
        max_ratio: Largest token ratio.
        clip_fraction: Share of tokens for which PPO's clip would be active.
        kl: KL(β‖π_θ) per token by the k3 estimator, never negative; see :func:`divergence`.
        kl_k1: The same by the k1 estimator, the mean of log β − log π_θ: unbiased, negative by chance with few tokens.
    """

    weights: Tensor
    ess: float
    max_ratio: float
    clip_fraction: float
    kl: float
    kl_k1: float


def advantages(rewards: Tensor, *, scale: bool, weights: Tensor | None = None) -> Tensor:
    """Normalise rewards within their group: A_i = (r_i − mean r) / (std r + 1e-4).

    Args:
        rewards: (G,) of the graded completions only.
        scale: Divide by the standard deviation (GRPO) or not (Dr. GRPO, arXiv 2503.20783).
        weights: (G,) positive weights for mean and standard deviation; None weights equally.

    Returns:
        (G,) advantages. The unweighted standard deviation is the unbiased one (G − 1), as in TRL.
    """
    if weights is None:
        centred = rewards - rewards.mean()
        return centred / (rewards.std() + STD_EPSILON) if scale else centred
    share = weights / weights.sum()
    centred = rewards - (share * rewards).sum()
    if not scale:
        return centred
    # Reliability weights: with equal weights the correction is G / (G − 1), the unbiased estimate above.
    variance = (share * centred.square()).sum() / (1 - share.square().sum())
    return centred / (variance.sqrt() + STD_EPSILON)


def length_scale(lengths: Tensor, loss_type: str, max_new_tokens: int) -> Tensor:
    """Return s_i, the length normalisation of each loss type.

    Args:
        lengths: (G,) tokens of each completion.
        loss_type: ``grpo`` and ``sapo`` 1/(G |y_i|); ``dapo``, ``bnpo``, ``cispo`` and ``vespo`` 1/Σ|y|; ``dr_grpo``
            1/(G L_max); ``luspo`` 1/G.
        max_new_tokens: L_max.

    Raises:
        ConfigError: The loss type is unknown.

    References:
        TRL 1.16, GRPOTrainer._compute_loss: the types differ in this and in their treatment of ratios other than 1. A
        test compares every type's gradient with TRL's.
    """
    lengths = lengths.to(torch.float64)
    if loss_type in ("grpo", "sapo"):
        return 1.0 / (len(lengths) * lengths)
    if loss_type in ("dapo", "bnpo", "cispo", "vespo"):
        return torch.full_like(lengths, 1.0 / float(lengths.sum()))
    if loss_type == "dr_grpo":
        return torch.full_like(lengths, 1.0 / (len(lengths) * max_new_tokens))
    if loss_type == "luspo":
        return torch.full_like(lengths, 1.0 / len(lengths))
    raise ConfigError(
        f"objective.loss_type={loss_type!r} is unknown; use one of grpo, bnpo, dapo, dr_grpo, cispo, sapo, vespo, luspo"
    )


def importance_ratio(log_ratio: Tensor, mask: Tensor, kind: str, cap: float) -> Tensor:
    """Return ρ_it from the token log-ratios log π_θ − log β.

    Args:
        log_ratio: (G, T), zero on padding.
        mask: (G, T) bool.
        kind: ``none`` 1; ``token`` and ``token_clip`` π_θ/β of the token; ``sequence`` the geometric mean over the
            completion (GSPO, arXiv 2507.18071); ``sequence_truncated`` the product over it, at most ``cap``.
        cap: Largest product.

    Returns:
        (G, T) ratios.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind in ("token", "token_clip"):
        return log_ratio.exp()
    total = log_ratio.sum(1, keepdim=True)
    if kind == "sequence":
        return (total / mask.sum(1, keepdim=True)).exp().expand_as(log_ratio)
    if kind == "sequence_truncated":
        return total.exp().clamp(max=cap).expand_as(log_ratio)
    raise ConfigError(
        f"objective.ratio={kind!r} is unknown; use one of none, token, token_clip, sequence, sequence_truncated"
    )


def clip_active(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """Mark tokens where PPO's clip stops the gradient: ρ > 1+ε with A > 0, or ρ < 1−ε with A < 0.

    Args:
        ratio: (G, T).
        advantage: (G,).
        epsilon: Half width of the trust region.

    Returns:
        (G, T) bool.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    positive = (advantage > 0)[:, None]
    negative = (advantage < 0)[:, None]
    return (positive & (ratio > 1 + epsilon)) | (negative & (ratio < 1 - epsilon))


def effective_sample_size(log_ratio: Tensor) -> float:
    """Return (Σw)² / Σw² of the sequence ratios w_i = Π_t ρ_it: the equivalent number of on-policy completions.

    Args:
        log_ratio: (G, T), zero on padding.
    """
    total = log_ratio.sum(1)
    return float((2 * torch.logsumexp(total, 0) - torch.logsumexp(2 * total, 0)).exp())


def divergence(log_ratio: Tensor, mask: Tensor) -> tuple[float, float]:
    """Estimate KL(β‖π_θ) per token from tokens that β sampled; r = π_θ/β of a token.

    Args:
        log_ratio: (G, T) log π_θ − log β, zero on padding.
        mask: (G, T) bool.

    Returns:
        ``k3``, the mean of r − 1 − log r, and ``k1``, the mean of −log r. Each term of k3 is non-negative and its
        variance is small if the policies are close, so few tokens are enough. Both are unbiased if β can sample
        everything that π_θ can. With top-p below 1, E r is the mass of the nucleus instead of 1, and k3 is too low by
        the missing mass; k1 is not.

    References:
        Schulman 2020, *Approximating KL divergence*, http://joschu.net/blog/kl-approx.html: k1 and k3 with q = β,
        p = π_θ. TRL's GRPO trainer uses k3 for its KL to the reference (arXiv 2402.03300, equation 4).
    """
    values = log_ratio[mask]
    return float((values.expm1() - values).mean()), 0.0 - float(values.mean())


def token_weights(
    logprobs: Tensor,
    behavior: Tensor,
    mask: Tensor,
    rewards: Tensor,
    objective: Objective,
    max_new_tokens: int,
) -> TokenWeights:
    """Compute c_it = s_i ρ_it A_i for one prompt.

    Args:
        logprobs: (G, T) log π_θ of the stored tokens, at the sampling temperature.
        behavior: (G, T) stored log-probabilities of the behaviour policy.
        mask: (G, T) bool, true on completion tokens.
        rewards: (G,), all finite; completions that are not gradable are dropped.
        objective: Loss type, ratio, advantages and clip.
        max_new_tokens: L_max of ``dr_grpo``.

    Returns:
        Weights in float64 and the diagnostics.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logprobs.double() - behavior.double(), 0.0)
    lengths = mask.sum(1)
    group = None
    if objective.advantages == "reweighted":
        # The released code's reweight_group_adv: each completion counts by its length-averaged sequence ratio.
        group = (log_ratio.sum(1) / lengths).exp()
    advantage = advantages(rewards.double(), scale=objective.scale_rewards, weights=group)
    ratio = importance_ratio(log_ratio, mask, objective.ratio, objective.ratio_cap)
    token_ratio = log_ratio.exp()
    clipped = clip_active(token_ratio, advantage, objective.clip_epsilon) & mask
    scale = length_scale(lengths, objective.loss_type, max_new_tokens)
    weights = torch.where(mask, scale[:, None] * ratio * advantage[:, None], 0.0)
    if objective.ratio == "token_clip":
        weights = weights.masked_fill(clipped, 0.0)
    kl, kl_k1 = divergence(log_ratio, mask)
    return TokenWeights(
        weights=weights,
        ess=effective_sample_size(log_ratio),
        max_ratio=float(token_ratio[mask].max()),
        clip_fraction=float(clipped.sum() / mask.sum()),
        kl=kl,
        kl_k1=kl_k1,
    )
