"""PPOTrainer on tiny models: it learns, by its own losses, resumes exactly, and saves the value head by itself."""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_proxy import PPOConfig, PPOTrainer

PROMPTS = [f"{a}{b} " for a in "abcdefgh" for b in "ijklmnop"]


def upper_case(prompts, completions, **kwargs):
    """Share of upper-case letters in a completion."""
    return [sum(c.isupper() for c in text) / max(len(text), 1) * 2 for text in completions]


@pytest.fixture
def train(tmp_path, tiny_lm, tiny_tokenizer):
    """`train(lora, resume=None, name=..., **config)` -> the trainer, after training."""

    def run(lora=True, reward=upper_case, resume=None, name="run", call=True, **config):
        settings = {
            "output_dir": str(tmp_path / name),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 16,
            "num_generations": 1,
            "steps_per_generation": 2,
            "num_iterations": 4,
            "max_completion_length": 8,
            "max_steps": 8,
            "logging_steps": 8,
            "save_steps": 1000,
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 3e-3,
            "beta": 0.0,
            **config,
        }
        torch.manual_seed(0)
        lm = tiny_lm("llama")
        if not lora and settings["beta"]:  # the reference is loaded by name
            lm.save_pretrained(tmp_path / "lm")
            lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
        trainer = PPOTrainer(
            model=lm,
            reward_funcs=reward,
            args=PPOConfig(**settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        )
        if call:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns(train, lora):
    trainer = train(lora, max_steps=120, lr_scheduler_type="constant", learning_rate=1e-2 if lora else 1e-3)
    reward = logged(trainer, "reward")
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.3
    if lora:
        assert max(logged(trainer, "explained_variance")) > 0.05


@pytest.mark.parametrize("lora", [True, False])
def test_log_probs_values_and_kl_by_hand(train, tiny_lm, lora, monkeypatch):
    """The rollout's record against plain forwards of the LM."""
    batches = []
    collect = PPOTrainer._collect

    def spy(self, output):
        batches.append((output, collect(self, output)))
        return dict(batches[-1][1])

    monkeypatch.setattr(PPOTrainer, "_collect", spy)
    trainer = train(lora, beta=0.3, max_steps=16, learning_rate=1e-2)
    torch.manual_seed(0)
    before = tiny_lm("llama")
    first, second = batches
    for output, batch in batches:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        width = output["completion_ids"].shape[1]
        with torch.no_grad():
            logits = before(ids, attention_mask=mask).logits[:, -width - 1 : -1]
        reference = logits.log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
        reference = reference * batch["action_mask"]
        expected = -0.3 * (batch["action_log_probs"] - reference)
        torch.testing.assert_close(batch["step_rewards"], expected, atol=1e-5, rtol=0)
        if batch is first[1]:
            # Nothing was learned yet.
            torch.testing.assert_close(batch["action_log_probs"], reference, atol=1e-5, rtol=0)
            assert not batch["state_values"].any()
    assert second[1]["step_rewards"].abs().max() > 1e-3
    assert second[1]["state_values"].abs().max() > 1e-3
    # The update judges as the rollout did, before its first step.
    inputs = {**first[0], **first[1]}
    log_probs, entropies, values = trainer._evaluate_actions(trainer.model, inputs)
    assert log_probs.shape == entropies.shape == values.shape == first[1]["action_mask"].shape
    assert log_probs.requires_grad
    assert values.requires_grad
    assert (entropies >= 0).all()


def test_responses_without_an_end_are_penalised(train):
    """The price of being cut off is part of the score, not of the rewards that are logged."""
    ids = []

    def constant(prompts, completions, completion_ids, **kwargs):
        ids.append(completion_ids)
        return [0.25] * len(prompts)

    trainer = train(reward=constant, missing_eos_penalty=1.5, max_steps=1, max_completion_length=12)
    cut = [row[-1] not in (0, 2) for row in ids[-1]]
    assert 0 < sum(cut) < len(cut)
    assert trainer._scores[-1].tolist() == [0.25 - 1.5 * x for x in cut]
    assert set(logged(trainer, "reward")) <= {0.25}
    with pytest.raises(ValueError, match="`missing_eos_penalty` must be above 0, got 0"):
        train(missing_eos_penalty=0.0)


def test_the_value_is_of_the_state_before_the_token(train):
    """A value must not change with the token that it is the baseline of."""
    trainer = train()
    torch.nn.init.normal_(trainer._head_owner().value_head.linear.weight)
    ids = torch.randint(5, 50, (4, 12))
    inputs = {"prompt_ids": ids[:, :6], "prompt_mask": torch.ones(4, 6).long(), "completion_mask": torch.ones(4, 6)}
    with torch.no_grad():
        _, _, values = trainer._evaluate_actions(trainer.model, {**inputs, "completion_ids": ids[:, 6:]})
        other = ids[:, 6:].clone()
        other[:, 3] = (other[:, 3] + 1) % 50
        _, _, changed = trainer._evaluate_actions(trainer.model, {**inputs, "completion_ids": other})
    torch.testing.assert_close(values[:, :4], changed[:, :4])
    assert (values[:, 4:] - changed[:, 4:]).abs().min() > 1e-6


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path, lora):
    whole = train(lora, max_steps=24, save_steps=8)
    names = set(os.listdir(tmp_path / "run/checkpoint-8"))
    assert "value_head.safetensors" in names
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = load_file(tmp_path / "run/checkpoint-8" / file)
    assert weights
    assert not [name for name in weights if "value_head" in name]
    resumed = train(lora, max_steps=24, save_steps=8, name="again", resume=str(tmp_path / "run/checkpoint-8"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.fault
def test_a_folder_without_a_value_head_is_named(train, tmp_path):
    train(max_steps=8, save_steps=8)
    os.remove(tmp_path / "run/checkpoint-8/value_head.safetensors")
    with pytest.raises(ValueError, match=r"is not a checkpoint of PPOTrainer: value_head.safetensors is missing"):
        train(max_steps=16, name="again", resume=str(tmp_path / "run/checkpoint-8"))


@pytest.mark.fault
def test_logits_that_are_no_numbers_stop_the_run(train):
    """Sampling raises then, in torch, of tensors that nobody has seen."""
    trainer = train(call=False)
    trainer.model.get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="LM's logits are NaN or infinite in the batch whose first prompt is '"):
        trainer.train()
