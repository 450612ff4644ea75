"""Tests of trl_proxy/modeling.py: gated logits, what trains and what does not, files, and refused input."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin

from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.core.gate import gated_log_probs

FEATURES = ("prefix", "candidate")
KINDS = ("llama", "gpt2", "qwen2")
LENGTHS = (7, 3, 5, 1)
WEIGHTS = "proxy_model.safetensors"


@pytest.fixture
def gated(tiny_lm, with_random_gate):
    """`gated(kind="llama", **config)`: a tiny LM under a gate that both accepts and rejects."""
    return lambda kind="llama", **config: with_random_gate(
        tiny_lm(kind), ProxyConfig(**{"p_t": 0.02, "max_candidates": 6, "pooled_features": False} | config)
    )


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


# `forward`: the closed form as next-token logits


@pytest.mark.parametrize("kind", KINDS)
def test_gated_logits_by_hand(gated, ragged_batch, brute_force, kind):
    """At every position: sums to one, -inf for what is no candidate, else a_k times the earlier rejections."""
    model = gated(kind, threshold=0.4)
    ids = ragged_batch((9,))["input_ids"]
    with torch.no_grad():
        output = model(ids)
        plain = model.lm(ids, output_hidden_states=True)
    assert output.logits.dtype == torch.float32
    assert output.logits.shape == (1, 9, 96)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(1, 9), atol=1e-5, rtol=0)
    embeddings = model.get_input_embeddings().weight
    for i in range(9):
        token_ids, log_probs, _ = brute_force.form_candidates(plain.logits[0, i], model.proxy_config)
        expected, left = torch.zeros(96), 1.0
        for rank, token in enumerate(token_ids):
            gap, position = log_probs[0] - log_probs[rank], i + 1
            scalars = [log_probs[rank] / 4, gap / 4, rank / 16, len(token_ids) / 16, position / 128]
            logit = brute_force.gate_logit(
                model.gate, [plain.hidden_states[-1][0, i], embeddings[token].detach()], scalars
            )
            accept = 1.0 if rank == len(token_ids) - 1 else 1 / (1 + np.exp(0.4 - logit))
            expected[token] = left * accept
            left *= 1 - accept
        torch.testing.assert_close(output.logits[0, i].exp(), expected, atol=1e-5, rtol=0)
        assert (output.logits[0, i][expected == 0] == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_cached_equals_full_forward(gated, ragged_batch, kind, pooled):
    """In two pieces, token by token, and with the last logits alone."""
    model, ids = gated(kind, pooled_features=pooled), ragged_batch((10,))["input_ids"]
    with torch.no_grad():
        full = model(ids).logits.exp()
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1).exp(), full, atol=1e-4, rtol=0)
        step = model(ids[:, :1], use_cache=True)
        for i in range(1, 10):
            step = model(ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0].exp(), full[:, i], atol=1e-4, rtol=0)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits.exp(), full[:, -3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooled", [False, True])
def test_chosen_positions_equal_the_full_forward(gated, ragged_batch, pooled):
    """`logits_to_keep` may also be a tensor of indices, as for every causal LM."""
    model, ids = gated(pooled_features=pooled), ragged_batch((10,))["input_ids"]
    keep = torch.tensor([0, 3, 4])
    with torch.no_grad():
        found = model(ids, logits_to_keep=keep).logits.exp()
        torch.testing.assert_close(found, model(ids).logits[:, keep].exp(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_left_padding_is_irrelevant(gated, ragged_batch, kind, pooled):
    model, prompts = gated(kind, pooled_features=pooled), ragged_batch(LENGTHS)
    with torch.no_grad():
        batch = model(**prompts, position_ids=position_ids(prompts["attention_mask"])).logits.exp()
        for row, length in enumerate(LENGTHS):
            alone = model(prompts["input_ids"][row : row + 1, -length:]).logits[0].exp()
            torch.testing.assert_close(batch[row, -length:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("pooled", [False, True])
def test_left_padding_without_position_ids(gated, ragged_batch, kind, pooled):
    """Rotary positions are relative, and the gate counts its own: the mask alone is enough, cached too."""
    model, prompts = gated(kind, pooled_features=pooled), ragged_batch(LENGTHS)
    mask = prompts["attention_mask"]
    with torch.no_grad():
        batch = model(**prompts).logits.exp()
        first = model(prompts["input_ids"][:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        last = model(prompts["input_ids"][:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(last.logits[:, 0].exp(), batch[:, -1], atol=1e-4, rtol=0)
        for row, length in enumerate(LENGTHS):
            alone = model(prompts["input_ids"][row : row + 1, -length:]).logits[0].exp()
            torch.testing.assert_close(batch[row, -length:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("threshold", "pooled"), [(0.0, False), (0.5, False), (0.0, True)])
def test_greedy_decisions_of_generate_agree_with_forward(gated, ragged_batch, kind, threshold, pooled):
    """Two doors, one function: the first candidate whose conditional accept probability in `forward` is at least one
    half, else the last one, is the token that greedy decisions give."""
    model, prompts = gated(kind, threshold=threshold, pooled_features=pooled), ragged_batch(LENGTHS)
    width = prompts["input_ids"].shape[1]
    output = model.generate(**prompts, max_new_tokens=12, eos_token_id=-1, return_dict_in_generate=True)
    assert output.decisions.rank_sum.sum() > 10
    mask = torch.cat([prompts["attention_mask"], torch.ones(len(LENGTHS), 12, dtype=torch.long)], 1)
    with torch.no_grad():
        position = position_ids(mask)
        gated_p = model(output.sequences, attention_mask=mask, position_ids=position).logits.double().exp()
        lm_logits = model.lm(output.sequences, attention_mask=mask, position_ids=position).logits
    for row in range(len(LENGTHS)):
        for i in range(width, width + 12):
            p = gated_p[row, i - 1]
            order = lm_logits[row, i - 1].argsort(descending=True, stable=True)
            offered = order[p[order] > 0]
            left = 1.0
            for token in offered:
                if p[token] / left >= 0.5 or token == offered[-1]:
                    break
                left -= p[token].item()
            assert token == output.sequences[row, i]


def test_an_engine_that_samples_from_forward(gated, ragged_batch):
    """transformers' own `generate` on the gated logits draws from the closed form: any engine may."""
    n = 5_000
    model, prompt = gated(), ragged_batch((4,))["input_ids"]
    with torch.no_grad():
        p = model(prompt).logits[0, -1].double().exp()
    drawn = GenerationMixin.generate(
        model, prompt.expand(n, -1), attention_mask=torch.ones(n, 4), do_sample=True, top_k=0, max_new_tokens=1
    )[:, 4]
    assert (p[drawn] > 0).all()
    likely = p * n > 5
    assert likely.sum() > 2
    observed = np.append(np.bincount(drawn, minlength=96)[likely], (~likely[drawn]).sum())
    expected = np.append(p[likely], p[~likely].sum()) * n
    assert stats.chisquare(observed[expected > 0], expected[expected > 0] / expected.sum() * n).pvalue > 1e-3


def test_continuous_batching(gated, ragged_batch):
    """transformers' own engine packs the texts of a batch into one row and pages their cache."""
    model = gated("llama", p_t=0.01)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    # By default the engine fills the machine's memory with pages.
    small = {"generation_config": config, "continuous_batching_config": ContinuousBatchingConfig(32, 16, 64)}
    outputs = model.generate_batch(inputs=prompts, **small)
    assert [output.generated_tokens for output in outputs.values()] == expected
    plain = model.lm.generate(torch.tensor(prompts[:1]), generation_config=config)[0, 3:].tolist()
    assert plain != expected[0], "the gate makes a difference"
    with model.disable_proxy():
        (output,) = model.generate_batch(inputs=prompts[:1], **small).values()
    assert output.generated_tokens == plain


@pytest.mark.fault
@pytest.mark.parametrize("options", [{"features": "candidate"}, {"pooled_features": True}])
def test_continuous_batching_is_refused_by_name(gated, options):
    with pytest.raises(ValueError, match="Continuous batching needs a proxy with features='prefix'"):
        gated("llama", **options).generate_batch(inputs=[[5, 6, 7]])


def test_an_engine_that_continues_from_a_cache(gated, ragged_batch):
    """Several sampled tokens in a ragged batch: each has positive probability in a fresh forward of its row."""
    model, prompts = gated(), ragged_batch(LENGTHS)
    out = GenerationMixin.generate(model, **prompts, do_sample=True, top_k=0, max_new_tokens=8, eos_token_id=-1)
    for row, length in enumerate(LENGTHS):
        ids = out[row : row + 1, -length - 8 :]
        with torch.no_grad():
            log_p = model(ids).logits[0, length - 1 : -1].gather(-1, ids[0, length:, None])
        assert log_p.isfinite().all()


def test_loss_is_the_mean_negative_log_probability(gated, ragged_batch):
    model, prompt = gated(), ragged_batch((4,))["input_ids"]
    ids = model.generate(prompt, max_new_tokens=8, eos_token_id=-1)
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = -model(ids).logits[0, 3:-1].gather(-1, ids[0, 4:, None]).mean()
    assert expected.isfinite()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)


def test_gradient_of_the_closed_form_is_that_of_the_decisions(gated, ragged_batch):
    """With respect to the gate's parameters: log pi of a response against the log-probs of its recorded decisions."""
    model, prompt = gated(), ragged_batch((5,))["input_ids"]
    output = model.generate(prompt, max_new_tokens=6, gate_sample=True, eos_token_id=-1, output_rollout=True)
    rollout, response = output.rollout, output.sequences[:, 5:]
    assert rollout.mask.sum() > 6
    parameters = list(model.gate.parameters())

    decided = model(gate_features=model.rollout_features(rollout)).accept_logits
    actions = rollout.accept[rollout.mask].float()
    log_prob = torch.distributions.Bernoulli(logits=decided).log_prob(actions).sum()
    expected = torch.autograd.grad(log_prob, parameters)

    log_pi = model(output.sequences).logits[:, 4:-1].gather(-1, response[..., None]).sum()
    torch.testing.assert_close(log_pi, log_prob, atol=1e-4, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(log_pi, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_cached_features_give_the_gates_opinion(gated, ragged_batch):
    for features in FEATURES:
        model = gated(features=features)
        rollout = model.generate(**ragged_batch(LENGTHS), max_new_tokens=6, output_rollout=True).rollout
        cached = model.rollout_features(rollout)
        calls = []
        hook = model.lm.register_forward_hook(lambda *args: calls.append(1))  # noqa: B023
        output = model(gate_features=cached)
        hook.remove()
        assert not calls, "the LM does not run"
        assert torch.equal(output.accept_logits, model.gate(cached))
        assert torch.equal(output.state_values, model.critic(cached))
        assert output.accept_logits.requires_grad
        assert output.state_values.requires_grad


@pytest.mark.fault
def test_candidate_features_have_no_forward(gated, ragged_batch):
    with pytest.raises(ValueError, match=r"features='candidate' has no next-token distribution"):
        gated(features="candidate")(**ragged_batch(LENGTHS))


# The frozen LM


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", FEATURES)
def test_training_leaves_the_lm_alone(gated, ragged_batch, kind, features):
    """One optimiser step on all that trains: the LM's parameters and logits stay bit for bit, the gate moves."""
    model, prompts = gated(kind, features=features), ragged_batch(LENGTHS)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith(("proxies.default.gate.", "proxies.default.critic.")) for name in trainable)
    assert {name for name, _ in model.proxy.named_parameters("proxies.default")} == set(trainable)
    parameters = {name: p.clone() for name, p in model.lm.named_parameters()}
    with torch.no_grad():
        logits = model.lm(**prompts).logits
    before = model.generate(**prompts, max_new_tokens=8, output_rollout=True)

    model.train()
    assert not model.lm.training, "no dropout in the frozen LM"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    output = model(gate_features=model.rollout_features(before.rollout))
    (output.accept_logits.mean() + output.state_values.mean()).backward()
    assert all(p.grad is None for p in model.lm.parameters())
    optimizer.step()

    assert all(torch.equal(p, parameters[name]) for name, p in model.lm.named_parameters())
    with torch.no_grad():
        assert torch.equal(model.lm(**prompts).logits, logits)
    after = model(gate_features=model.rollout_features(before.rollout))
    assert (after.accept_logits - output.accept_logits).mean() < -0.1
    assert model.generate(**prompts, max_new_tokens=8).tolist() != before.sequences.tolist()


@pytest.mark.parametrize("features", FEATURES)
def test_disable_proxy_is_the_plain_lm(gated, ragged_batch, features):
    model, prompts = gated(features=features), ragged_batch(LENGTHS)
    call = {"max_new_tokens": 8, "do_sample": False}
    expected = model.lm.generate(**prompts, **call)
    gated_tokens = model.generate(**prompts, **call)
    assert gated_tokens.tolist() != expected.tolist()
    with model.disable_proxy():
        assert model.generate(**prompts, **call).tolist() == expected.tolist()
        with model.disable_proxy():
            pass
        with torch.no_grad():
            assert torch.equal(model(**prompts).logits, model.lm(**prompts).logits)
        torch.manual_seed(3)
        sampled = model.generate(**prompts, max_new_tokens=8, do_sample=True, top_k=5)
        torch.manual_seed(3)
        assert sampled.tolist() == model.lm.generate(**prompts, max_new_tokens=8, do_sample=True, top_k=5).tolist()
    assert model.generate(**prompts, **call).tolist() == gated_tokens.tolist()
    with pytest.raises(RuntimeError), model.disable_proxy():
        raise RuntimeError
    assert model.generate(**prompts, **call).tolist() == gated_tokens.tolist()


@pytest.mark.fault
def test_nothing_stays_hooked_to_the_lm(gated, ragged_batch):
    """After `generate` and `forward`, also after an error in the middle, the LM is as it was."""
    for features in FEATURES:
        model = gated(features=features)
        head = model.lm.get_output_embeddings()

        def fail(input_ids, scores):
            if input_ids.shape[1] > 9:
                raise RuntimeError("in the middle")
            return scores

        model.generate(**ragged_batch(LENGTHS), max_new_tokens=4)
        with pytest.raises(RuntimeError, match="in the middle"):
            model.generate(**ragged_batch(LENGTHS), max_new_tokens=8, logits_processor=[fail])
        assert not head._forward_pre_hooks
        assert not head._forward_hooks


@pytest.mark.parametrize(("features", "inputs"), [("prefix", 64 + 64 + 5), ("candidate", 64)])
def test_parameters_are_counted(tiny_lm, capsys, features, inputs):
    lm = tiny_lm()
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features, pooled_features=False, gate_hidden_sizes=[32, 8]))
    one = inputs * 32 + 32 + 32 * 8 + 8 + 8 + 1
    # embedding (tied) + 2 x (q, k, v, o + gate, up, down + 2 norms) + norm
    base = 96 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    assert model.get_nb_trainable_parameters() == (2 * one, base + 2 * one)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {2 * one:,d} || all params: {base + 2 * one:,d}" in printed
    assert f"{100 * 2 * one / (base + 2 * one):.4f}" in printed


@pytest.mark.parametrize("features", FEATURES)
def test_four_bit(four_bit_lm, tiny_lm, ragged_batch, with_random_gate, features):
    """Counted as what the weights stand for; accept-everything is its own greedy decoding; a gate decides on it."""
    prompts = ragged_batch(LENGTHS)
    assert any(type(p).__name__ == "Params4bit" for p in four_bit_lm.parameters())
    model = ProxyModelForCausalLM(four_bit_lm, ProxyConfig(features=features))
    full = ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(features=features))
    assert model.get_nb_trainable_parameters() == full.get_nb_trainable_parameters()
    four_bit_lm(**prompts)  # the first forward may repack the weights
    expected = four_bit_lm.generate(**prompts, max_new_tokens=12, do_sample=False)
    assert model.generate(**prompts, max_new_tokens=12).tolist() == expected.tolist()
    gated_model = with_random_gate(four_bit_lm, ProxyConfig(features=features, p_t=0.01))
    output = gated_model.generate(**prompts, max_new_tokens=12, output_rollout=True)
    assert output.decisions.rank_sum.sum() > 5
    with torch.no_grad():
        logits = four_bit_lm(**prompts).logits
    gated_model(gate_features=gated_model.rollout_features(output.rollout)).accept_logits.sum().backward()
    torch.optim.SGD([p for p in gated_model.parameters() if p.requires_grad], lr=1.0).step()
    with torch.no_grad():
        assert torch.equal(four_bit_lm(**prompts).logits, logits)
    assert gated_model.get_nb_trainable_parameters() == full.get_nb_trainable_parameters()


# Files


@pytest.mark.parametrize("features", FEATURES)
def test_save_and_load_round_trip(gated, tiny_lm, ragged_batch, tmp_path, features):
    model, prompts = gated(features=features, threshold=0.2), ragged_batch(LENGTHS)
    model.save_pretrained(tmp_path / "proxy")
    model.save_pretrained(tmp_path / "proxy")  # over an older one
    assert {path.name for path in (tmp_path / "proxy").iterdir()} == {"proxy_config.json", WEIGHTS}
    saved = load_file(tmp_path / "proxy" / WEIGHTS)
    assert {key.split(".")[0] for key in saved} == {"gate", "critic"}
    assert sum(x.numel() for x in saved.values()) == sum(x.numel() for x in model.proxy.state_dict().values())

    again = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), tmp_path / "proxy")
    assert again.proxy_config == model.proxy_config
    assert not again.training
    ours = again.generate(**prompts, max_new_tokens=12, output_rollout=True)
    theirs = model.generate(**prompts, max_new_tokens=12, output_rollout=True)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    inputs = model.rollout_features(theirs.rollout)
    assert torch.equal(again.gate(inputs), model.gate(inputs))
    assert torch.equal(again.critic(inputs), model.critic(inputs))
    assert all(p.requires_grad for p in again.proxy.parameters())


def test_the_lm_by_name(gated, tiny_lm, ragged_batch, tmp_path):
    model, prompts = gated(), ragged_batch(LENGTHS)
    model.lm.save_pretrained(tmp_path / "lm")
    model.save_pretrained(tmp_path / "proxy")
    again = ProxyModelForCausalLM.from_pretrained(str(tmp_path / "lm"), str(tmp_path / "proxy"), dtype="float32")
    assert again.generate(**prompts, max_new_tokens=8).tolist() == model.generate(**prompts, max_new_tokens=8).tolist()
    saved = ProxyModelForCausalLM(again.lm)
    assert saved.proxy_config.base_model_name_or_path == str(tmp_path / "lm")


def test_what_was_gathered_is_written(gated, tiny_lm, tmp_path):
    """As FSDP and ZeRO-3 have it: this process holds a part of the weights, `state_dict` all of them."""
    model = gated()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.proxy.parameters():
        parameter.data = torch.empty(0)
    model.save_pretrained(tmp_path / "proxy", state_dict=whole)
    again = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), tmp_path / "proxy")
    for name, value in again.proxy.state_dict().items():
        assert torch.equal(value, whole[f"proxies.default.{name}"])


def test_only_the_main_process_writes(gated, tmp_path):
    gated().save_pretrained(tmp_path / "proxy", is_main_process=False)
    assert not (tmp_path / "proxy").exists()


@pytest.fixture
def saved_proxy(gated, tmp_path):
    gated().save_pretrained(tmp_path / "proxy")
    return tmp_path / "proxy"


def edit_config(folder, **values):
    path = folder / "proxy_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"proxy.* is neither a folder nor a hub repository"),
        (lambda folder: (folder / "proxy_config.json").unlink(), r"holds no proxy: proxy_config\.json is missing"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"holds no proxy: proxy_model\.safetensors is missing"),
        (lambda folder: edit_config(folder, hidden_size=128), r"hidden_size=128, this one has 64"),
        (lambda folder: edit_config(folder, embedding_size=32), r"embedding_size=32, this one has 64"),
        (lambda folder: edit_config(folder, features="candidate"), r"proxy_model\.safetensors does not fit"),
        (lambda folder: edit_config(folder, gate_hidden_sizes=[128]), r"proxy_model\.safetensors does not fit"),
        (lambda folder: edit_config(folder, alignment=1.0), r"proxy_config\.json of .* has unknown keys: alignment"),
        (lambda folder: edit_config(folder, p_t=-1), r"`p_t` must be in \(0, 1\], got -1"),
    ],
)
def test_what_does_not_fit_is_named(tiny_lm, gated, saved_proxy, damage, message):
    damage(saved_proxy)
    lm, model = tiny_lm(), gated()
    for load in (
        lambda: ProxyModelForCausalLM.from_pretrained(lm, saved_proxy),
        lambda: model.load_proxy(saved_proxy, "other"),
    ):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.fault
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_weights_are_named(tiny_lm, saved_proxy, share):
    path = saved_proxy / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"proxy_model\.safetensors"):
        ProxyModelForCausalLM.from_pretrained(tiny_lm(), saved_proxy)


@pytest.mark.fault
def test_flipped_bits_in_the_header_are_named(tiny_lm, saved_proxy):
    """Whatever bit of the header flips: a ValueError that names the file, or the very same weights."""
    path = saved_proxy / WEIGHTS
    content, expected = path.read_bytes(), load_file(path)
    header = 8 + int.from_bytes(content[:8], "little")
    model = ProxyModelForCausalLM.from_pretrained(tiny_lm(), saved_proxy)
    raised = 0
    for i in range(header):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        try:
            model.proxy.load_weights(str(path))
        except ValueError as error:
            raised += 1
            assert WEIGHTS in str(error)  # noqa: PT017
        else:
            assert all(torch.equal(x, expected[name]) for name, x in model.proxy.state_dict().items())
    assert raised > 0.5 * header


@pytest.mark.fault
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_flipped_bits_in_the_weights_are_named(tiny_lm, saved_proxy, place):
    """safetensors has no checksum: a proxy that silently decides otherwise is worse than none."""
    path = saved_proxy / WEIGHTS
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + int(place * 10_000) * 4 + 3] ^= 0x40  # the exponent
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"proxy_model\.safetensors"):
        ProxyModelForCausalLM.from_pretrained(tiny_lm(), saved_proxy)


@pytest.mark.fault
def test_the_checkpoint_that_holds_a_damaged_file_too_is_named(gated, saved_proxy, tiny_lm):
    gated().save_pretrained(saved_proxy / "checkpoint-8")
    os.truncate(saved_proxy / WEIGHTS, 1000)
    with pytest.raises(ValueError, match=r"damaged.*; .*checkpoint-8 holds a copy\.$") as error:
        ProxyModelForCausalLM.from_pretrained(tiny_lm(), saved_proxy)
    assert len(str(error.value).splitlines()) == 1
    ProxyModelForCausalLM.from_pretrained(tiny_lm(), saved_proxy / "checkpoint-8")


def test_many_proxies_one_lm(gated, with_random_gate, tiny_lm, ragged_batch, tmp_path):
    prompts = ragged_batch(LENGTHS)
    lm = tiny_lm()
    configs = {
        "harmless": ProxyConfig(p_t=0.02, max_candidates=6),
        "helpful": ProxyConfig(p_t=0.01, features="candidate", gate_hidden_sizes=[32]),
    }
    expected = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = with_random_gate(lm, config, seed=seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = model.generate(**prompts, max_new_tokens=10).tolist()
    model = ProxyModelForCausalLM(lm)
    expected["default"] = lm.generate(**prompts, max_new_tokens=10, do_sample=False).tolist()
    assert len({str(tokens) for tokens in expected.values()}) == 3
    for name in configs:
        model.load_proxy(tmp_path / name, name)
    assert model.active_proxy == "default", "loading does not switch"
    for name in ("harmless", "helpful", "default", "helpful", "harmless"):
        model.set_proxy(name)
        assert model.generate(**prompts, max_new_tokens=10).tolist() == expected[name]
        assert model.proxy_config.features == ("candidate" if name == "helpful" else "prefix")
    with pytest.raises(ValueError, match=r"There is no proxy 'harmful'; loaded: default, harmless, helpful"):
        model.set_proxy("harmful")
    assert model.active_proxy == "harmless"
    model.save_pretrained(tmp_path / "copy")
    again = ProxyModelForCausalLM.from_pretrained(lm, tmp_path / "copy")
    assert again.generate(**prompts, max_new_tokens=10).tolist() == expected["harmless"], "the active one is saved"


@pytest.mark.fault
def test_a_proxy_that_fails_to_load_is_not_there(gated, saved_proxy, ragged_batch):
    """Neither under a new name, untrained, nor in the place of a good one."""
    (saved_proxy / WEIGHTS).write_bytes(b"damaged")
    model, prompts = gated(), ragged_batch(LENGTHS)
    before = model.generate(**prompts, max_new_tokens=8).tolist()
    for name in ("other", "default"):
        with pytest.raises(ValueError, match=WEIGHTS):
            model.load_proxy(saved_proxy, name)
    with pytest.raises(ValueError, match="There is no proxy 'other'"):
        model.set_proxy("other")
    assert model.generate(**prompts, max_new_tokens=8).tolist() == before


def test_new_proxy_takes_its_sizes_from_the_lm(tiny_lm):
    model = ProxyModelForCausalLM(tiny_lm(), ProxyConfig())
    assert (model.proxy_config.hidden_size, model.proxy_config.embedding_size) == (64, 64)
    with pytest.raises(ValueError, match="hidden_size=32, this one has 64"):
        ProxyModelForCausalLM(tiny_lm(), ProxyConfig(hidden_size=32))


# Beams and assistants: by the closed form


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_beams_find_the_most_probable_responses(gated, ragged_batch, kind, pooled):
    """With enough beams, the best of all responses of three tokens, in order and with their log-probabilities."""
    model = gated(kind, max_candidates=4, threshold=0.3, pooled_features=pooled)
    prompts = ragged_batch((6, 3))
    beams = 16
    output = model.generate(
        **prompts,
        num_beams=beams,
        num_return_sequences=4,
        max_new_tokens=3,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, length in enumerate((6, 3)):
        ids = prompts["input_ids"][row : row + 1, -length:]
        scores = {(): 0.0}
        for _ in range(3):
            longer = {}
            for response, score in scores.items():
                with torch.no_grad():
                    log_probs = model(torch.cat([ids, torch.tensor([response], dtype=torch.long)], 1)).logits[0, -1]
                for token in log_probs.isfinite().nonzero()[:, 0].tolist():
                    longer[(*response, token)] = score + log_probs[token].item()
            scores = longer
        assert 4 < len(scores) <= 4 * beams
        best = sorted(scores, key=scores.get, reverse=True)[:4]
        found = output.sequences.view(2, 4, -1)[row, :, -3:].tolist()
        assert found == [list(response) for response in best]
        expected = torch.tensor([scores[response] for response in best])
        torch.testing.assert_close(output.sequences_scores.view(2, 4)[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("how", "pooled"), [("assistant", False), ("assistant", True), ("prompt lookup", False)])
def test_assisted_generation_draws_from_the_closed_form(tiny_lm, gated, ragged_batch, pooled_chisquare, how, pooled):
    """Frequencies of responses of two tokens, whoever drafts them."""
    model = gated(max_candidates=3, p_t=0.2, pooled_features=pooled)
    ids = ragged_batch((5,))["input_ids"]
    ids = torch.cat([ids, ids, ids], 1)  # something to look up
    helper = {"assistant_model": tiny_lm("llama", seed=7)} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    model.generation_config.min_p = 0.9  # of the LM's own sampling, and does not apply
    with torch.no_grad():
        first = model(ids).logits[0, -1].exp()
        expected = {}
        for token in first.nonzero()[:, 0].tolist():
            second = model(torch.cat([ids, torch.tensor([[token]])], 1)).logits[0, -1].exp()
            expected |= {(token, t): (first[token] * second[t]).item() for t in second.nonzero()[:, 0].tolist()}
    assert len(expected) > 3
    counts = dict.fromkeys(expected, 0)
    for _ in range(300):
        response = model.generate(ids, **helper, gate_sample=True, max_new_tokens=2, eos_token_id=None)[0, -2:]
        counts[tuple(response.tolist())] += 1
    assert pooled_chisquare(list(counts.values()), list(expected.values())) > 0.001


def test_assisted_generation_equals_the_lms_where_the_gate_accepts_everything(tiny_lm, ragged_batch):
    lm, ids = tiny_lm(), ragged_batch((7,))["input_ids"]
    model = ProxyModelForCausalLM(lm, ProxyConfig())
    torch.nn.init.constant_(model.gate.mlp[-1].bias, 50.0)
    expected = lm.generate(ids, max_new_tokens=20, do_sample=False)
    drafted = model.generate(ids, assistant_model=tiny_lm("llama", seed=7), gate_sample=True, max_new_tokens=20)
    assert drafted.tolist() == expected.tolist()


# Refused input


@pytest.mark.fault
@pytest.mark.parametrize("features", FEATURES)
def test_refused_by_name(gated, ragged_batch, features):
    model = gated(features=features)
    ids = ragged_batch((5, 5))["input_ids"]
    right_padded = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    of_decisions = {"threshold": 0.5, "temperature": 0.7}
    by_logits = {"prefix": "leave out `threshold`, `temperature`", "candidate": "need a proxy with"}[features]
    bad = [
        ({"num_beams": 2, **of_decisions}, by_logits),
        ({"assistant_model": model.lm, **of_decisions}, by_logits),
        ({"prompt_lookup_num_tokens": 3, **of_decisions}, by_logits),
        ({"attention_mask": right_padded}, "padded on the right: set `tokenizer.padding_side = 'left'`"),
        ({"max_new_tokens": 252}, r"need 257 positions \(5 \+ 252\), the LM has 256"),
        ({"max_length": 257}, r"need 257 positions .*the LM has 256"),
        ({"generation_config": GenerationConfig(max_new_tokens=252)}, "need 257 positions"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"temperature": -1.0}, "`temperature` must be above 0, got -1.0"),
        ({"inputs": None}, "`generate` needs `input_ids`"),
    ]
    calls = []
    hook = model.lm.register_forward_hook(lambda *args: calls.append(1))
    for kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            model.generate(**({"inputs": ids} | kwargs))
    hook.remove()
    assert not calls, "refused before work starts"


@pytest.mark.fault
def test_beams_and_assistants_are_refused_by_name(gated, ragged_batch):
    ids = ragged_batch((5,))["input_ids"]
    model = gated()
    with pytest.raises(ValueError, match="leave out `gate_sample`"):
        model.generate(ids, generation_config=GenerationConfig(num_beams=3), gate_sample=True)
    with pytest.raises(ValueError, match="`proposal` of the proxy be 'ranked'"):
        gated(proposal="sampled").generate(ids, num_beams=3)
    with pytest.raises(ValueError, match="pass `gate_sample=True`"):
        model.generate(ids, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="need a proxy with features='prefix': leave them out"):
        gated(features="candidate").generate(ids, num_beams=2)


@pytest.mark.parametrize("features", FEATURES)
def test_the_last_position_can_be_used(tiny_lm, ragged_batch, features):
    lm = tiny_lm("gpt2")  # learned positions: one more would be an index error
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    prompts = ragged_batch((250, 246))
    expected = lm.generate(**prompts, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert model.generate(**prompts, max_new_tokens=6, eos_token_id=-1).tolist() == expected.tolist()


@pytest.mark.parametrize("features", FEATURES)
def test_the_call_goes_before_the_lms_defaults(gated, ragged_batch, features):
    """A small `max_new_tokens` or one beam at the call is not overruled by the LM's generation configuration."""
    model, prompts = gated(features=features), ragged_batch(LENGTHS)
    expected = model.generate(**prompts, max_new_tokens=1).tolist()
    model.generation_config.max_new_tokens = 500
    model.generation_config.num_beams = 4
    assert model.generate(**prompts, max_new_tokens=1, num_beams=1).tolist() == expected


def test_sampling_options_do_not_apply(gated, ragged_batch):
    """`do_sample` and the truncations change nothing: the candidates take their place."""
    for features in FEATURES:
        model, prompts = gated(features=features), ragged_batch(LENGTHS)
        expected = model.generate(**prompts, max_new_tokens=8).tolist()
        options = {"do_sample": True, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.2}
        assert model.generate(**prompts, max_new_tokens=8, **options).tolist() == expected
        config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, max_new_tokens=8, pad_token_id=0, eos_token_id=2)
        assert model.generate(**prompts, generation_config=config).tolist() == expected
        model.generation_config.update(do_sample=True, top_k=1, top_p=0.1)
        assert model.generate(**prompts, max_new_tokens=8).tolist() == expected


@pytest.mark.fault
def test_no_head_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="has no language modelling head"):
        ProxyModelForCausalLM(tiny_lm().model)


def test_tokenizer_and_models_share_a_vocabulary(tiny_tokenizer, tiny_lm):
    assert len(tiny_tokenizer) == tiny_lm().config.vocab_size == 96
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id) == (0, 1, 2)
    assert tiny_tokenizer.decode(tiny_tokenizer("Hello, world!")["input_ids"]) == "Hello, world!"
    messages = [{"role": "user", "content": "Hi"}]
    chat = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "u:Hi<eos>a:"
    assert gated_log_probs(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).exp().tolist() == [[0.5, 0.5]]


@pytest.mark.fault
@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_the_lm_does_not_have(tiny_lm, layer):
    with pytest.raises(ValueError, match=f"`feature_layers` has {layer}, LlamaForCausalLM has 2 layers: take -3 to 2"):
        ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(feature_layers=[-1, layer]))


@pytest.mark.fault
@pytest.mark.parametrize("layers", [[-1, 2], [0, -3]])
def test_a_layer_by_two_names(tiny_lm, layers):
    with pytest.raises(ValueError, match=f"`feature_layers` {re.escape(str(layers))} names a layer twice"):
        ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(feature_layers=layers))


@pytest.mark.fault
@pytest.mark.parametrize("layers", [[], [1, 1]])
def test_no_layers_and_one_twice(layers):
    with pytest.raises(ValueError, match="`feature_layers` must be one or more layers, none twice"):
        ProxyConfig(feature_layers=layers)


@pytest.mark.fault
def test_pooled_features_need_the_whole_text(gated, ragged_batch):
    """A cache that was filled elsewhere cannot be pooled over; it is said, not guessed."""
    model, ids = gated(pooled_features=True), ragged_batch((6,))["input_ids"]
    with torch.no_grad():
        cache = model.lm(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="this cache was filled elsewhere"):
        model(ids[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="pass no filled `past_key_values`"):
        model.generate(torch.cat([ids, ids[:, :1]], 1), past_key_values=cache, max_new_tokens=2)


def test_pooled_features_with_several_sequences_per_prompt(gated, ragged_batch):
    model, prompts = gated(pooled_features=True), ragged_batch(LENGTHS)
    once = model.generate(**prompts, max_new_tokens=10)
    assert torch.equal(
        model.generate(**prompts, max_new_tokens=10, num_return_sequences=3), once.repeat_interleave(3, 0)
    )
