"""Proxy-RLHF (arXiv 2403.04283) in one file, to learn the method from. It needs torch and transformers alone.

    python scripts/minimal_proxy_rlhf.py                                               # a tiny LM, seconds on a CPU
    python scripts/minimal_proxy_rlhf.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # any chat LM: folder or hub

A frozen language model (LM) proposes tokens. A small proxy accepts or rejects each of them. PPO trains the proxy
alone, on a reward of the finished response. Here the reward counts capital letters.

The sections follow the paper. Comments with a number in brackets mark mistakes that stop no run, but spoil training.
Shapes: B responses, T positions, K candidates of a position, D numbers of a feature, S = T * K, N decisions.
"""

import argparse
import functools
import math
import string
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

PROMPTS = ["How do I bake bread?", "What is a good name for a cat?", "Why is the sea salty?", "Tell me a story."]
RESPONSES, NEW_TOKENS = 16, 16  # responses of a rollout, tokens of a response
P_T, MAX_CANDIDATES, TEMPERATURE = 0.1, 8, 1.0  # proposals
GAMMA, LAMBDA, BETA = 1.0, 0.95, 0.001  # advantages; BETA weighs the KL to the LM
EPOCHS, MINIBATCH, CLIP, VALUE_CLIP, VALUE_COEF, LEARNING_RATE = 4, 64, 0.2, 0.2, 0.5, 3e-3  # PPO


# 1. Candidates (SKAM, first part): the LM proposes what it finds plausible, and no token twice at a position.
def propose(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(B, vocab)` -> token ids, log-probs and a mask of the real candidates, `(B, K)` each, best first."""
    log_probs = (logits.float() / TEMPERATURE).log_softmax(-1)
    log_probs, token_ids = log_probs.topk(min(MAX_CANDIDATES, logits.shape[-1]))
    # p >= p_t * (largest p). The top token always passes, so each position has at least one candidate.
    return token_ids, log_probs, log_probs >= log_probs[:, :1] + math.log(P_T)


def is_last(mask: Tensor) -> Tensor:
    """`(B, K)` bool: the last real candidate of each position."""
    return mask & ~F.pad(mask[:, 1:], (0, 1))


# 2. Features (SKAM, second part): the proxy reads what the LM knows.
NUM_SCALARS = 4


def make_features(hidden: Tensor, embeddings: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """What the proxy reads of each candidate, `(B, K, D)`.

    `hidden (B, H)` is the last hidden state before the candidate: one LM forward serves all candidates of a position.
    `embeddings (B, K, E)` are the candidates' input embeddings. Four scalars follow, each scaled to about one.
    """
    rank = torch.arange(mask.shape[1]).expand_as(log_probs)
    count = mask.sum(-1, keepdim=True).expand_as(log_probs)
    gap = log_probs[:, :1] - log_probs  # to the top token
    scalars = torch.stack([log_probs / 4, gap / 4, rank / 8, count / 8], dim=-1)
    hidden = hidden[:, None].expand(-1, mask.shape[1], -1)
    return torch.cat([hidden.float(), embeddings.float(), scalars], dim=-1)


# 3. The proxy: a gate, which is the policy, and a critic.
class ProxyMLP(nn.Module):
    """LayerNorm of each part -> MLP -> one number, `(..., D)` -> `(...)`. `part_sizes` are H and E."""

    def __init__(self, part_sizes: list[int], bias: float, width: int = 64):
        super().__init__()
        self.part_sizes = part_sizes
        self.mlp = nn.Sequential(nn.Linear(sum(part_sizes) + NUM_SCALARS, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.mlp[-1].weight)  # so a new network returns `bias` for every input
        nn.init.constant_(self.mlp[-1].bias, bias)

    def forward(self, features: Tensor) -> Tensor:
        *parts, scalars = features.split([*self.part_sizes, NUM_SCALARS], dim=-1)
        # Hidden states and embeddings can differ in scale by orders of magnitude.
        parts = [F.layer_norm(part, part.shape[-1:]) for part in parts]
        return self.mlp(torch.cat([*parts, scalars], dim=-1)).squeeze(-1)


class Proxy(nn.Module):
    """The gate gives accept logits, the critic values. A new proxy accepts everything when greedy."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        part_sizes = [lm.config.hidden_size, lm.get_input_embeddings().weight.shape[1]]
        self.gate, self.critic = ProxyMLP(part_sizes, bias=1.0), ProxyMLP(part_sizes, bias=0.0)


# 4. The closed form: the distribution over tokens that the decisions give.
def gated_log_probs(accept_logits: Tensor, mask: Tensor) -> Tensor:
    """`log pi(c_k) = log a_k + sum_{j<k} log(1 - a_j)`, with a_k the probability to accept c_k; all `(B, K)`.

    The probabilities of a position sum to one. Entries outside the mask are -inf.
    """
    log_reject = F.logsigmoid(-accept_logits)
    all_before_rejected = F.pad(log_reject.cumsum(-1)[:, :-1], (1, 0))
    # [1] The last candidate is accepted without asking, so it keeps what is left: its `log a` is zero.
    log_accept = F.logsigmoid(accept_logits).masked_fill(is_last(mask), 0.0)
    return (all_before_rejected + log_accept).masked_fill(~mask, -torch.inf)


# 5. Rollout: the LM proposes, the gate decides.
def decide(accept_logits: Tensor, mask: Tensor, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Offers the candidates of each position in turn, until one is accepted.

    Returns the rank `(B,)` of the accepted candidate, the actions `(B, K)` bool (True accepts), and a mask `(B, K)`
    of the decisions.
    """
    accept = accept_logits >= 0 if greedy else torch.rand_like(accept_logits) < accept_logits.sigmoid()
    undecided, forced = torch.ones_like(mask[:, 0]), is_last(mask)
    rank, asked = torch.zeros_like(undecided, dtype=torch.long), torch.zeros_like(mask)
    for k in range(mask.shape[1]):
        # [2] Only what the gate was asked is a decision: not a forced candidate, and none after an acceptance. Other
        #     entries changed nothing, so PPO must not see them.
        asked[:, k] = undecided & mask[:, k] & ~forced[:, k]
        accepted = undecided & (asked[:, k] & accept[:, k] | forced[:, k])
        rank[accepted] = k
        undecided = undecided & ~accepted
    return rank, accept, asked


def decision_log_probs(accept_logits: Tensor, actions: Tensor) -> Tensor:
    """`log a` of an acceptance, `log(1 - a)` of a rejection; any shape."""
    return F.logsigmoid(torch.where(actions, accept_logits, -accept_logits))


class Rollout(NamedTuple):
    """Responses and their decisions in order. Only entries of `mask` are decisions."""

    tokens: Tensor  # (B, T), EOS to the end once it was accepted
    kl: Tensor  # (B,), sum over the tokens of log pi - log p
    features: Tensor  # (B, S, D)
    actions: Tensor  # (B, S), and so are the rest
    mask: Tensor
    log_probs: Tensor
    values: Tensor


@torch.no_grad()
def rollout(lm: nn.Module, proxy: Proxy, prompt: Tensor, eos_id: int, n: int, greedy: bool = False) -> Rollout:
    """Gated decoding of n responses to one `prompt (1, P)`, so there is no padding."""
    cache = lm(input_ids=prompt[:, :-1], use_cache=True).past_key_values  # reads the prompt once for all responses
    cache.batch_repeat_interleave(n)
    inputs, done, kl, steps = prompt[:, -1:].expand(n, 1), torch.zeros(n, dtype=torch.bool), torch.zeros(n), []
    while len(steps) < NEW_TOKENS and not done.all():
        out = lm(input_ids=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        token_ids, log_probs, mask = propose(out.logits[:, -1])
        embeddings = lm.get_input_embeddings()(token_ids)
        features = make_features(out.hidden_states[-1][:, -1], embeddings, log_probs, mask)
        accept_logits = proxy.gate(features)
        rank, actions, asked = decide(accept_logits, mask, greedy)
        chosen = rank[:, None]
        log_ratio = (gated_log_probs(accept_logits, mask) - log_probs).gather(1, chosen)[:, 0]
        kl = kl + log_ratio.masked_fill(done, 0.0)
        token = token_ids.gather(1, chosen)[:, 0].masked_fill(done, eos_id)
        # [3] EOS is a candidate like any other, and accepting it is a decision. After it there is none.
        asked = asked & ~done[:, None]
        # [4] PPO's ratio is to the gate that made the rollout: these log-probs stay fixed through all epochs.
        old_log_probs = decision_log_probs(accept_logits, actions)
        steps.append((token, features, actions, asked, old_log_probs, proxy.critic(features)))
        done, inputs = done | (token == eos_id), token[:, None]
    tokens, *decisions = (torch.stack(x, dim=1) for x in zip(*steps, strict=True))
    return Rollout(tokens, kl, *(x.flatten(1, 2) for x in decisions))


# 6. Advantages: a step is a decision, not a token.
def decision_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores `(B,)` of the responses -> rewards `(B, S)` of the decisions."""
    # [5] The score is paid at the last decision. The last entry is seldom one, and there the score would be lost.
    is_final = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(is_final, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages `A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}` and returns `A_t + V_t`; all `(B, S)`.

    Entries outside the mask are passed over: t + 1 is the next decision, often one of a later token.
    """
    advantages = torch.zeros_like(values)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + GAMMA * LAMBDA * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages, advantages + values


# 7. PPO: only the gate and the critic have gradients. The features are stored, so the LM does not run here.
def ppo_update(proxy: Proxy, optimizer: torch.optim.Optimizer, batch: Rollout, scores: Tensor) -> None:
    """Several epochs over the N decisions of a rollout."""
    advantages, returns = gae(decision_rewards(scores, batch.mask), batch.values, batch.mask)
    tensors = (batch.features, batch.actions, batch.log_probs, batch.values, advantages, returns)
    features, actions, old_log_probs, old_values, advantages, returns = (x[batch.mask] for x in tensors)
    if len(features) < 2:
        return
    # [6] Whiten over decisions alone, and only the advantages: the critic learns the returns as they are.
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for _ in range(EPOCHS):
        for i in torch.randperm(len(features)).split(MINIBATCH):
            ratio = (decision_log_probs(proxy.gate(features[i]), actions[i]) - old_log_probs[i]).exp()
            clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = -torch.min(ratio * advantages[i], clipped_ratio * advantages[i]).mean()
            values = proxy.critic(features[i])
            clipped = old_values[i] + (values - old_values[i]).clamp(-VALUE_CLIP, VALUE_CLIP)
            value_loss = 0.5 * torch.max((values - returns[i]) ** 2, (clipped - returns[i]) ** 2).mean()
            optimizer.zero_grad()
            (policy_loss + VALUE_COEF * value_loss).backward()
            nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
            optimizer.step()


# 8. Everything together.
class Language(NamedTuple):
    """A frozen LM and its tokens."""

    lm: nn.Module
    encode: Callable[[str], Tensor]  # a prompt -> (1, P)
    decode: Callable[[Tensor], str]  # (T,) -> the text before EOS
    eos_id: int


def tiny_language() -> Language:
    """A random Llama over characters, trained for nothing. A line break is its EOS."""
    torch.manual_seed(2)  # always the same LM
    characters = "\n .?" + string.ascii_letters
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(characters), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    lm = AutoModelForCausalLM.from_config(LlamaConfig(initializer_range=0.2, **sizes, **ids))
    return Language(
        lm.requires_grad_(False).eval(),
        lambda prompt: torch.tensor([[characters.index(c) for c in prompt]]),
        lambda ids: "".join(characters[i] for i in ids.tolist()).split("\n")[0],
        eos_id=0,
    )


def pretrained_language(name_or_path: str) -> Language:
    """Any LM with attention and a chat template, in float32."""
    lm = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)

    def encode(prompt: str) -> Tensor:
        chat, kind = [{"role": "user", "content": prompt}], {"return_tensors": "pt", "return_dict": True}
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, **kind)["input_ids"]

    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return Language(lm.requires_grad_(False).eval(), encode, decode, tokenizer.eos_token_id)


def reward(text: str) -> float:
    """Capital letters per token. Put a reward of your own here."""
    return sum(map(str.isupper, text)) / NEW_TOKENS


def train(language: Language, proxy: Proxy, rollouts: int) -> list[float]:
    """Trains the proxy, one prompt per rollout in turn; returns the mean reward of each rollout."""
    optimizer = torch.optim.Adam(proxy.parameters(), lr=LEARNING_RATE)
    log = []
    for step in range(rollouts):
        prompt = language.encode(PROMPTS[step % len(PROMPTS)])
        batch = rollout(language.lm, proxy, prompt, language.eos_id, RESPONSES)
        rewards = torch.tensor([reward(language.decode(ids)) for ids in batch.tokens])
        # [7] The KL grows as the gate leaves the LM, so it is subtracted.
        ppo_update(proxy, optimizer, batch, rewards - BETA * batch.kl)
        log.append((rewards.mean().item(), batch.kl.mean().item()))
        if (step + 1) % len(PROMPTS) == 0:  # each prompt once
            mean_reward, mean_kl = torch.tensor(log[-len(PROMPTS) :]).mean(0).tolist()
            print(f"rollout {step + 1:3d}   mean reward {mean_reward:.3f}   KL to the LM {mean_kl:6.2f}", flush=True)
    return [mean_reward for mean_reward, _ in log]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny (default), or a folder or hub id of a chat LM")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    language = tiny_language() if args.model == "tiny" else pretrained_language(args.model)
    torch.manual_seed(args.seed)
    proxy, before = Proxy(language.lm), [weight.clone() for weight in language.lm.parameters()]

    train(language, proxy, args.rollouts)

    for prompt in PROMPTS:
        print(f"\n{prompt}")
        for name, some_proxy in (("LM", Proxy(language.lm)), ("gated", proxy)):  # a new proxy is the LM itself
            batch = rollout(language.lm, some_proxy, language.encode(prompt), language.eos_id, n=1, greedy=True)
            answer = language.decode(batch.tokens[0])
            print(f"  {name:5} (reward {reward(answer):.3f}): {answer!r}")
    # [8] What the method promises: only the proxy has changed.
    if not all(map(torch.equal, before, language.lm.parameters())):
        raise RuntimeError("The weights of the LM have changed.")
    print("\nThe weights of the LM are unchanged.")


if __name__ == "__main__":
    main()
