"""Replay: an update learns from the newest rollout and those before it, whose features are cached.

(6) Ratio under replay: a rollout is usable as long as PPO's ratio to the policy that made it stays near 1. This is the
sample reuse of Queeney et al. 2021 (arXiv 2111.00072), with PPO's own clipping. Advantages are not recomputed.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

_READ_BY_LOSS = ("action_mask", "action_log_probs", "advantages_per_step", "state_values", "returns")


def is_read_by_loss(name: str) -> bool:
    """Whether the loss reads this entry of a scored rollout; the others are TRL's."""
    return name in _READ_BY_LOSS or name.startswith("rollout_")


class ReplayBuffer:
    """The last rollouts of a process, each a dict of tensors with B rows.

    Args:
        size: how many rollouts an update learns from.
    """

    def __init__(self, size: int):
        self.size = size
        self.rollouts: list[dict[str, torch.Tensor]] = []

    def add(self, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds the newest rollout; returns the rows of the last `size` rollouts as one, padded to the longest."""
        self.rollouts = [*self.rollouts, rollout][-self.size :]
        return {name: concatenate([one[name] for one in self.rollouts]) for name in rollout}

    def save(self, path: str) -> None:
        """Writes all rollouts to a safetensors file; nothing if there are none."""
        if self.rollouts:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_file(
                {f"{i}.{name}": x.clone() for i, one in enumerate(self.rollouts) for name, x in one.items()}, path
            )

    def load(self, path: str, place: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Reads rollouts that [`save`] wrote; `place(name, tensor)` moves a tensor to its device."""
        rollouts: dict[int, dict[str, torch.Tensor]] = {}
        for key, x in load_file(path).items():
            i, name = key.split(".", 1)
            rollouts.setdefault(int(i), {})[name] = place(name, x)
        self.rollouts = [rollouts[i] for i in sorted(rollouts)]


def concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several batches, `(B, ...)` each; shorter rows are padded with zeros."""
    if tensors[0].dim() > 1:
        width = max(x.shape[1] for x in tensors)
        tensors = [F.pad(x, (*[0] * (2 * x.dim() - 4), 0, width - x.shape[1])) for x in tensors]
    return torch.cat(list(tensors))
