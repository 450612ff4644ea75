"""Every tensor is made where its inputs are. Here the default place is another one, which has no numbers."""

import pytest
import torch

from trl_proxy.core.candidates import propose
from trl_proxy.core.features import accept_logits, candidate_scalars
from trl_proxy.core.gate import accepted_rank, decide, gated_log_probs
from trl_proxy.core.rollout import CandidateDecisions, PrefixStep, record_candidate_decisions, record_prefix_steps
from trl_proxy.trainer.advantages import gae, step_rewards
from trl_proxy.trainer.losses import approx_kl, clip_fraction, clipped_policy_loss, clipped_value_loss


def _tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def ints(high, *shape):
        return torch.randint(high, shape, generator=generator)

    return {
        "logits": ints(4, 3, 24).float(),  # with ties, also at the last place
        "state": torch.randn(3, 6, generator=generator),
        "embed": torch.randn(24, 5, generator=generator),
        "positions": ints(9, 3) + 1,
        "scores": torch.randn(3, 2, generator=generator),
        "steps": torch.randn(3, 4, generator=generator),
        "mask": torch.arange(4) < torch.tensor([[4], [0], [2]]),
        "rows": torch.tensor([0, 2, 0, 1, 0]),
        "flags": torch.tensor([True, True, False, True, True]),
        "eos": torch.tensor([3]),
    }


class _Proxy:
    def accept_logits(self, features, rows):
        return features.sum(-1) + rows


def _prefix(x, proposal, p_t_mode):
    candidates = propose(x["logits"], 0.01, p_t_mode, 4, 0.9, proposal)
    logits = accept_logits(_Proxy(), lambda ids: x["embed"][ids], x["state"], candidates, x["positions"])
    rank = accepted_rank(decide(logits, 0.1, sample=False), candidates.mask)
    steps = [PrefixStep(candidates, rank, x["state"], x["positions"] + i) for i in range(3)]
    record = record_prefix_steps(steps, x["logits"][:, :3].long(), x["eos"])
    return candidates, candidate_scalars(candidates, x["positions"]), gated_log_probs(logits, candidates.mask), record


def _candidates(x):
    n = len(x["rows"])
    event = CandidateDecisions(
        x["flags"],
        x["rows"],
        x["state"][x["rows"]],
        x["rows"] + 1,
        x["rows"] + 2,
        x["flags"],
        x["steps"].flatten()[:n],
    )
    return record_candidate_decisions([event, event], x["scores"][:, 0])


def _arithmetic(x):
    rewards = step_rewards(x["scores"], torch.zeros_like(x["mask"]).long(), x["mask"], 3)
    advantages, returns = gae(rewards, x["steps"], x["mask"], 0.9, 0.8)
    pair = x["steps"], x["steps"] / 2
    return (
        advantages,
        returns,
        clipped_policy_loss(*pair, advantages, x["mask"], 0.1, 0.2),
        clipped_value_loss(*pair, returns, x["mask"], 0.2),
        approx_kl(*pair, x["mask"]),
        clip_fraction(*pair, x["mask"], 0.1, 0.2),
    )


CALLS = {
    **{
        f"prefix, {proposal}, {mode}": lambda x, proposal=proposal, mode=mode: _prefix(x, proposal, mode)
        for proposal in ("ranked", "sampled")
        for mode in ("relative", "absolute")
    },
    "candidate": _candidates,
    "arithmetic": _arithmetic,
}


@pytest.mark.parametrize("name", CALLS)
def test_tensors_are_made_where_the_inputs_are(name):
    inputs = _tensors(torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = torch.utils._pytree.tree_leaves(CALLS[name](inputs))
    torch.manual_seed(1)
    with torch.device("meta"):
        found = torch.utils._pytree.tree_leaves(CALLS[name](inputs))
    assert len(found) == len(expected) > 1
    for x, y in zip(found, expected, strict=True):
        assert x.device == y.device
        assert torch.equal(x, y)
