"""PPO's losses (Schulman et al. 2017, arXiv 1707.06347). Pure functions on `(B, T)` tensors and a mask of steps."""

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the steps of `mask`; zero, with a gradient of zero, if there are none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def clipped_policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """The clipped surrogate objective (equation 7), negated: `-min(r A, clip(r, 1 - low, 1 + high) A)`."""
    ratio = ((log_probs - old_log_probs) * mask).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return masked_mean(-torch.min(ratio * advantages, clipped * advantages), mask)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Half the squared error: the larger of the plain one and the one clipped around the rollout's values."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def approx_kl(log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Schulman's low-variance estimate of KL(old || new): the mean of `(r - 1) - log r`."""
    log_ratio = (log_probs - old_log_probs) * mask
    return masked_mean(log_ratio.exp() - 1 - log_ratio, mask)


def clip_fraction(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Share of steps whose ratio is outside the clip range."""
    ratio = ((log_probs - old_log_probs) * mask).exp()
    return masked_mean(((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).to(ratio), mask)
