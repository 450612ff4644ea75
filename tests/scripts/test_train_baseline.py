"""scripts/train_baseline.py: every method trains a tiny LM, resumes, and leaves a policy."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from baselines.training import load_trained
from trl_proxy.files import WriteError, damaged_files
from trl_proxy.loading import load_lm
from trl_proxy.trainer.checkpoints import AtomicCheckpointMixin
from trl_proxy.trainer.reward_guards import RewardError

ROOT = Path(__file__).parents[2]
ONLINE = ("ppo", "rloo", "grpo")
METHODS = (*ONLINE, "dpo")
HEAD = "value_head.safetensors"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_baseline")


@pytest.fixture
def command_line(tiny_files, monkeypatch):
    """`command_line(method, **changes)` -> the command line of a run of seconds."""
    monkeypatch.chdir(tiny_files)
    monkeypatch.syspath_prepend(tiny_files)

    def build(method, **changes):
        values = {
            "model_name_or_path": tiny_files / "lm",
            "dataset_name": tiny_files / "prompts.jsonl",
            "reward_funcs": "my_rewards.upper",
            "output_dir": tiny_files / method,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "max_steps": 8,
            "save_steps": 4,
            "logging_steps": 4,
            "lora_r": 4,
            "learning_rate": 0.01,
            "gradient_checkpointing": "false",
            "report_to": "none",
        }
        if method in ONLINE:
            values |= {"steps_per_generation": 2, "num_iterations": 2, "num_generations": 2}
        return ["--method", method, *(x for k, v in (values | changes).items() for x in (f"--{k}", *str(v).split()))]

    return build


@pytest.fixture
def train(script, command_line):
    """`train(method, **changes)` -> the trainer."""
    return lambda method, **changes: script.main(command_line(method, **changes))


def test_two_processes_train_one_policy(start_ranks, launch_two, command_line, tmp_path):
    """The adapter and the value head, which runs outside the LM's `forward`, on two gloo ranks."""
    arguments = command_line("ppo", per_device_train_batch_size=2, beta=0.1)
    statuses = start_ranks(2, [ROOT / "scripts" / "train_baseline.py", *arguments], tmp_path, tmp_path / "log")
    assert statuses == [0, 0], (tmp_path / "log").read_text()[:6000]
    head = load_file(tmp_path / "ppo" / HEAD)
    assert head["linear.weight"].abs().sum() > 0
    adapter = load_file(tmp_path / "ppo" / "adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)

    # FSDP, which cuts the LM and the head into parts, comes to the same, in one go or two.
    def by_fsdp():
        changes = {"per_device_train_batch_size": 2, "beta": 0.1, "bf16": "false", "output_dir": tmp_path / "fsdp"}
        config = ROOT / "scripts" / "accelerate_configs" / "fsdp2.yaml"
        arguments = command_line("ppo", save_total_limit=2, **changes)
        result = launch_two("tests/fsdp_on_cpu.py", arguments, cwd=tmp_path, config=config)
        assert result.returncode == 0, result.stderr[:6000]
        return {name: load_file(tmp_path / "fsdp" / name) for name in ("adapter_model.safetensors", HEAD)}

    once = by_fsdp()
    assert (tmp_path / "fsdp" / "checkpoint-8" / "pytorch_model_fsdp.bin").exists()  # FSDP's own, of what is trained
    torch.testing.assert_close(once, {"adapter_model.safetensors": adapter, HEAD: head}, rtol=1e-3, atol=1e-5)
    shutil.rmtree(tmp_path / "fsdp" / "checkpoint-8")
    torch.testing.assert_close(by_fsdp(), once, rtol=0, atol=0)


def test_zero_3_cannot_sample_pairs(train, monkeypatch):
    monkeypatch.setattr("baselines.dpo.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 has cut the LM into parts"):
        train("dpo")


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_is_understood(script, method):
    """And trains on the prompts and rewards that the proxy trains on, everyday prompts no more than others."""
    recipe, proxys = (ROOT / "scripts" / "recipes" / f"{name}smollm2_cpu.yaml" for name in (f"{method}_", ""))
    _, (run_args, training_args, model_args) = script.parse(["--method", method, "--config", str(recipe)])
    proxys = yaml.safe_load(proxys.read_text())
    reward = run_args if method == "dpo" else training_args
    assert proxys["dataset_train_split"].split("+")[0] == run_args.dataset_train_split == "train"
    assert run_args.reward_funcs == proxys["reward_funcs"]
    # The weights of kinds rank nothing within a prompt, so DPO does without.
    equal = [1.0, 1.0, proxys["reward_weights"][2]]
    assert reward.reward_weights == (equal if method == "dpo" else proxys["reward_weights"])
    assert reward.max_completion_length == (24 if method == "dpo" else proxys["max_completion_length"])
    assert run_args.max_train_seconds == 600
    assert model_args.use_peft


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_leaves_a_policy(train, method, tmp_path):
    train(method)
    folder = tmp_path / method
    results = json.loads((folder / "train_results.json").read_text())
    assert results["steps"] == 8
    assert results["train_seconds"] > 0
    assert results["episodes"] == (16 if method in ONLINE else 32)
    assert (folder / HEAD).exists() == (method == "ppo")
    assert json.loads((folder / "run.json").read_text())["lora_r"] == 4
    lm, tokenizer = load_lm(str(tmp_path / "lm"))
    plain = lm(torch.tensor([[5, 6, 7]])).logits
    policy = load_trained(folder, lm, tokenizer, batch_size=2, max_new_tokens=6)
    assert (policy.model(torch.tensor([[5, 6, 7]])).logits - plain).abs().max() > 1e-4
    assert len(policy.complete(["ab", "c"]).texts) == 2


@pytest.mark.fault
@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_goes_on_and_equals_one_run(train, method, tmp_path):
    train(method)
    whole = load_file(tmp_path / method / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / method / "checkpoint-8")
    for _ in range(2):  # an interrupted run, and one with nothing left to do
        train(method)
        again = load_file(tmp_path / method / "adapter_model.safetensors")
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_all_weights_can_be_trained(train, tmp_path, tiny_lm):
    train("ppo", use_peft="false", beta=0.0)
    lm, tokenizer = load_lm(str(tmp_path / "lm"))
    policy = load_trained(tmp_path / "ppo", lm, tokenizer, batch_size=2, max_new_tokens=6)
    assert policy.model is not lm
    assert "value_head" not in str(load_file(tmp_path / "ppo" / "model.safetensors").keys())


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_the_clock_ends_a_run(train, method, tmp_path):
    for _ in range(2):  # called again, it is over
        trainer = train(method, max_train_seconds=0.01)
        assert trainer.state.global_step == (4 if method == "ppo" else 1), "at the end of a rollout"
        assert (tmp_path / method / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_pairs_are_made_once(train, tmp_path):
    train("dpo", num_pair_prompts=10, samples_per_prompt=3)
    path = tmp_path / "dpo" / "pairs.json"
    found = json.loads(path.read_text())
    assert 5 < len(found["pairs"]) <= 10
    upper = lambda text: sum(c.isupper() for c in text)  # noqa: E731
    assert all(upper(pair["chosen"]) > upper(pair["rejected"]) for pair in found["pairs"])
    before = path.read_text()
    train("dpo", num_pair_prompts=10, samples_per_prompt=3)
    assert path.read_text() == before
    seconds = json.loads((tmp_path / "dpo" / "train_results.json").read_text())["train_seconds"]
    assert seconds > found["seconds"]


def test_pairs_of_a_dataset(train, tmp_path):
    rows = [{"prompt": f"{a}b", "chosen": "XYZ", "rejected": "xyz"} for a in "abcdefgh"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("dpo", pairs="dataset", dataset_name=path)
    assert not (tmp_path / "dpo" / "pairs.json").exists()
    path.write_text("".join(json.dumps({**row, "rejected": "XYZ"}) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"8 of the 8 rows of .* because the two responses are the same, and none is left"
    ):
        train("dpo", pairs="dataset", dataset_name=path, output_dir=tmp_path / "other")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("a2c", {}, "--method must be one of ppo, rloo, grpo, dpo, got a2c"),
        ("dpo", {"pairs": "dataset"}, "has no column chosen, rejected: a pair needs prompt, chosen, rejected"),
        ("dpo", {"samples_per_prompt": 1}, "`samples_per_prompt` must be at least 2"),
        ("dpo", {"reward_funcs": "my_rewards.same"}, "The reward prefers none of the samples to another"),
        ("dpo", {"reward_weights": "1 2"}, "`reward_weights` has 2 weights for 1 rewards"),
        ("ppo", {"max_train_seconds": 0}, "`max_train_seconds` must be above 0"),
    ],
)
def test_bad_input_is_named(train, method, flags, message):
    with pytest.raises(ValueError, match=message):
        train(method, **flags)


FLAKY = """
from my_rewards import upper

calls, works = 0, False


def flaky(prompts, completions, **kwargs):
    global calls
    calls += 1
    if calls > CALLS and not works:
        raise OSError("gone")
    return upper(prompts, completions)
"""


@pytest.mark.fault
@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_fails_ends_the_run(train, tmp_path, method):
    """In one sentence, after a checkpoint. Once fixed, the same command resumes and equals a run without a failure."""
    sys.modules.pop("flaky_rewards", None)
    (tmp_path / "flaky_rewards.py").write_text(FLAKY.replace("CALLS", "1" if method in ONLINE else "0"))
    arguments = {"reward_funcs": "flaky_rewards.flaky", "output_dir": tmp_path / "flaky"}
    with pytest.raises(RewardError) as error:
        train(method, **arguments)
    message = str(error.value)
    assert message.startswith("The reward function flaky raised OSError (gone) on the prompt '")
    if method in ONLINE:
        assert message.endswith("fix it, and the same command resumes from checkpoint-4, saved just now.")
    sys.modules["flaky_rewards"].works = True
    train(method, **arguments)
    train(method)
    whole, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (method, "flaky"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.fault
@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_hangs_ends_the_run(train, tmp_path, method):
    (tmp_path / "slow_rewards.py").write_text("import time\n\n\ndef slow(**kwargs):\n    time.sleep(60)\n")
    with pytest.raises(RewardError, match=r"reward function slow took longer than reward_timeout=0\.3 seconds on the"):
        train(method, reward_funcs="slow_rewards.slow", reward_timeout=0.3)


@pytest.mark.fault
@pytest.mark.parametrize("method", ONLINE)
def test_a_reward_that_is_no_number_ends_the_run(train, tmp_path, method):
    (tmp_path / "no_rewards.py").write_text("def none(prompts, **kwargs):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(RewardError, match="'none' returned nan instead of a finite number, for the prompt '"):
        train(method, reward_funcs="no_rewards.none")


@pytest.mark.fault
def test_another_lms_adapter_is_refused(train, tmp_path, tiny_lm, tiny_tokenizer):
    train("ppo")
    tiny_lm("llama").save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    lm, tokenizer = load_lm(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"holds an adapter of .*lm, not of .*other"):
        load_trained(tmp_path / "ppo", lm, tokenizer, batch_size=2, max_new_tokens=6)
    with pytest.raises(ValueError, match="holds no trained model"):
        load_trained(tmp_path, lm, tokenizer, batch_size=2, max_new_tokens=6)


def test_an_adapter_names_the_embedded_lm(tmp_path, tiny_lm, tiny_tokenizer, monkeypatch):
    """And not the file that it was read from, which is another on the next machine."""
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.setattr("trl_proxy.loading.resolve_model", lambda name, *_: str(tmp_path / "lm"))
    tuned = get_peft_model(load_lm("embedded")[0], LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    )
    policy = load_trained(tmp_path / "adapter", *load_lm("embedded"), batch_size=2, max_new_tokens=4)
    assert policy.parameters_report()["trainable_parameters"] > 0


@pytest.mark.fault
@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_leaves_the_last_checkpoint(train, tmp_path, method):
    """The one being written is not there; the same command resumes from the one before."""
    place = tmp_path / method / ".partial" / "checkpoint-8" / "optimizer.pt"

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                place.parent.mkdir(parents=True)
                place.symlink_to("/dev/full")

    init = AtomicCheckpointMixin.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AtomicCheckpointMixin,
            "__init__",
            lambda self, *a, **k: (init(self, *a, **k), self.add_callback(Fill()))[0],
        )
        with pytest.raises(WriteError, match="checkpoint-8 could not be written"):
            train(method)
    assert [path.name for path in (tmp_path / method).glob("*checkpoint-*")] == ["checkpoint-4"]
    assert not damaged_files(tmp_path / method / "checkpoint-4")
    assert not (tmp_path / method / ".partial").exists()
    assert train(method).state.global_step == 8
    assert (tmp_path / method / "checkpoint-8" / "checksums.json").is_file()
