"""The proxy: a small MLP that accepts or rejects a candidate, its critic, and the closed form.

The gate is the policy of the Markov decision process of Proxy-RLHF (arXiv 2403.04283, section 3); the frozen LM is
its environment. Everything else in the package only prepares its input or carries out its decisions.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class ProxyMLP(nn.Module):
    """LayerNorm -> standardise -> MLP -> one number per decision; used for the accept logit and for the state value.

    Args:
        part_sizes: sizes of the feature's parts, in order. Each is normalised separately: an LM's last hidden state
            and its embeddings differ in scale by orders of magnitude. [`standardise`] removes what all texts share,
            such as the chat template in the mean of the hidden states, because it would hide the differences.
        num_scalars: trailing features that are passed through unchanged.
        hidden_sizes: widths of the hidden layers.
        bias: initial output. The last layer starts at zero, so a new network returns `bias` everywhere.
    """

    def __init__(self, part_sizes: list[int], num_scalars: int, hidden_sizes: list[int], bias: float):
        super().__init__()
        self.part_sizes, self.num_scalars = list(part_sizes), num_scalars
        self.register_buffer("feature_mean", torch.zeros(sum(part_sizes)))
        self.register_buffer("feature_std", torch.ones(sum(part_sizes)))
        sizes = [sum(part_sizes) + num_scalars, *hidden_sizes]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.constant_(self.mlp[-1].bias, bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., feature_size)` of any float dtype -> `(...)` float32."""
        # PPO's ratios need float32 even if the LM runs in bfloat16 autocast.
        with torch.autocast(features.device.type, enabled=False):
            parts, scalars = self.normalise(features)
            parts = (parts - self.feature_mean) / self.feature_std
            return self.mlp(torch.cat([parts, scalars], dim=-1)).squeeze(-1)

    def normalise(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., feature_size)` -> the parts after LayerNorm `(..., sum(part_sizes))` and the scalars, float32."""
        *parts, scalars = features.to(self.feature_mean.dtype).split([*self.part_sizes, self.num_scalars], dim=-1)
        return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1), scalars

    @property
    def is_new(self) -> bool:
        """Whether it has no moments yet, and the last layer is still zero: the output does not depend on either."""
        return not (self.mlp[-1].weight.any() or self.feature_mean.any())

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the moments, `(sum(part_sizes),)` each, of the parts after LayerNorm over typical features."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=1e-3))


def gated_log_probs(accept_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The next-token distribution of decisions in sequence, in closed form.

    With accept probabilities a_1..a_K in proposal order, `log pi(c_k) = log a_k + sum_{j<k} log(1 - a_j)`. The last
    candidate gets the rest, because it is accepted without asking.

    Args:
        accept_logits: `(..., K)` float.
        mask: `(..., K)` bool, real candidates; they come first.

    Returns:
        `(..., K)` float32, -inf outside `mask`. The probabilities of a position sum to one.
    """
    log_reject = F.logsigmoid(-accept_logits).masked_fill(~mask, 0.0)
    # Not `cumsum - log_reject`: a large logit would cancel the small ones before it.
    reached = F.pad(log_reject.cumsum(-1)[..., :-1], (1, 0))
    log_accept = F.logsigmoid(accept_logits).masked_fill(is_last(mask), 0.0)
    return (reached + log_accept).masked_fill(~mask, -torch.inf)


def decide(accept_logits: torch.Tensor, threshold: float, sample: bool) -> torch.Tensor:
    """Accept or reject each proposal.

    Args:
        accept_logits: `(...)` float.
        threshold: subtracted from the logits: above zero the gate rejects more than in training, below zero less.
        sample: draw with probability `sigmoid(logit - threshold)`, else accept if the logit reaches the threshold.

    Returns:
        `(...)` bool.
    """
    if sample:
        return torch.rand_like(accept_logits) < torch.sigmoid(accept_logits - threshold)
    return accept_logits >= threshold


def accepted_rank(accept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rank of the first accepted candidate of each position. The last candidate is accepted without asking.

    Args:
        accept: `(..., K)` bool decisions. mask: `(..., K)` bool, real candidates.

    Returns:
        `(...)` int64.
    """
    return ((accept & mask) | is_last(mask)).int().argmax(-1)


def is_last(mask: torch.Tensor) -> torch.Tensor:
    """`(..., K)` bool: the last candidate of each position, which is accepted without asking."""
    return mask & ~F.pad(mask[..., 1:], (0, 1))
