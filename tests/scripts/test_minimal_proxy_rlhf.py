"""scripts/minimal_proxy_rlhf.py: it learns, and each piece is what the package's own piece is."""

import ast
from pathlib import Path

import pytest
import torch

from trl_proxy.core import candidates, features, gate
from trl_proxy.trainer import advantages, losses

SCRIPT = Path(__file__).parents[2] / "scripts" / "minimal_proxy_rlhf.py"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("minimal_proxy_rlhf")


@pytest.fixture
def language(script):
    return script.tiny_language()


def scattered_proxy(script, language, scale=3.0):
    """A proxy whose gate both accepts and rejects."""
    proxy = script.Proxy(language.lm)
    for network in (proxy.gate, proxy.critic):
        torch.nn.init.normal_(network.mlp[-1].weight, std=scale / 8)
        torch.nn.init.zeros_(network.mlp[-1].bias)
    return proxy


def some_candidates(rows, k=6):
    """Accept logits `(rows, k)` and masks of 1 to k candidates."""
    mask = torch.arange(k) < torch.randint(1, k + 1, (rows, 1))
    return 2 * torch.randn(rows, k), mask


def test_it_imports_nothing_but_torch_and_transformers():
    imports = [x for x in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))) if hasattr(x, "names")]
    roots = {(getattr(x, "module", None) or x.names[0].name).split(".")[0] for x in imports}
    assert roots <= {"argparse", "collections", "functools", "math", "string", "typing", "torch", "transformers"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises_and_the_lm_stays(script, language, seed):
    before = {name: weight.clone() for name, weight in language.lm.state_dict().items()}
    torch.manual_seed(seed)
    proxy = script.Proxy(language.lm)
    means = script.train(language, proxy, rollouts=20)
    assert sum(means[-4:]) / 4 > sum(means[:4]) / 4 + 0.2
    assert all(torch.equal(weight, before[name]) for name, weight in language.lm.state_dict().items())
    assert all(weight.grad is None for weight in language.lm.parameters())
    assert all(weight.grad is not None for weight in proxy.parameters())


def test_main_ends_with_both_answers(script, capsys):
    script.main(["--rollouts", "4"])
    first, *answers, last = capsys.readouterr().out.splitlines()
    assert first.startswith("rollout   4   mean reward 0.")
    found = [line.split(" (")[0].split(":")[0] for line in answers]
    assert found == [line for prompt in script.PROMPTS for line in ("", prompt, "  LM   ", "  gated")] + [""]
    assert last == "The weights of the LM are unchanged."


def test_main_sees_a_change_of_the_lm(script, monkeypatch):
    def train(language, proxy, rollouts):
        with torch.no_grad():
            weight = language.lm.get_input_embeddings().weight
            weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))

    monkeypatch.setattr(script, "train", train)
    with pytest.raises(RuntimeError, match="have changed"):
        script.main([])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_candidates_are_the_packages(script, monkeypatch, temperature):
    monkeypatch.setattr(script, "TEMPERATURE", temperature)
    logits = 2 * torch.randn(200, 30)
    token_ids, log_probs, mask = script.propose(logits)
    expected = candidates.propose(logits, script.P_T, max_candidates=script.MAX_CANDIDATES, temperature=temperature)
    assert torch.equal(mask, expected.mask)
    assert torch.equal(token_ids[mask], expected.token_ids[mask])
    torch.testing.assert_close(log_probs[mask], expected.log_probs[mask])
    assert set(mask.sum(-1).tolist()) >= {1, 2, 3, 4}


def test_features_are_the_packages(script):
    token_ids, log_probs, mask = script.propose(2 * torch.randn(20, 30))
    hidden, embeddings = torch.randn(20, 5), torch.randn(20, 8, 3)
    found = script.make_features(hidden, embeddings, log_probs, mask)
    expected = features.candidate_scalars(candidates.Candidates(token_ids, log_probs, mask), torch.zeros(20).long())
    torch.testing.assert_close(found[..., 8:], expected[..., :4] * torch.tensor([1.0, 1.0, 2.0, 2.0]))
    assert torch.equal(found[:, 3, :5], hidden)
    assert torch.equal(found[..., 5:8], embeddings)


def test_the_closed_form_is_the_packages_and_sums_to_one(script):
    accept_logits, mask = some_candidates(200)
    accept_logits[:50] *= 20
    log_probs = script.gated_log_probs(accept_logits, mask)
    torch.testing.assert_close(log_probs, gate.gated_log_probs(accept_logits, mask))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(200))


def test_the_closed_form_is_what_the_loop_draws(script, pooled_chisquare):
    accept_logits, mask = some_candidates(8)
    mask[:, :4] = True
    for row_logits, row_mask in zip(accept_logits, mask):
        draws = 20_000
        rank, actions, asked = script.decide(row_logits.expand(draws, -1), row_mask.expand(draws, -1), greedy=False)
        probabilities = script.gated_log_probs(row_logits[None], row_mask[None])[0].exp()
        count = int(row_mask.sum())
        observed = rank.bincount(minlength=len(row_mask))
        assert observed[count:].sum() == 0
        assert pooled_chisquare(observed[:count], probabilities[:count]) > 1e-4
        # The decisions of a path are its token's probability.
        taken = (script.decision_log_probs(row_logits, actions) * asked).sum(-1)
        torch.testing.assert_close(taken, probabilities.log()[rank])


def test_forced_candidates_and_what_comes_after_acceptance_are_no_decisions(script):
    accept_logits, mask = some_candidates(500)
    for greedy in (False, True):
        rank, actions, asked = script.decide(accept_logits, mask, greedy)
        assert not (asked & script.is_last(mask)).any()
        assert not asked[mask.sum(-1) == 1].any()
        for i in range(len(mask)):
            count, answers = int(mask[i].sum()), actions[i].tolist()
            first = answers.index(True) if True in answers[: count - 1] else count - 1
            assert rank[i] == first
            assert asked[i].tolist() == [k <= first and k < count - 1 for k in range(mask.shape[-1])]
        assert set(rank.tolist()) >= {0, 1, 2, 3}


def test_a_new_gate_decodes_as_the_lm(script, language):
    proxy, found = script.Proxy(language.lm), set()
    for prompt in map(language.encode, script.PROMPTS):
        batch = script.rollout(language.lm, proxy, prompt, language.eos_id, 1, greedy=True)
        generated = language.lm.generate(prompt, do_sample=False, max_new_tokens=script.NEW_TOKENS)
        assert batch.tokens[0].tolist() == generated[0, prompt.shape[1] :].tolist()
        assert batch.actions.all()
        found.add(tuple(batch.tokens[0].tolist()))
    assert len(found) > 1


def test_a_rollout_matches_the_lm_without_a_cache(script, language):
    """Its decisions, recomputed from the finished responses: tokens, EOS, log-probs and the KL."""
    proxy = scattered_proxy(script, language)
    prompt = language.encode(script.PROMPTS[1])
    batch = script.rollout(language.lm, proxy, prompt, language.eos_id, 64)
    length = batch.tokens.shape[1]
    fields = [x.view(64, length, -1) for x in (batch.actions, batch.mask, batch.log_probs, batch.values)]
    done, kl = torch.zeros(64, dtype=torch.bool), torch.zeros(64)
    for t in range(length):
        ids = torch.cat([prompt.expand(64, -1), batch.tokens[:, :t]], dim=1)
        with torch.no_grad():
            out = language.lm(ids, output_hidden_states=True)
            token_ids, log_probs, mask = script.propose(out.logits[:, -1])
            embeddings = language.lm.get_input_embeddings()(token_ids)
            features = script.make_features(out.hidden_states[-1][:, -1], embeddings, log_probs, mask)
            accept_logits, values = proxy.gate(features), proxy.critic(features)
        actions, asked, old, old_values = (x[:, t] for x in fields)
        assert not asked[done].any()
        assert (batch.tokens[done, t] == language.eos_id).all()
        rank = ((actions & mask) | script.is_last(mask)).int().argmax(-1)
        open_ = ~done
        assert torch.equal(token_ids[torch.arange(64), rank][open_], batch.tokens[open_, t])
        torch.testing.assert_close(old[asked], script.decision_log_probs(accept_logits, actions)[asked])
        torch.testing.assert_close(old_values[asked], values[asked])
        log_ratio = (script.gated_log_probs(accept_logits, mask) - log_probs)[torch.arange(64), rank]
        kl += log_ratio * open_
        done |= batch.tokens[:, t] == language.eos_id
    torch.testing.assert_close(batch.kl, kl, rtol=1e-4, atol=1e-4)
    assert 5 < done.sum() < 64  # some end early, some do not
    assert batch.mask.any(1).all()


def test_the_reward_is_paid_at_the_last_decision(script):
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 0, 0, 2.0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 4.0]])
    assert torch.equal(script.decision_rewards(torch.tensor([2.0, 3.0, 4.0]), mask), expected)


def test_advantages_are_the_packages(script, monkeypatch):
    mask = torch.rand(20, 12) < 0.6
    rewards, values = torch.randn(20, 12) * mask, torch.randn(20, 12)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.7)):
        monkeypatch.setattr(script, "GAMMA", gamma)
        monkeypatch.setattr(script, "LAMBDA", lam)
        found, expected = script.gae(rewards, values, mask), advantages.gae(rewards, values, mask, gamma, lam)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a[mask], b[mask])


def test_the_update_is_the_packages(script, language, monkeypatch):
    """Two epochs of one minibatch each, with the package's losses; in the second the ratios are not one any more."""
    monkeypatch.setattr(script, "MINIBATCH", 10_000)
    monkeypatch.setattr(script, "EPOCHS", 2)
    proxy, clone = scattered_proxy(script, language), script.Proxy(language.lm)
    clone.load_state_dict(proxy.state_dict())
    prompt = language.encode(script.PROMPTS[0])
    batch = script.rollout(language.lm, proxy, prompt, language.eos_id, 8)
    batch = batch._replace(values=batch.values + 0.3 * torch.randn_like(batch.values))  # some are clipped
    scores, mask, clipped = torch.randn(8), batch.mask, []
    script.ppo_update(proxy, torch.optim.SGD(proxy.parameters(), lr=0.5), batch, scores)

    optimizer = torch.optim.SGD(clone.parameters(), lr=0.5)
    rewards = script.decision_rewards(scores, mask)
    adv, returns = advantages.gae(rewards, batch.values, mask, script.GAMMA, script.LAMBDA)
    adv = torch.where(mask, (adv - adv[mask].mean()) / adv[mask].std(), 0.0)
    for _ in range(2):
        new = script.decision_log_probs(clone.gate(batch.features), batch.actions)
        policy = losses.clipped_policy_loss(new, batch.log_probs, adv, mask, script.CLIP, script.CLIP)
        values = clone.critic(batch.features)
        value = losses.clipped_value_loss(values, batch.values, returns, mask, script.VALUE_CLIP)
        clipped.append(losses.clip_fraction(new, batch.log_probs, mask, script.CLIP, script.CLIP))
        optimizer.zero_grad()
        (policy + script.VALUE_COEF * value).backward()
        torch.nn.utils.clip_grad_norm_(clone.parameters(), 1.0)
        optimizer.step()
    assert clipped[0] == 0
    assert clipped[1] > 0.05
    for a, b in zip(proxy.parameters(), clone.parameters()):
        torch.testing.assert_close(a, b)


def test_the_kl_is_subtracted(script, language, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "ppo_update", lambda proxy, optimizer, batch, scores: seen.append((batch, scores)))
    script.train(language, scattered_proxy(script, language), rollouts=1)
    batch, scores = seen[0]
    rewards = torch.tensor([script.reward(language.decode(ids)) for ids in batch.tokens])
    assert batch.kl.mean() > 0.5
    torch.testing.assert_close(scores, rewards - script.BETA * batch.kl)


def test_a_text_ends_before_eos(script, language):
    ids = language.encode("How?")[0]
    assert language.decode(ids) == "How?"
    assert language.decode(torch.cat([ids[:3], torch.full((2,), language.eos_id)])) == "How"


def test_any_causal_lm_with_a_chat_template(script, tiny_lm, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    tiny_lm("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(script, "RESPONSES", 4)
    script.main(["--model", str(tmp_path), "--rollouts", "4"])
    assert capsys.readouterr().out.endswith("The weights of the LM are unchanged.\n")
