"""Advantages over decisions. Pure functions; a decision (or a token, when the LM itself is trained) is one step."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = delta_t + gamma lambda A_{t+1}`, with V = 0 after the last
    step. Steps outside `mask` are passed over as if they were not there.

    Args:
        rewards, values: `(B, T)` float. mask: `(B, T)` bool.

    Returns:
        Advantages and returns (advantage + value), `(B, T)`, zero outside `mask`.
    """
    advantages = torch.zeros_like(values)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        step = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(step, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(step, values[:, t], next_value)
        advantages[:, t] = torch.where(step, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def reward_at_last_step(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Puts the reward of an episode `(B,)` at its last step of `mask` `(B, T)`; a row without a step stays zero."""
    later = mask.flip(-1).long().cumsum(-1).flip(-1) - mask.long()
    return torch.where(mask & (later == 0), rewards[:, None], 0.0)
