"""Without a flag a run gets the device that this machine has, and a dtype that the device computes in."""

import warnings

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, GRPOConfig, RLOOConfig

from baselines.dpo import DeviceDPOConfig
from baselines.grpo import GuardedGRPOConfig
from baselines.rloo import GuardedRLOOConfig
from trl_proxy import (
    PPOConfig,
    PPOTrainer,
    ProxyConfig,
    ProxyModelForCausalLM,
    ProxyPPOConfig,
    ProxyPPOTrainer,
    devices,
)

CONFIGS = [PPOConfig, ProxyPPOConfig, GuardedRLOOConfig, GuardedGRPOConfig, DeviceDPOConfig]


@pytest.fixture
def said(monkeypatch):
    """What is said to the user."""
    messages = []
    monkeypatch.setattr(devices.logger, "warning_once", messages.append)
    return messages


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(bfloat16)`: configurations believe in one."""

    def pretend(bfloat16: bool):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)

    return pretend


@pytest.mark.parametrize("config", CONFIGS)
def test_without_an_accelerator_training_is_on_the_cpu_and_says_so_once(config, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of our own defaults
        args = config(output_dir=str(tmp_path))
    assert args.use_cpu
    assert not args.bf16
    assert len(said) == 1
    assert "No accelerator was found: this runs on the CPU" in said[0]


@pytest.mark.parametrize("config", [RLOOConfig, GRPOConfig, DPOConfig])
def test_trls_own_defaults_fail_there(config, tmp_path, monkeypatch):
    """Once they do not, `DeviceDefaults` can go."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use_cpu"):
        config(output_dir=str(tmp_path))


def test_who_asks_for_the_cpu_is_told_nothing(said, tmp_path):
    args = ProxyPPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert args.bf16 is False
    assert said == []


def test_only_the_first_of_several_processes_speaks(said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "1")
    assert ProxyPPOConfig(output_dir=str(tmp_path)).use_cpu
    assert said == []


def test_what_is_asked_for_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ProxyPPOConfig(output_dir=str(tmp_path), bf16=True).bf16


@pytest.mark.parametrize("bfloat16", [True, False])
def test_an_accelerator_is_taken_and_asked_for_bfloat16(gpu, said, tmp_path, monkeypatch, bfloat16):
    """A GPU that only emulates it (of 2018, say) does not count."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    gpu(bfloat16)
    args = ProxyPPOConfig(output_dir=str(tmp_path))
    assert not args.use_cpu
    assert args.bf16 is bfloat16
    assert devices.has_bfloat16("cuda") is bfloat16
    assert devices.half_dtype("cuda") == ("bfloat16" if bfloat16 else "float16")
    assert said == []


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu(gpu, tmp_path, monkeypatch):
    """What counts is the device that runs it: the CPU's dtype, not the GPU's."""
    gpu(True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert ProxyPPOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert ProxyPPOConfig(output_dir=str(tmp_path)).bf16 is False
    assert devices.half_dtype("cpu") == "float32"


@pytest.mark.parametrize("trainer", ["proxy", "ppo"])
def test_a_trainer_warns_of_an_lm_that_the_cpu_emulates(trainer, said, tmp_path, monkeypatch, tiny_lm, tiny_tokenizer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})
    reward = lambda prompts, **kwargs: [0.0] * len(prompts)  # noqa: E731
    shared = {"reward_funcs": reward, "train_dataset": dataset, "processing_class": tiny_tokenizer}
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        lm = tiny_lm("llama", dtype=dtype)
        options = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
        }
        if trainer == "proxy":
            ProxyPPOTrainer(ProxyModelForCausalLM(lm, ProxyConfig()), args=ProxyPPOConfig(**options), **shared)
        else:
            PPOTrainer(lm, args=PPOConfig(beta=0.0, **options), **shared)
        assert len(said) == count
    assert "emulates bfloat16, many times slower than float32" in said[0]


def test_checkpointing_of_activations_keeps_both_names(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path))
    assert args.activation_checkpointing is args.gradient_checkpointing is True  # as TRL has it
    assert ProxyPPOConfig(output_dir=str(tmp_path)).activation_checkpointing is False
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        with pytest.raises(ValueError, match="no LM runs in the update"):
            ProxyPPOConfig(output_dir=str(tmp_path), **{name: True})


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_random_state_is_the_devices_too(monkeypatch, kind):
    """Without such a device, a generator of the CPU stands for its own."""
    device, module, generator = torch.device(kind, 0), getattr(torch, kind), torch.Generator()
    monkeypatch.setattr(module, "get_rng_state", lambda of: generator.get_state() if of == device else None)
    monkeypatch.setattr(module, "set_rng_state", lambda state, of: of == device and generator.set_state(state))
    before = devices.random_state_of(device)
    expected = torch.rand(3), torch.rand(3, generator=generator)
    devices.set_random_state(device, before)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=generator), expected[1])
    assert devices.random_state_of(torch.device("cpu"))[1] is None
