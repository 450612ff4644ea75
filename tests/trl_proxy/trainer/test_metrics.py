"""Metrics of an evaluation are over its rows, whatever the batches; two processes are in tests/test_scale.py."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from baselines.grpo import GuardedGRPOConfig, GuardedGRPOTrainer
from baselines.rloo import GuardedRLOOConfig, GuardedRLOOTrainer
from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.trainer.metrics import metrics_of_ends

KINDS = {
    "proxy": (ProxyPPOTrainer, ProxyPPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
    "rloo": (GuardedRLOOTrainer, GuardedRLOOConfig),
    "grpo": (GuardedGRPOTrainer, GuardedGRPOConfig),
}
# Of one clock, not of the rows.
TIMES = ("per_second", "runtime", "preparation_time")


@pytest.fixture
def trainer_of(tmp_path, tiny_lm, tiny_tokenizer, with_random_gate):
    """`trainer_of(kind, rewards, batch_size, **config)` -> a trainer on prompts that are worth `rewards`, and a list
    that gets what is scored: prompt, completion, reward."""

    def build(kind, rewards, batch_size=4, eos_token="<eos>", **config):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.eos_token = eos_token
        trainer_class, config_class = KINDS[kind]
        scored = []

        def worth(prompts, completions, value, log_metric, **kwargs):
            scored.extend(zip(prompts, completions, value, strict=True))
            log_metric("of_a_batch", float(np.mean(value)))
            return value

        def sometimes(prompts, completions, value, **kwargs):
            return [x if x else None for x in value]

        torch.manual_seed(0)
        lm = tiny_lm("llama")
        model, extra = lm, {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
        if kind == "proxy":
            model, extra = with_random_gate(lm, ProxyConfig(p_t=0.001, gate_hidden_sizes=[8])), {}
        rows = Dataset.from_dict({"prompt": [f"{chr(97 + i)}{i} " for i in range(len(rewards))], "value": rewards})
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": batch_size,
            "num_generations": 2,
            "num_generations_eval": 1,
            "max_completion_length": 6,
            "report_to": [],
            "disable_tqdm": True,
            **config,
        }
        trainer = trainer_class(
            model=model,
            reward_funcs=[worth, sometimes],
            args=config_class(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
            **extra,
        )
        return trainer, scored

    return build


@pytest.fixture
def evaluate(trainer_of):
    """`evaluate(kind, rewards, batch_size, **config)` -> the metrics of prompts that are worth `rewards`, and what was
    scored."""

    def run(kind, rewards, batch_size=4, streamed=False, **config):
        trainer, scored = trainer_of(kind, rewards, batch_size, **config)
        rows = trainer.train_dataset
        evaluated = IterableDataset.from_generator(lambda: iter(rows)) if streamed else rows
        metrics = trainer.evaluate(evaluated)
        assert {k: v for k, v in trainer.state.log_history[-1].items() if k.startswith("eval_rew")} == {
            k: v for k, v in metrics.items() if k.startswith("eval_rew")
        }
        return metrics, scored

    return run


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_over_the_prompts(evaluate, kind, streamed):
    """Four of them in the first batch, one in the second."""
    rewards = [0.0, 0.0, 0.0, 0.0, 10.0]
    metrics, scored = evaluate(kind, rewards, streamed=streamed)
    assert len(scored) == 5
    assert metrics["eval_reward"] == pytest.approx(2 * np.mean(rewards))  # the second reward is the same where it is
    assert metrics["eval_reward_std"] == pytest.approx(2 * np.std(rewards, ddof=1))
    assert metrics["eval_rewards/worth/mean"] == pytest.approx(np.mean(rewards))
    assert metrics["eval_rewards/worth/std"] == pytest.approx(np.std(rewards, ddof=1))
    assert metrics["eval_rewards/sometimes/mean"] == pytest.approx(10.0)  # of the rows that it applies to
    lengths = [len(text) for _, text, _ in scored]
    assert metrics["eval_completions/max_length"] <= 6
    assert metrics["eval_completions/mean_length"] >= np.mean(lengths)  # without an end of sequence they are the same
    assert metrics["eval_completions/mean_length"] <= np.mean(lengths) + 1


def test_responses_that_were_cut_off_have_no_end():
    lengths, cut = torch.tensor([3.0, 5.0, 9.0, 2.0]), torch.tensor([False, True, False, True])
    found = {name.removeprefix("completions/"): float(x) for name, x in metrics_of_ends(lengths, cut).items()}
    ended = {"mean_terminated_length": 6.0, "min_terminated_length": 3.0, "max_terminated_length": 9.0}
    assert found == {**ended, "clipped_ratio": 0.5}
    found = metrics_of_ends(lengths, torch.ones(4, dtype=torch.bool))
    assert [float(found[f"completions/{name}"]) for name in ended] == [0.0, 0.0, 0.0]
    assert float(found["completions/clipped_ratio"]) == 1.0


@pytest.mark.parametrize("kind", ["proxy", "ppo"])
@pytest.mark.parametrize("changes", [{}, {"num_generations_eval": 2}, {"beta": 0.1}, {"normalize_advantages": False}])
def test_no_metric_depends_on_the_batches(evaluate, kind, changes):
    """Greedy decisions do not, and neither does a response that is drawn in one order."""
    if kind == "ppo":
        changes = {**changes, "top_k": 1}  # PPOTrainer draws in evaluation, as TRL does
    rewards = [0.0, 3.0, -1.0, 0.0, 10.0, 2.0, 5.0]
    one, _ = evaluate(kind, rewards, batch_size=14, **changes)
    two, _ = evaluate(kind, rewards, batch_size=4, **changes)
    assert {"eval_loss", "eval_entropy", "eval_explained_variance", "eval_value/mean"} <= one.keys()
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith(TIMES):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_of_equal_returns_nothing_is_explained(evaluate):
    """And the share of prompts without a spread of rewards measures RLOO's baseline, which PPO does not have."""
    metrics, _ = evaluate("ppo", [0.0] * 4)
    assert metrics["eval_explained_variance"] == 0.0
    assert "eval_frac_reward_zero_std" not in metrics


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_kl_is_over_tokens(trainer_of, kind):
    """TRL's own metrics, of batches of other sizes and responses of other lengths; what a reward logs is over rows."""
    values, found = [1.0, 2.0, 4.0, 8.0, 16.0], []
    for batch_size in (6, 2):
        trainer, scored = trainer_of(kind, values, batch_size, eos_token="u", top_k=1, beta=0.1)
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        found.append(trainer.evaluate(trainer.train_dataset))
    one, two = found
    assert len({len(completion) for _, completion, _ in scored}) > 1
    assert one["eval_kl"] > 1e-4
    for name in ("eval_kl", "eval_entropy", "eval_completions/mean_length", "eval_completions/clipped_ratio"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert one["eval_of_a_batch"] == pytest.approx(np.mean(values))
    assert two["eval_of_a_batch"] == pytest.approx(np.mean(values))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_prompts_depends_on_the_epoch_alone(trainer_of, kind):
    """Not on how many epochs this process has seen, so a resumed run sees the same prompts."""
    trainer, _ = trainer_of(kind, [0.0] * 32)
    orders = []
    for seen in (0, 1):
        sampler = trainer._get_train_sampler()
        for epoch in (*range(seen), 2):
            sampler.set_epoch(epoch)
            order = list(sampler)
        orders.append(order)
    assert orders[0] == orders[1] != sorted(order)
    sampler.set_epoch(3)
    other_seed = trainer_of(kind, [0.0] * 32, seed=7)[0]._get_train_sampler()
    other_seed.set_epoch(2)
    assert list(sampler) != order != list(other_seed)
