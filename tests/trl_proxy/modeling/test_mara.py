"""trl_proxy/mara.py: an actor of MARA's file format gives its own probabilities as a proxy."""

import os

import pytest
import torch
from torch import nn

from trl_proxy import ProxyModelForCausalLM
from trl_proxy.modeling.mara import load_mara_actor


class Actor(nn.Module):
    """As arXiv 2505.19743 describes it, with its authors' names for the layers."""

    def __init__(self, state_size: int, hidden: tuple[int, int] = (1024, 256), actions: int = 2):
        super().__init__()
        self.ln = nn.LayerNorm(state_size)
        self.linear1 = nn.Linear(state_size, hidden[0])
        self.linear2 = nn.Linear(hidden[0], hidden[1])
        self.output_linear = nn.Linear(hidden[1], actions)
        nn.init.normal_(self.ln.weight)
        nn.init.normal_(self.ln.bias)

    def forward(self, state):
        hidden = self.linear2(self.linear1(self.ln(state)).relu()).relu()
        return self.output_linear(hidden).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_probabilities_are_the_gates(tiny_lm, ragged_batch, tmp_path, dtype):
    actor = Actor(64).to(dtype)
    torch.save(actor.state_dict(), tmp_path / "actor.pth")
    lm = tiny_lm("llama")
    model = load_mara_actor(lm, tmp_path / "actor.pth", p_t=0.01, max_candidates=6)
    output = model.generate(**ragged_batch((5, 2, 7)), max_new_tokens=12, output_rollout=True)
    rollout = output.rollout
    states = model.rollout_features(rollout)
    with torch.no_grad():
        expected = actor.float()(states)
    torch.testing.assert_close(model.gate(states).sigmoid(), expected[:, 1], rtol=1e-4, atol=1e-5)
    accept = rollout.accept[rollout.mask]
    assert {True, False} == set(accept.tolist())
    sure = (expected[:, 1] - 0.5).abs() > 1e-4
    assert torch.equal(accept[sure], (expected.argmax(-1) == 1)[sure])
    assert model.proxy_config.p_t == 0.01

    model.save_pretrained(tmp_path / "proxy")
    again = ProxyModelForCausalLM.from_pretrained(lm, tmp_path / "proxy")
    assert torch.equal(again.gate(states), model.gate(states))


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        (b"", "is not a state dict that can be read safely"),
        (b"not a checkpoint", "is not a state dict that can be read safely"),
        (_Runs(), "is not a state dict that can be read safely"),
        ([1.0], "is not a MARA actor: it needs linear1.bias, .*, and has list"),
        ({"linear1.weight": torch.zeros(2, 2)}, "is not a MARA actor: .* and has linear1.weight"),
        (Actor(32).state_dict(), "an actor for hidden states of 32 with 2 actions; this LM has 64"),
        (Actor(64, actions=3).state_dict(), "with 3 actions"),
    ],
)
def test_other_files_are_refused(tiny_lm, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "actor.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_mara_actor(tiny_lm("llama"), path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "ran").exists(), "no code of the file ran"
