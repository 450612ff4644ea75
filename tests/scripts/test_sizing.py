"""scripts/sizing.py: its bytes against those of small LMs that really decode and train, and its flags."""

import dataclasses
import gc
import importlib
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.decoding.row_cache import RowCache

ROOT = Path(__file__).parents[2]
PROMPT, NEW = 40, 8


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("eval.sizing")


def small_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{**sizes, **heads, **ids, "max_position_embeddings": 512, **changes})


def small_lm(**changes):
    torch.manual_seed(0)
    # FlopCounterMode knows no fused attention on a CPU.
    return AutoModelForCausalLM.from_config(small_config(**changes), attn_implementation="eager").eval()


def settings(script, **changes):
    return script.SizingArguments(
        **{
            "dtype": "float32",
            "prompt_tokens": PROMPT,
            "max_completion_length": NEW,
            "gate_hidden_sizes": [64],
            "max_candidates": 4,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 1,
            "pooled_features": False,
            "replay_rollouts": 1,
            "lora_r": 8,
            **changes,
        }
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most that were."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def nbytes(tensors) -> int:
    return sum(x.nbytes for x in tensors)


# What an LM holds


@pytest.mark.parametrize(("name", "parameters"), [("1B", 1235814400), ("7B", 7248023552), ("70B", 70553706496)])
def test_the_examples_have_the_published_numbers_of_parameters(script, name, parameters):
    assert script.Shape.of(script.EXAMPLES[name]).parameters == parameters


@pytest.mark.parametrize("tie", [False, True])
def test_the_lm_is_as_large_as_its_weights(script, tie):
    lm = small_lm(tie_word_embeddings=tie).to(torch.bfloat16)
    shape = script.Shape.of(lm.config)
    assert script.lm_bytes(shape, settings(script, dtype="bfloat16")) == nbytes(lm.parameters())


def test_4_bit_weights_are_half_a_byte_and_their_scales(script, tmp_path):
    small_lm().to(torch.bfloat16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    held = sum(p.nbytes + (p.quant_state.absmax.nbytes if hasattr(p, "quant_state") else 0) for p in lm.parameters())
    shape = script.Shape.of(small_config())
    assert script.lm_bytes(shape, settings(script, dtype="bfloat16", load_in_4bit=True)) == held


def test_layers_that_are_no_nn_linear_count_too(script):
    shape = script.Shape.of(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96))
    assert shape.linear == 2 * 12 * 64 * 64


# What a rollout holds


@pytest.mark.parametrize("lengths", [(40, 50), (5, 40), (300, 45)])
def test_the_cache_is_as_large_as_the_one_that_generate_fills(script, lengths):
    prompt, new = lengths
    lm = small_lm()
    model = ProxyModelForCausalLM(lm, ProxyConfig())
    ids = torch.randint(4, 96, (3, prompt))
    output = model.generate(ids, max_new_tokens=new, eos_token_id=None, return_dict_in_generate=True)
    held = nbytes(x for layer in output.past_key_values.layers for x in layer.room.values())
    args = settings(script, prompt_tokens=prompt, max_completion_length=new)
    assert script.cache_bytes(script.Shape.of(lm.config), args, 3, script.gate_slots(args)) == held


def test_candidate_features_have_room_for_all_candidates(script, monkeypatch):
    capacities, init = [], RowCache.__init__
    monkeypatch.setattr(RowCache, "__init__", lambda self, *a: (init(self, *a), capacities.append(self.capacity))[0])
    model = ProxyModelForCausalLM(small_lm(), ProxyConfig(features="candidate", max_candidates=4))
    model.generate(torch.randint(4, 96, (2, PROMPT)), max_new_tokens=NEW, eos_token_id=None)
    assert capacities[-1] == script.gate_slots(settings(script, features="candidate"))  # after a trial of the LM


@pytest.mark.parametrize("layers", [[-1], [0, 1]])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_the_record_is_as_large_as_the_rollout(script, with_random_gate, features, pooled, layers):
    read = {"features": features, "feature_layers": layers, "pooled_features": pooled}
    config = ProxyConfig(**read, gate_hidden_sizes=[64], max_candidates=4, p_t=1e-3)
    model = with_random_gate(small_lm(), config)
    ids = torch.randint(4, 96, (6, PROMPT))
    rollout = model.generate(ids, max_new_tokens=NEW, eos_token_id=None, output_rollout=True).rollout
    padded = rollout.mask.shape[1] / NEW
    args = settings(script, **read, decisions_per_token=padded)
    shape = script.Shape.of(model.lm.config)
    assert script.rollout_bytes(shape, args, 6) == nbytes(rollout) - nbytes([rollout.token_log_probs])
    assert script.proxy_parameters(shape, args) == model.get_nb_trainable_parameters()[0]
    assert script.feature_size(shape, args) == model.rollout_features(rollout).shape[1]


# What training holds and does


def reward(prompts, completions, **kwargs):
    return [float(len(set(x))) for x in completions]


def trainer_arguments(folder, steps: int) -> dict:
    shared = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    ppo = {"num_generations": 4, "per_device_train_batch_size": 8, "steps_per_generation": 1, "num_iterations": 2}
    lengths = {"max_completion_length": NEW, "max_steps": steps, "logging_steps": 1}
    return {"output_dir": str(folder), **shared, **ppo, **lengths}


def train(trainer, *modes) -> dict:
    """Trains under these modes, without end of sequence; returns what was logged first."""
    trainer.generation_config.eos_token_id = None
    step = trainer.training_step

    def clean_step(*args, **kwargs):
        gc.collect(0)  # what a step leaves behind in reference cycles is no need
        return step(*args, **kwargs)

    trainer.training_step = clean_step
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(("features", "pooled", "replay"), [("prefix", True, 2), ("candidate", False, 1)])
def test_training_a_gate(script, tmp_path, tiny_tokenizer, features, pooled, replay):
    sizes = {"gate_hidden_sizes": [64], "max_candidates": 4}
    config = ProxyConfig(features=features, pooled_features=pooled, p_t=1e-3, initial_accept_bias=0.5, **sizes)
    trainer = ProxyPPOTrainer(
        ProxyModelForCausalLM(small_lm(), config),
        reward_funcs=reward,
        args=ProxyPPOConfig(**trainer_arguments(tmp_path, 2 * replay), replay_rollouts=replay, learning_rate=0.0),
        train_dataset=Dataset.from_dict({"prompt": ["x" * PROMPT] * 64}),
        processing_class=tiny_tokenizer,
    )
    live = LiveBytes()
    logged = train(trainer, live)
    assert logged["accepted_rank"] > 0.2  # it rejects
    shape = script.Shape.of(small_config())
    args = settings(
        script,
        features=features,
        pooled_features=pooled,
        replay_rollouts=replay,
        decisions_per_token=logged["decisions_per_token"],
    )
    memory = script.gate_memory(shape, args)
    assert live.peak == pytest.approx(memory.peak, rel=0.2)

    gate = [p for p in trainer.model.parameters() if p.requires_grad]
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.dim()]
    assert 2 * nbytes(gate) + nbytes(moments) == memory.trained  # gradients are as large as weights


def test_training_the_lm_by_ppo(script, tmp_path, tiny_tokenizer, monkeypatch):
    # On a CPU a tile of logits has this width whatever the vocabulary.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 96)
    live = LiveBytes()
    trainer = PPOTrainer(
        small_lm(),
        reward_funcs=reward,
        args=PPOConfig(**trainer_arguments(tmp_path, 2), beta=0.05),
        train_dataset=Dataset.from_dict({"prompt": ["x" * PROMPT] * 64}),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    train(trainer, live)
    args, shape = settings(script), script.Shape.of(small_config())
    adapter = [p for name, p in trainer.model.named_parameters() if "lora_" in name]
    assert script.lora_parameters(shape, args) == sum(p.numel() for p in adapter)
    memory = script.ppo_memory(shape, args)
    assert live.peak == pytest.approx(memory.peak, rel=0.2)
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.dim()]
    assert 2 * nbytes(adapter) + nbytes(moments) == pytest.approx(memory.trained, rel=0.01)  # and a value head's


def test_a_reward_model_counts(script):
    shape, args = script.Shape.of(small_config()), settings(script, reward_parameters=1e6)
    without = dataclasses.replace(args, reward_parameters=0.0)
    for memory in (script.gate_memory, script.ppo_memory):
        assert memory(shape, args).peak - memory(shape, without).peak == pytest.approx(2e6)


# The command


def test_the_guide_shows_what_it_prints(script, capsys):
    script.print_sizing(*script.make_parser().parse_args_and_config([]))
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "guide.md").read_text()


def test_it_takes_a_recipe_and_a_folder(script, tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    recipe = str(ROOT / "scripts" / "recipes" / "paper.yaml")
    flags = ["--config", recipe, "--model_name_or_path", str(tmp_path), "--lora_r", "4"]
    (args,) = script.make_parser().parse_args_and_config(flags, fail_with_unknown_args=False)
    assert (args.features, args.gate_hidden_sizes, args.load_in_4bit) == ("candidate", [1024, 256], True)
    script.print_sizing(args)
    printed = capsys.readouterr().out
    assert "gate, candidate" in printed
    assert "LoRA r=4" in printed


def test_mistakes_are_one_sentence(script):
    with pytest.raises(ValueError, match="--prompt_tokens must be above 0, got 0"):
        settings(script, prompt_tokens=0)
    with pytest.raises(ValueError, match="--dtype must be"):
        settings(script, dtype="int8")
    with pytest.raises(ValueError, match="`features` must be one of"):
        settings(script, features="suffix")
