"""Advantages over decisions. Pure functions; a decision (or a token, when the LM itself is trained) is one step."""

import torch
import torch.nn.functional as F


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = delta_t + gamma lambda A_{t+1}`, with V = 0 after the last
    step. Steps outside `mask` are skipped.

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


def step_rewards(scores: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, every: int) -> torch.Tensor:
    """The reward of each step of an episode: the change of the response's score until the next step.

    If only the finished response has a score, the last step gets it. With scores of unfinished responses this is
    potential-based shaping (Ng et al. 1999): the sum is the same, but it is paid earlier.

    Args:
        scores: `(B, C)` float, of the response after `every`, `2 * every`, ... tokens, and in the last column of the
            finished one.
        positions: `(B, T)` int64, number of tokens written when the step is taken, at most `C * every - 1`.
        mask: `(B, T)` bool, True for a step; the steps come first in their row.

    Returns:
        `(B, T)`, zero outside `mask`. The sum of a row is its last score minus the score before its first step.
    """
    before = F.pad(scores, (1, 0)).gather(1, torch.where(mask, positions // every, 0))
    followed = F.pad(mask[:, 1:], (0, 1))
    after = torch.where(followed, F.pad(before[:, 1:], (0, 1)), scores[:, -1:])
    return torch.where(mask, after - before, 0.0)
