"""A whole step of PPO as slowly and plainly as it can be written, to compare the trainers with.

One response and one action at a time, in float64, from what a rollout recorded to what its updates do: scores, group
baseline, shaping, prices, advantages, whitening, losses, slopes, metrics. Nothing of TRL or `trl_proxy` is used. An
action is a decision of the gate, or a token if the LM itself is trained. `options` holds the settings by their names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Action:
    """One step of a response. What the rollout has recorded comes first, what the twin computes later."""

    position: int = 0  # tokens of the response written before it
    accept: bool = True
    inputs: torch.Tensor | None = None  # what the gate reads, see `normalise`
    scalars: list[float] = field(default_factory=list)
    lm_log_prob: float = 0.0  # of the frozen LM for the token written here, at the last decision of a position
    text: list[int] = field(default_factory=list)  # if the LM is trained: prompt and response
    index: int = 0  # of the token in it

    log_prob: float = 0.0  # of the policy that made the rollout
    value: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    learned_advantage: float = 0.0  # whitened if the options say so
    value_target: float = 0.0


@dataclass
class Response:
    """A response with its actions.

    Attributes:
        rewards: after how many tokens -> what each function returned, None for "does not apply". The key None is the
            finished response.
        counts: any numbers of the record of its generation, such as `tokens`.
    """

    ended: bool
    rewards: dict[int | None, list[float | None]]
    actions: list[Action]
    counts: dict[str, float]
    all_actions: list[Action] = field(default_factory=list)  # also if it was cut off and has nothing to learn from


def standardise(rollout: list[Response]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the gate's input over all decisions of a rollout."""
    rows = [action.inputs for response in rollout for action in response.actions]
    mean = sum(rows) / len(rows)
    deviation = (sum((row - mean) ** 2 for row in rows) / len(rows)).sqrt()
    return mean, torch.tensor([max(x, 1e-3) for x in deviation.tolist()], dtype=torch.float64)


def normalise(parts: list[torch.Tensor]) -> torch.Tensor:
    """LayerNorm of each part of the gate's input by itself."""
    centred = [part.double() - part.double().mean() for part in parts]
    return torch.cat([part / (part.square().mean() + 1e-5).sqrt() for part in centred])


@dataclass
class Network:
    """The gate or the critic, in float64: its moments, then weights and biases of its linear layers."""

    mean: torch.Tensor
    deviation: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, actions: list[Action]) -> torch.Tensor:
        scalars = torch.tensor([action.scalars for action in actions], dtype=torch.float64)
        parts = (torch.stack([action.inputs for action in actions]) - self.mean) / self.deviation
        x = torch.cat([parts, scalars], dim=1)
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight.T + bias
            if i < len(self.layers) - 1:
                x = torch.where(x > 0, x, 0.0)
        return x[:, 0]


def judge(gate: Network, critic: Network, threshold: float) -> Callable:
    """`evaluate(actions)` -> log-probabilities and entropies of their decisions, and the values of their states."""

    def evaluate(actions: list[Action]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not actions:
            return (torch.zeros(0, dtype=torch.float64),) * 3
        accept = 1 / (1 + (threshold - gate(actions)).exp())
        reject = 1 - accept
        entropies = -accept * accept.log() - reject * reject.log()
        accepted = torch.tensor([action.accept for action in actions])
        return torch.where(accepted, accept, reject).log(), entropies, critic(actions)

    return evaluate


def score(response: Response, after: int | None, options: dict) -> float:
    """The weighted sum of the rewards after so many tokens, None for the finished response."""
    pairs = zip(options["reward_weights"], response.rewards[after], strict=True)
    total = sum(weight * reward for weight, reward in pairs if reward is not None)
    if after is None and not response.ended:
        total -= options["missing_eos_penalty"] or 0.0
    if options["reward_clip_range"]:
        low, high = options["reward_clip_range"]
        total = min(max(total, low), high)
    return total


def scores_of_group(group: list[Response], after: int | None, options: dict) -> list[float]:
    """The scores of a prompt's responses, each less the mean of the others."""
    scores = [score(response, after, options) for response in group]
    if options["group_baseline"] and len(group) > 1:
        return [x - sum(scores[:i] + scores[i + 1 :]) / (len(group) - 1) for i, x in enumerate(scores)]
    return scores


def score_rollout(rollout: list[Response], options: dict, evaluate: Callable, training: bool = True) -> None:
    """Fills in what an update needs of every action, from the policy and the critic that made the rollout. The
    responses of a prompt follow each other."""
    every = options["reward_shaping_tokens"] if training else None
    for start in range(0, len(rollout), options["group"]):
        group = rollout[start : start + options["group"]]
        final = scores_of_group(group, None, options)
        for i, response in enumerate(group):

            def score_before(action: Action, group=group, i=i) -> float:
                written = action.position // every * every if every else 0
                return scores_of_group(group, written, options)[i] if written else 0.0

            log_probs, _, values = evaluate(response.actions)
            for action, log_prob, value in zip(response.actions, log_probs.tolist(), values.tolist(), strict=True):
                action.log_prob, action.value = log_prob, value
            response.all_actions = response.actions
            if options["mask_truncated_completions"] and not response.ended:
                response.actions = []
            for t, action in enumerate(response.actions):
                is_last = t == len(response.actions) - 1
                after = final[i] if is_last else score_before(response.actions[t + 1])
                action.reward = after - score_before(action) + price(action, options)
            estimate_advantages(response.actions, options["gamma"], options["gae_lambda"])
    advantages = [action.advantage for response in rollout for action in response.actions]
    mean = sum(advantages) / max(len(advantages), 1)
    deviation = math.sqrt(variance(advantages) + 1e-8)
    for action in (action for response in rollout for action in response.actions):
        whiten = options["normalize_advantages"]
        action.learned_advantage = (action.advantage - mean) / deviation if whiten else action.advantage


def price(action: Action, options: dict) -> float:
    """What a decision pays besides the score: `beta` times the log-ratio to the LM, `lm_logp_coef` times the LM's."""
    return -options["beta"] * (action.log_prob - action.lm_log_prob) + options["lm_logp_coef"] * action.lm_log_prob


def estimate_advantages(actions: list[Action], gamma: float, gae_lambda: float) -> None:
    """A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})."""
    for t, action in enumerate(actions):
        action.advantage = 0.0
        for k, later in enumerate(actions[t:]):
            next_value = actions[t + k + 1].value if t + k + 1 < len(actions) else 0.0
            action.advantage += (gamma * gae_lambda) ** k * (later.reward + gamma * next_value - later.value)
        action.value_target = action.advantage + action.value


@dataclass
class Update:
    """What an optimizer's step does with actions.

    Attributes:
        metrics: what is logged of it.
        slopes: the loss derived by each log-probability, entropy and value, `(N,)` each.
    """

    metrics: dict[str, float]
    slopes: list[torch.Tensor]


def update(actions: list[Action], options: dict, log_probs, entropies, values) -> Update:
    """The loss is the mean over all actions of the step; `log_probs`, `entropies`, `values` are those of now."""
    low, high = 1 - options["epsilon"], 1 + (options["epsilon_high"] or options["epsilon"])
    most, count = options["cliprange_value"], max(len(actions), 1)
    sums = dict.fromkeys(("loss/policy", "loss/value", "entropy", "approx_kl", "clip_ratio"), 0.0)
    slopes = []
    for action, log_prob, entropy, value in zip(actions, log_probs, entropies, values, strict=True):
        ratio = math.exp(log_prob - action.log_prob)
        plain = ratio * action.learned_advantage
        clipped = min(max(ratio, low), high) * action.learned_advantage
        sums["loss/policy"] -= min(plain, clipped)

        near = action.value + min(max(value - action.value, -most), most)
        error, near_error = (value - action.value_target) ** 2, (near - action.value_target) ** 2
        sums["loss/value"] += max(error, near_error) / 2

        sums["entropy"] += entropy
        sums["approx_kl"] += ratio - 1 - (log_prob - action.log_prob)
        sums["clip_ratio"] += not low <= ratio <= high
        follows = error > near_error or abs(value - action.value) <= most
        slope = value - action.value_target if follows else 0.0
        slopes.append([-plain if plain <= clipped else 0.0, -options["entropy_coef"], options["vf_coef"] * slope])
    metrics = {name: total / count for name, total in sums.items()}
    metrics["loss"] = metrics["loss/policy"] + options["vf_coef"] * metrics["loss/value"]
    metrics["loss"] -= options["entropy_coef"] * metrics["entropy"]
    return Update(metrics, list(torch.tensor(slopes, dtype=torch.float64).view(-1, 3).T / count))


def rollout_metrics(rollout: list[Response]) -> dict[str, float]:
    """What is logged of a scored rollout."""
    actions = [action for response in rollout for action in response.actions]
    targets = [action.value_target for action in actions]
    errors = [action.value_target - action.value for action in actions]
    tokens = sum(response.counts["tokens"] for response in rollout)
    all_actions = [action for response in rollout for action in response.all_actions]
    metrics = {
        "value/mean": sum(action.value for action in actions) / max(len(actions), 1),
        "completions/mean_length": tokens / len(rollout),
        "completions/clipped_ratio": sum(not response.ended for response in rollout) / len(rollout),
    }
    if variance(targets) > 1e-6 + 0.01 * variance(errors):  # else rounding decides about the quotient
        metrics["explained_variance"] = 1 - variance(errors) / variance(targets)
    if "token_log_prob" not in rollout[0].counts:  # the LM's tokens are the actions
        log_ratios = [action.log_prob - action.lm_log_prob for action in actions]
        return {**metrics, "kl": sum(log_ratios) / max(len(actions), 1)}
    of_lm = sum(response.counts["token_log_prob"] for response in rollout)
    return {
        **metrics,
        "kl": (sum(action.log_prob for action in all_actions) - of_lm) / tokens,
        "accept_rate": sum(action.accept for action in all_actions) / max(len(all_actions), 1),
        "decisions_per_token": len(all_actions) / tokens,
        "accepted_rank": sum(response.counts["rank_sum"] for response in rollout) / tokens,
        "lm_logp_per_token": of_lm / tokens,
    }


def variance(values: list[float]) -> float:
    """The mean squared distance from the mean; 0 of nothing."""
    mean = sum(values) / max(len(values), 1)
    return sum((x - mean) ** 2 for x in values) / max(len(values), 1)


def reward_metrics(rollout: list[Response], options: dict, names: list[str]) -> dict[str, float]:
    """TRL's metrics of the rewards of finished responses."""
    metrics = {}
    for i, name in enumerate(names):
        given = [response.rewards[None][i] for response in rollout if response.rewards[None][i] is not None]
        if given:
            metrics[f"rewards/{name}/mean"] = sum(given) / len(given)
    totals = []
    for response in rollout:
        pairs = zip(options["reward_weights"], response.rewards[None], strict=True)
        totals.append(sum(weight * reward for weight, reward in pairs if reward is not None))
    metrics["reward"] = sum(totals) / len(totals)
    return metrics
