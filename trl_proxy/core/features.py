"""What the gate reads of a proposal: its parts, their sizes, and how they are joined.

These are the features of the stable knowledge-aware module (SKAM, arXiv 2403.04283, section 3): they come from the
frozen LM, so the gate inherits what the LM knows.
"""

from collections.abc import Callable

import torch

from .candidates import Candidates
from .config import ProxyConfig

NUM_SCALARS = 5  # see `candidate_scalars`


def state_size(config: ProxyConfig) -> int:
    """Size of what the gate reads of a position: the hidden state of each layer, and with pooled features its mean."""
    return sum(_state_parts(config))


def part_sizes(config: ProxyConfig) -> tuple[list[int], int]:
    """Sizes of the parts of a feature, in order, and the number of scalars behind them."""
    if config.features == "candidate":
        return _state_parts(config), 0
    return [*_state_parts(config), config.embedding_size or 0], NUM_SCALARS


def _state_parts(config: ProxyConfig) -> list[int]:
    return [config.hidden_size or 0] * len(config.feature_layers) * (2 if config.pooled_features else 1)


def candidate_scalars(candidates: Candidates, positions: torch.Tensor) -> torch.Tensor:
    """What the gate reads about a candidate besides hidden states.

    Args:
        candidates: of shape `(..., K)`.
        positions: `(...)` int64, index in the sequence (padding not counted) at which the candidates would stand.

    Returns:
        `(..., K, NUM_SCALARS)` float32: log-prob, its gap to the most probable candidate, rank, number of
        candidates, position; each scaled to about one.
    """
    k = candidates.token_ids.shape[-1]
    log_probs = candidates.log_probs.clamp(min=-20.0)
    best = log_probs.masked_fill(~candidates.mask, -torch.inf).amax(-1, keepdim=True)
    rank = torch.arange(k, device=log_probs.device, dtype=torch.float32).expand_as(log_probs)
    count = candidates.counts.unsqueeze(-1).float().expand_as(log_probs)
    # 128 tokens are one unit. Positions stop at 1,024: training never saw later ones.
    position = positions.unsqueeze(-1).clamp(max=1024).float().expand_as(log_probs)
    return torch.stack([log_probs / 4, (best - log_probs) / 4, rank / 16, count / 16, position / 128], dim=-1)


def prefix_features(state: torch.Tensor, embeddings: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    """Prefix features `(N, feature_size)` float32 of candidates: the state before each `(N, state_size)`, its input
    embedding `(N, embedding_size)` and its [`candidate_scalars`]; on the device of these."""
    return torch.cat([part.to(scalars.device).float() for part in (state, embeddings, scalars)], dim=-1)


def places_of(mask: torch.Tensor) -> torch.Tensor:
    """Where to work if only the True entries of a mask `(N,)` need it: their indices on a CPU, all indices elsewhere.
    There the work is cheap, and their number would have to be waited for. Mask what comes out."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else torch.arange(len(mask), device=mask.device)


def accept_logits(
    proxy, embed: Callable, state: torch.Tensor, candidates: Candidates, positions: torch.Tensor
) -> torch.Tensor:
    """Accept logits of all candidates of a position at once, with prefix features.

    Args:
        proxy: has `accept_logits(features (N, feature_size), rows (N,)) -> (N,)`.
        embed: token ids -> the LM's input embeddings.
        state: `(B, state_size)`.
        candidates: `(B, K)`.
        positions: `(B,)` int64, see [`candidate_scalars`].

    Returns:
        `(B, K)` float32; 0 beyond the candidates and at positions with one candidate, which ask nothing.
    """
    # (1) Forced last candidate: a position with one candidate asks nothing. Most positions of a good LM have one.
    asked = candidates.mask & (candidates.counts > 1)[:, None]
    places = places_of(asked.flatten())
    rows = places // asked.shape[1]
    scalars = candidate_scalars(candidates, positions).flatten(0, 1)[places]
    features = prefix_features(state.to(rows.device)[rows], embed(candidates.token_ids.flatten()[places]), scalars)
    logits = scalars.new_zeros(asked.numel()).index_copy(0, places, proxy.accept_logits(features, rows))
    return torch.where(asked, logits.view_as(asked), 0.0)
