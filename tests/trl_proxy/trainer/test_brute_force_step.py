"""The trainers against `brute_force_step.py`: scores, advantages, losses, gradients and metrics of tiny trainings."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

REWARDS = {"rewards": ["spelling", "capitals"], "reward_weights": [1.0, -0.7]}
# All that changes what an update learns, away from its default.
LOSS = {
    "epsilon": 0.03,
    "epsilon_high": 0.08,
    "cliprange_value": 0.1,
    "vf_coef": 0.3,
    "entropy_coef": 0.2,
    "gamma": 0.9,
    "gae_lambda": 0.7,
}
PRICES = {"beta": 0.3, "lm_logp_coef": 0.2}
PASSES = {"num_iterations": 2, "steps_per_generation": 2, "updates": 8}

# What is on -> the options. `updates` are enough for two rollouts.
EXAMPLES = {
    "defaults": {},
    "losses": {**LOSS, **PASSES, "replay_rollouts": 1},
    "prices, threshold": {**PRICES, "gamma": 0.9, "proxy": {"threshold": 0.4}},
    "prices without whitening": {**PRICES, "normalize_advantages": False, "group_baseline": False},
    "only the price of the LM": {"lm_logp_coef": 0.4, "normalize_advantages": False},
    "only the price of leaving the LM": {"beta": 0.4, "normalize_advantages": False},
    "shaping": {
        **REWARDS,
        "reward_shaping_tokens": 1,
        "max_completion_length": 5,
        "normalize_advantages": False,
        "missing_eos_penalty": 0.6,
        "group_baseline": False,
    },
    "shaping and the group's baseline": {
        **REWARDS,
        "reward_shaping_tokens": 2,
        "max_completion_length": 5,
        "reward_clip_range": [-0.4, 0.7],
        "normalize_advantages": False,
    },
    "replay": {**LOSS, "replay_rollouts": 3, "updates": 5, "num_iterations": 1},
    "replay of parts": {**LOSS, **PASSES, "replay_rollouts": 2, "updates": 12, "offload_rollouts": True},
    "accumulation": {**LOSS, **PASSES, "gradient_accumulation_steps": 2, "updates": 4, "replay_rollouts": 2},
    "accumulation over passes": {**LOSS, **PASSES, "gradient_accumulation_steps": 4, "updates": 2},
    "an update of two passes": {
        **LOSS,
        "steps_per_generation": 3,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "updates": 3,
    },
    "cut off": {
        "mask_truncated_completions": True,
        "missing_eos_penalty": 0.6,
        "normalize_advantages": False,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
    },
    "clipped scores": {"reward_clip_range": [-0.4, 0.7], "missing_eos_penalty": 0.6, "group_baseline": False},
    "one generation": {"num_generations": 1, **LOSS},
    "four generations, two in evaluation": {"num_generations": 4, "num_generations_eval": 2, "rollout_batch_size": 2},
    "a new gate": {"new_gate": True, **LOSS, **PASSES, "proxy": {"threshold": -0.3}},
    "a new gate that reads three layers": {"new_gate": True, "proxy": {"feature_layers": [0, -1]}, "updates": 3},
    "candidate features": {**LOSS, **PRICES, "new_gate": True, "proxy": {"features": "candidate"}},
    "sampled proposals": {**PRICES, "proxy": {"proposal": "sampled", "temperature": 0.7, "pooled_features": False}},
    "nothing to decide": {**PRICES, "proxy": {"max_candidates": 1}},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_training_equals_the_twin(recorded_training, tiny_tokenizer, tmp_path, name):
    options = {"num_generations": 2, "updates": 2, "seed": 1 + list(EXAMPLES).index(name), **EXAMPLES[name]}
    recorded_training.check(recorded_training.train(options, tiny_tokenizer, str(tmp_path)), options)


@st.composite
def trainings(draw):
    """Options that fit each other."""
    generations = draw(st.integers(1, 3))
    parts, iterations, accumulated = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2)]))
    options = {
        "seed": draw(st.integers(0, 999)),
        "num_generations": generations,
        "num_generations_eval": draw(st.integers(1, 2)),
        "per_device_train_batch_size": generations * draw(st.integers(1, 2)),
        "num_iterations": iterations,
        "steps_per_generation": parts,
        "gradient_accumulation_steps": accumulated,
        "replay_rollouts": draw(st.integers(1, 3)),
        "updates": 4,
        "max_completion_length": draw(st.integers(2, 6)),
        "reward_shaping_tokens": draw(st.sampled_from([None, 1, 2, 3])),
        "reward_clip_range": draw(st.sampled_from([None, [-0.5, 0.8]])),
        "missing_eos_penalty": draw(st.sampled_from([None, 0.7])),
        "epsilon_high": draw(st.sampled_from([None, 0.1])),
        "new_gate": draw(st.booleans()),
        "proxy": {
            "features": draw(st.sampled_from(["prefix", "candidate"])),
            "pooled_features": draw(st.booleans()),
            "threshold": draw(st.floats(-1, 1)),
            "max_candidates": draw(st.integers(2, 6)),
        },
        **draw(st.sampled_from([{}, REWARDS])),
    }
    for name in ("normalize_advantages", "group_baseline", "mask_truncated_completions", "offload_rollouts"):
        options[name] = draw(st.booleans())
    for name, low, high in (
        ("gamma", 0.3, 1.0),
        ("gae_lambda", 0.0, 1.0),
        ("beta", 0.0, 0.5),
        ("lm_logp_coef", 0.0, 0.5),
        ("vf_coef", 0.0, 1.0),
        ("entropy_coef", 0.0, 0.5),
        ("epsilon", 0.01, 0.2),
        ("cliprange_value", 0.01, 0.5),
    ):
        options[name] = draw(st.floats(low, high))
    return options


@given(options=trainings())
@settings(
    max_examples=8,
    phases=[Phase.generate],  # a smaller training says no more, and the search for it takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_trainings_equal_the_twin(recorded_training, tiny_tokenizer, tmp_path, options):
    recorded_training.check(recorded_training.train(options, tiny_tokenizer, str(tmp_path)), options)


LM_EXAMPLES = {
    "defaults": {"num_iterations": 2},
    "losses": {**LOSS, **PASSES, "updates": 2, "gradient_accumulation_steps": 2, "beta": 0.3},
    "without whitening": {"beta": 0.5, "normalize_advantages": False, "temperature": 0.8, **REWARDS},
    "cut off": {"mask_truncated_completions": True, "missing_eos_penalty": 0.6, "num_generations": 1},
}


@pytest.mark.parametrize("name", LM_EXAMPLES)
def test_ppo_on_the_lm_equals_the_twin(recorded_training, tiny_tokenizer, tmp_path, name):
    options = {"lm_itself": True, "num_generations": 2, "updates": 2, "learning_rate": 0.02, "seed": 3}
    options |= LM_EXAMPLES[name]
    recorded_training.check(recorded_training.train(options, tiny_tokenizer, str(tmp_path)), options)


RANKS = {
    2: [
        {**LOSS, **PASSES, "gradient_accumulation_steps": 2, "updates": 4, "replay_rollouts": 2, "new_gate": True},
        {**PRICES, **REWARDS, "reward_shaping_tokens": 2, "missing_eos_penalty": 0.6},
        {"lm_itself": True, **LOSS, "beta": 0.2, "updates": 2, "learning_rate": 0.02},
    ],
    4: [
        {
            **LOSS,
            "num_generations": 1,
            "per_device_train_batch_size": 1,
            "mask_truncated_completions": True,
            "max_completion_length": 3,
            "updates": 4,
            "idle_ranks": True,
        },
        {
            **PRICES,
            "num_generations": 4,
            "num_generations_eval": 4,
        },  # of a prompt, two here and two on the next process
    ],
}


@pytest.mark.parametrize("count", RANKS)
def test_processes_equal_one_twin_with_all_their_rows(start_ranks, tiny_tokenizer, tmp_path, count):
    """What each has differs; metrics, advantages, moments and gradients are over all of it."""
    shared = {"num_generations": 2, "updates": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "options.json").write_text(json.dumps([{**shared, **options} for options in RANKS[count]]))
    folder, log = Path(__file__).parent, tmp_path / "log.txt"
    command = [folder / "train_on_ranks.py", tmp_path, tmp_path / "options.json", tmp_path / "out"]
    assert start_ranks(count, command, folder, log) == [0] * count, log.read_text()[-5000:]
    assert log.read_text().count("equal\n") == len(RANKS[count])
