"""ProxyPPOTrainer on tiny models: it learns, resumes exactly, leaves the LM alone and stops at bad rewards."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.files import damaged_files
from trl_proxy.trainer import proxy_ppo
from trl_proxy.trainer.reward_guards import RewardError

PROMPTS = [f"{a}{b} " for a in "abcdefgh" for b in "ijklmnop"]


def upper_case(prompts, completions, **kwargs):
    """Share of upper-case letters in a completion."""
    return [sum(c.isupper() for c in text) / max(len(text), 1) * 2 for text in completions]


@pytest.fixture
def train(tmp_path, tiny_lm, tiny_tokenizer):
    """`train(features, reward, resume=None, name=..., **config)` -> the trainer, after training."""

    def run(
        features="prefix", pooled=False, reward=upper_case, resume=None, name="run", dataset=None, call=True, **config
    ):
        settings = {
            "output_dir": str(tmp_path / name),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 16,
            "steps_per_generation": 2,
            "num_iterations": 4,
            "num_generations": 2,
            "max_completion_length": 10,
            "max_steps": 8,
            "logging_steps": 8,
            "save_steps": 1000,
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 3e-3,
            **config,
        }
        torch.manual_seed(0)
        model = ProxyModelForCausalLM(
            tiny_lm("llama"),
            ProxyConfig(features=features, pooled_features=pooled, p_t=0.001, gate_hidden_sizes=[32]),
        )
        trainer = ProxyPPOTrainer(
            model=model,
            reward_funcs=reward,
            args=ProxyPPOConfig(**settings),
            train_dataset=dataset if dataset is not None else Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tiny_tokenizer,
        )
        if call:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_it_learns(train, features):
    steps = 200 if features == "prefix" else 480
    trainer = train(features, max_steps=steps, lr_scheduler_type="constant", group_baseline=False)
    reward = logged(trainer, "reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:3]) / 3 + 0.15
    assert max(logged(trainer, "explained_variance")) > 0.05
    for key in ("accept_rate", "clip_ratio"):
        assert all(0 <= value <= 1 for value in logged(trainer, key))
    assert all(0 < value < math.log(2) + 1e-6 for value in logged(trainer, "entropy"))
    assert all(value < 0 for value in logged(trainer, "lm_logp_per_token"))
    forwards = logged(trainer, "lm_forwards_per_token")
    assert all(value == 1.0 for value in forwards) if features == "prefix" else min(forwards) > 1.0
    for key in ("reward_std", "approx_kl", "decisions_per_token", "episodes_per_second", "tokens_per_second"):
        assert all(math.isfinite(value) for value in logged(trainer, key))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_single_decision_has_no_moments(train, ragged_batch, count):
    trainer = train(call=False)
    model = trainer.model
    rollout = model.generate(**ragged_batch([5, 9]), max_new_tokens=8, output_rollout=True).rollout
    chosen = rollout.mask.flatten().nonzero()[:count, 0]
    mask = torch.zeros_like(rollout.mask.flatten()).scatter(0, chosen, True).view_as(rollout.mask)
    trainer._standardise(model, [rollout._replace(mask=mask)])
    assert model.gate.is_new == (count < 2)
    assert model.gate.feature_std.isfinite().all()
    assert (model.gate.feature_std > 0).any()


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_a_rollout_is_judged_in_chunks(train, features, monkeypatch):
    """As many rows at a time as have about `_CHUNK` decisions; what the gate's input is standardised by, and what it
    learns, are those of the whole."""
    whole = train(features, True, max_steps=16).model.proxy.state_dict()
    monkeypatch.setattr(proxy_ppo, "_CHUNK", 40)
    chunks = []
    rollout_features = ProxyModelForCausalLM.rollout_features
    monkeypatch.setattr(
        ProxyModelForCausalLM,
        "rollout_features",
        lambda self, rollout, *places: chunks.append(len(rollout.mask)) or rollout_features(self, rollout, *places),
    )
    in_chunks = train(features, True, name="chunks", max_steps=16).model.proxy.state_dict()
    assert min(chunks) < 8
    for name, value in whole.items():
        torch.testing.assert_close(in_chunks[name], value, atol=1e-3, rtol=1e-3)


def test_rollouts_in_the_hosts_memory(train, tmp_path):
    """On a CPU there is no other memory: the same weights, a resumed run's too."""
    settings = {"max_steps": 24, "save_steps": 8, "replay_rollouts": 2}
    expected = train(**settings).model.proxy.state_dict()
    trainer = train(name="host", offload_rollouts=True, **settings)
    checkpoint = tmp_path / "host" / "checkpoint-16"
    resumed = train(name="resumed", offload_rollouts=True, resume=str(checkpoint), **settings)
    for state in (trainer.model.proxy.state_dict(), resumed.model.proxy.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_lm_is_unchanged_and_alone_the_proxy_is_saved(train, tiny_lm, tmp_path):
    trainer = train(max_steps=16, save_steps=8)
    torch.manual_seed(0)
    before = tiny_lm("llama").state_dict()
    after = trainer.model.lm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    checkpoint = tmp_path / "run" / "checkpoint-8"
    names = load_file(checkpoint / "proxy_model.safetensors").keys()
    assert names
    assert all(name.startswith(("gate.", "critic.")) for name in names)
    assert not [name for name in os.listdir(checkpoint) if name in ("model.safetensors", "adapter_config.json")]
    assert not (tmp_path / "run" / ".partial").exists()


@pytest.mark.parametrize(("checkpoint", "replay"), [(8, 1), (24, 1), (32, 1), (8, 3), (24, 3)])
def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path, checkpoint, replay):
    def loaded_at_first():
        """A reward that builds a network when it is first called, as a reward model that is loaded late does."""
        network = []

        def reward(prompts, completions, **kwargs):
            network.append(network or torch.nn.Linear(8, 8))
            return upper_case(prompts, completions)

        return reward

    # 64 prompts make 4 rollouts an epoch, 8 steps each: one checkpoint is at an epoch's end, one within the second.
    whole = train(max_steps=40, save_steps=8, logging_steps=4, reward=loaded_at_first(), replay_rollouts=replay)
    resumed = train(
        replay_rollouts=replay,
        reward=loaded_at_first(),
        max_steps=40,
        save_steps=8,
        logging_steps=4,
        name="again",
        resume=str(tmp_path / f"run/checkpoint-{checkpoint}"),
    )
    assert resumed.state.global_step == 40
    for name, value in whole.model.proxy.state_dict().items():
        assert torch.equal(value, resumed.model.proxy.state_dict()[name]), name
    assert logged(whole, "reward")[-2:] == logged(resumed, "reward")[-2:]


def test_checkpoints_wait_for_the_end_of_a_rollout(train, tmp_path):
    train(max_steps=24, save_steps=5)
    saved = sorted(int(name.split("-")[1]) for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint"))
    assert saved == [8, 16, 24]


def test_save_total_limit(train, tmp_path):
    train(max_steps=24, save_steps=8, save_total_limit=1)
    assert [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint")] == ["checkpoint-24"]


def test_the_same_seed_gives_the_same_run(train):
    first, second = (train(max_steps=16, name=name, seed=7) for name in ("a", "b"))
    other = train(max_steps=16, name="c", seed=8)
    weights = [t.model.gate.mlp[0].weight for t in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def failing(prompts, completions, **kwargs):
    rewards = upper_case(prompts, completions)
    if failing.after == 0:
        failing.after -= 1
        place = prompts.index(failing.prompt) if failing.prompt in prompts else 0
        failing.prompt = prompts[place]
        if failing.value == "raise":
            raise ZeroDivisionError("no luck")
        if failing.value == "short":
            return rewards[:-1]
        rewards[place] = failing.value
    else:
        failing.after -= 1
    return rewards


@pytest.mark.fault
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "text"])
def test_a_bad_reward_stops_the_run_with_its_prompt_and_a_checkpoint(train, tmp_path, value):
    failing.after, failing.value, failing.prompt = 1, value, None
    with pytest.raises(RewardError) as error:
        train(reward=failing, max_steps=24)
    assert "failing" in str(error.value)
    assert repr(failing.prompt) in str(error.value)
    assert os.listdir(tmp_path / "run" / "checkpoint-8")
    # With the reward fixed, the run resumes to the result of a run without a failure.
    failing.after = 10**9
    resumed = train(reward=failing, max_steps=24, resume=str(tmp_path / "run" / "checkpoint-8"))
    whole = train(reward=upper_case, max_steps=24, name="whole")
    for name, weights in whole.model.proxy.state_dict().items():
        assert torch.equal(weights, resumed.model.proxy.state_dict()[name]), name


@pytest.mark.fault
def test_a_reward_that_raises_names_the_prompt(train, tmp_path):
    def picky(prompts, completions, **kwargs):
        if "ck " in prompts:
            raise ZeroDivisionError("no luck")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=r"picky raised ZeroDivisionError \(no luck\) on the prompt 'ck '"):
        train(reward=picky, max_steps=100)
    assert [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint")]


@pytest.mark.fault
def test_a_reward_of_the_wrong_count_stops_the_run(train):
    failing.after, failing.value, failing.prompt = 0, "short", None
    with pytest.raises(RewardError, match="31 rewards, but 32 were expected"):
        train(reward=failing)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType (None) instead of a list of 32 numbers"),
        ({"a": 1.0}, "returned a dict ({'a': 1.0}) instead of a list of 32 numbers"),
        ("a" * 32, "returned a str ('aaaa"),
        ([[1.0]] * 32, "returned [1.0] instead of a finite number, for the prompt '"),
        ([1.0] * 33, "returned 33 rewards, but 32 were expected, for a batch whose first prompt is '"),
        ([], "returned 0 rewards, but 32 were expected"),
        ([1e300] * 32, "returned 1e+300 instead of a number that float32 can hold, for the prompt '"),
        (SystemExit("bye"), "raised SystemExit (bye) on the prompt '"),
        (MemoryError("two\nlines"), "raised MemoryError (two lines) on the prompt '"),
    ],
)
def test_nonsense_stops_the_run_with_a_checkpoint(train, tmp_path, returned, message):
    calls = []

    def nonsense(prompts, completions, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            return upper_case(prompts, completions)
        if isinstance(returned, BaseException):
            raise returned
        return returned

    with pytest.raises(RewardError) as error:
        train(reward=nonsense, max_steps=24)
    assert message in str(error.value)
    assert str(error.value).endswith(": fix it, and the same command resumes from checkpoint-8, saved just now.")
    assert len(str(error.value).splitlines()) == 1
    assert not damaged_files(tmp_path / "run" / "checkpoint-8")


def test_rewards_may_be_a_generator_or_a_tensor(train):
    assert logged(train(reward=lambda prompts, **kwargs: (1.0 for _ in prompts)), "reward") == [1.0]
    assert logged(train(reward=lambda prompts, **kwargs: torch.ones(len(prompts)), name="tensor"), "reward") == [1.0]


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["stubborn", "slow", "async"])
def test_a_reward_that_hangs_is_stopped(train, tmp_path, kind):
    """Also one that catches every exception; the prompt on which it hangs is named, if it is only one."""
    handler = signal.getsignal(signal.SIGALRM)

    def stubborn(prompts, completions, **kwargs):
        while "ck " in prompts:
            with contextlib.suppress(Exception):
                time.sleep(10)
        return upper_case(prompts, completions)

    def slow(prompts, completions, **kwargs):
        time.sleep(0.01 * len(prompts))
        return upper_case(prompts, completions)

    async def forever(prompts, completions, **kwargs):
        await asyncio.sleep(60)

    reward = {"stubborn": stubborn, "slow": slow, "async": forever}[kind]
    where = {"stubborn": "on the prompt 'ck ': fix it", "slow": "", "async": "on the prompt '"}
    begun = time.monotonic()
    with pytest.raises(RewardError) as error:
        train(reward=reward, max_steps=100, reward_timeout=0.2)
    assert time.monotonic() - begun < 30
    assert f"The reward function {reward.__name__} took longer than reward_timeout=0.2 seconds " in str(error.value)
    assert where[kind] in str(error.value)
    assert str(error.value).endswith("saved just now.")
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert f"resumes from checkpoint-{last}, " in str(error.value)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.fault
def test_a_time_limit_needs_the_main_thread(train):
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="`reward_timeout` needs the main thread"):
        pool.submit(train, call=False, reward_timeout=1.0).result()


@pytest.mark.fault
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_logits_that_are_no_numbers_stop_the_run(train, tmp_path, features, value):
    """Before a reward sees what was drawn from them, and before anything is learned from it."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(prompts)
        return upper_case(prompts, completions)

    trainer = train(features, reward=reward, max_steps=24, call=False)
    weight = trainer.model.lm.get_output_embeddings().weight

    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                self.before = [x.clone() for x in trainer.model.proxy.parameters()]
                weight.data[7] = value
            elif state.global_step == 8:
                self.before = [x.clone() for x in trainer.model.proxy.parameters()]

    damage = Damage()
    trainer.add_callback(damage)
    with pytest.raises(ValueError, match="logits are NaN or infinite in the batch whose first prompt is '") as error:
        trainer.train()
    assert len(str(error.value).splitlines()) == 1
    assert len(seen) == 1
    assert all(torch.equal(x, y) for x, y in zip(damage.before, trainer.model.proxy.parameters()))


@pytest.mark.fault
def test_a_tokenizer_without_a_chat_template(train, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    conversations = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROMPTS]})
    with pytest.raises(ValueError, match=r"conversations and the tokenizer of .* has no chat template: set"):
        train(dataset=conversations, call=False)
    train(call=False)  # plain text needs none


def test_none_is_allowed_where_another_reward_applies(train):
    def sometimes(prompts, completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    trainer = train(reward=[sometimes, upper_case], reward_weights=[1.0, 2.0])
    assert logged(trainer, "rewards/sometimes/mean") == [1.0]
    trainer = train(reward=[sometimes, upper_case, sometimes], name="twice")  # the logs keep two of one name apart
    assert logged(trainer, "rewards/sometimes_2/mean") == [1.0]
    with pytest.raises(
        RewardError, match=r"No reward applies to the prompt '.+': sometimes, sometimes_2 returned None"
    ):
        train(reward=[sometimes, sometimes], name="none")


@pytest.mark.fault
def test_a_reward_that_was_fixed_is_forgiven_in_the_same_process(train):
    """And what it had logged before it failed is not counted."""
    broken = [True]

    def reward(prompts, log_metric, log_extra, **kwargs):
        log_metric("fixed", 0.0 if broken[0] else 1.0)
        log_extra("text", ["x"] * len(prompts))
        if broken[0]:
            raise OSError("gone")
        return [1.0] * len(prompts)

    trainer = train(reward=reward, call=False)
    with pytest.raises(RewardError, match=r"reward raised OSError \(gone\)"):
        trainer.train()
    broken[0] = False
    trainer.train()
    assert logged(trainer, "fixed") == [1.0]
    assert logged(trainer, "reward") == [1.0]


@pytest.mark.fault
def test_rewards_are_checked_before_anything_is_made(train):
    def narrow(prompts, completions):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match=r"`reward_weights` has 2 weights for 1 rewards \(upper_case\): give one"):
        train(reward_weights=[1.0, 2.0], call=False)
    with pytest.raises(ValueError, match="narrow does not take `completion_ids`"):
        train(reward=narrow, call=False)
    with pytest.raises(ValueError, match="The dataset has a column `log_extra`"):
        train(dataset=Dataset.from_dict({"prompt": PROMPTS, "log_extra": PROMPTS}), call=False)


@pytest.mark.fault
def test_an_async_reward(train):
    async def slow(prompts, completions, **kwargs):
        return [1.0] * len(prompts)

    async def broken(prompts, completions, **kwargs):
        raise OSError("gone")

    assert logged(train(reward=slow), "reward") == [1.0]
    with pytest.raises(RewardError, match=r"broken raised OSError \(gone\)"):
        train(reward=broken, name="broken")


@pytest.mark.fault
def test_episodes_without_a_decision_break_nothing(train, tiny_lm, tiny_tokenizer, tmp_path):
    model = ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(max_candidates=1))
    args = ProxyPPOConfig(
        output_dir=str(tmp_path / "none"), use_cpu=True, bf16=False, per_device_train_batch_size=4, max_steps=4,
        max_completion_length=4, report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = ProxyPPOTrainer(
        model=model,
        reward_funcs=upper_case,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    assert logged(trainer, "decisions_per_token") == [0.0]
    assert logged(trainer, "loss/policy") == [0.0] * 4


def test_evaluation_takes_greedy_decisions(train):
    trainer = train(call=False, per_device_eval_batch_size=16, num_generations_eval=1)
    data = Dataset.from_dict({"prompt": PROMPTS[:16]})
    first, second = (trainer.evaluate(data)["eval_reward"] for _ in range(2))
    assert first == second
    # A new gate accepts everything.
    assert trainer.state.log_history[-1]["eval_accept_rate"] == 1.0


@pytest.mark.fault
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_vllm": True}, "use_vllm"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"gamma": 1.5}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"temperature": 0.7}, "temperature"),
        ({"replay_rollouts": 0}, "replay_rollouts"),
    ],
)
def test_bad_settings_are_one_sentence(train, config, message):
    with pytest.raises(ValueError, match=message):
        train(call=False, **config)


@pytest.mark.fault
def test_an_lm_in_parts_is_refused(train, monkeypatch):
    """As `accelerate launch` says it, and as transformers reads it from DeepSpeed's configuration."""
    monkeypatch.setattr(proxy_ppo, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        train(call=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is not supported"):
        train(call=False)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"prompt": []}), "`train_dataset` is empty"),
        (Dataset.from_dict({"question": ["a"]}), "no `prompt` column, only question"),
        (
            Dataset.from_dict({"prompt": [*PROMPTS, "a" * 300]}),
            r"Row 65 of `train_dataset` has a prompt of 300 tokens, which with up to 10 of the response need more",
        ),
    ],
)
def test_bad_datasets_are_one_sentence(train, dataset, message):
    with pytest.raises(ValueError, match=message):
        train(call=False, dataset=dataset)


@pytest.mark.fault
def test_a_tokenizer_without_end_of_sequence(tiny_lm, tiny_tokenizer, tmp_path):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, padding_side="left")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        ProxyPPOTrainer(
            model=ProxyModelForCausalLM(tiny_lm("llama")),
            reward_funcs=upper_case,
            args=ProxyPPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )


@pytest.mark.fault
def test_a_plain_lm_is_refused(tiny_lm):
    with pytest.raises(TypeError, match="wrap the LM"):
        ProxyPPOTrainer(model=tiny_lm("llama"), reward_funcs=upper_case)


def test_conversational_prompts_and_extra_columns(train):
    seen, completions_seen = {}, []

    def reward(prompts, completions, kind, **kwargs):
        seen.update(prompt=prompts[0], kind=kind)
        completions_seen.extend(completions)
        return [1.0] * len(prompts)

    rows = {"prompt": [[{"role": "user", "content": p}] for p in PROMPTS], "kind": ["x"] * len(PROMPTS)}
    train(reward=reward, dataset=Dataset.from_dict(rows), reward_shaping_tokens=4)
    assert seen["prompt"][0]["role"] == "user"
    assert len({len(message["content"]) for (message,) in completions_seen}) > 1  # unfinished ones, too
    for (message,) in completions_seen:
        assert message.keys() == {"role", "content"}
        assert message["role"] == "assistant"
    assert seen["kind"] == ["x"] * 32


def test_rollouts_in_parts_are_the_same_rollout(train):
    """Greedy evaluation does not depend on how many responses are decoded at once."""
    rewards = []
    for size in (None, 4):
        trainer = train(
            call=False, rollout_batch_size=size, per_device_eval_batch_size=16, num_generations_eval=1, name=str(size)
        )
        torch.nn.init.normal_(trainer.model.gate.mlp[-1].weight, generator=torch.Generator().manual_seed(0))
        metrics = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:16]}))
        rewards.append([metrics[k] for k in ("eval_reward", "eval_lm_logp_per_token", "eval_accept_rate")])
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "size", "calls"),
    [
        ("aaaabbbb", None, [8]),
        ("aabbbb", None, [6]),
        ("aaaa", 2, [2, 2]),
        ("aaaaaabbbbbb", 4, [4, 4, 4]),  # a part may hold both prompts
    ],
)
def test_no_more_responses_at_once_than_asked_for(train, prompts, size, calls):
    """Generations of a prompt may be on other processes, so any number of equal prompts may follow one another."""
    trainer = train(call=False, num_generations=4, rollout_batch_size=size)
    generate, rows = trainer.model.generate, []
    trainer.model.generate = lambda *args, **kwargs: rows.append(generate(*args, **kwargs)) or rows[-1]
    trainer.model.train()
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    assert len(trainer._generate_single_turn(ids, None, {})) == len(prompts)
    assert [len(output.sequences) for output in rows] == calls
    starts = [row[: len(ids[0])].tolist() for output in rows for row in output.sequences]
    assert starts == ids


def test_the_model_card_is_true(train, tmp_path):
    train(max_steps=8, save_steps=8)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card
    assert "ProxyModelForCausalLM.from_pretrained" in card
    assert "2403.04283" in card


def test_load_best_model(train, tmp_path, tiny_tokenizer):
    trainer = train(max_steps=8, save_steps=8)
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-8")
    before = {k: v.clone() for k, v in trainer.model.proxy.state_dict().items()}
    torch.nn.init.zeros_(trainer.model.gate.mlp[0].weight)
    trainer._load_best_model()
    assert all(torch.equal(v, trainer.model.proxy.state_dict()[k]) for k, v in before.items())
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    shutil.rmtree(tmp_path / "run")


def test_shaping_pays_the_same_reward_where_it_arises(train):
    """Scores on the way change the advantages, not what is logged of a finished response."""
    seen, first = {}, {}
    for every in (None, 4):
        lengths = seen[every] = set()

        def reward(prompts, completions, log_extra, log_metric, lengths=lengths, **kwargs):
            lengths.update(map(len, completions))
            log_extra("length", [len(x) for x in completions])
            log_metric("calls", 1.0)
            return upper_case(prompts, completions)

        trainer = train(reward=reward, reward_shaping_tokens=every, name=str(every), logging_steps=1)
        first[every] = {key: logged(trainer, key)[0] for key in ("reward", "reward_std", "calls", "loss/policy")}
    assert max(seen[None]) == 10
    assert {4, 8} <= seen[4]
    unchanged = ("reward", "reward_std", "calls")
    assert [first[4][key] for key in unchanged] == [first[None][key] for key in unchanged]
    assert first[4]["loss/policy"] != first[None]["loss/policy"]
