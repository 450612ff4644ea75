"""Every field of TRL's configurations is used, refused, or warned about."""

import dataclasses
import json
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig, ProcessorMixin
from trl import BEMACallback, ModelConfig, ScriptArguments

from baselines.training import LoraModelConfig, make_parser
from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.runs.arguments import FrozenModelConfig, RunArguments, load_policy
from trl_proxy.trainer import card, fields

TABLES = {
    ProxyPPOConfig: fields.PROXY,
    PPOConfig: fields.PPO,
    FrozenModelConfig: fields.FROZEN_LM,
    LoraModelConfig: fields.TRAINED_LM,
}
PROMPTS = [f"{a}{b} " for a in "abcd" for b in "ijkl"]


def cases(status):
    return [(kind, name) for kind, table in TABLES.items() for name, entry in table.items() if entry.status == status]


def away(kind, name):
    """A value that is not the field's default."""
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if isinstance(default, str):
        return default + "x"
    hint = get_type_hints(kind)[name]
    kinds = [get_origin(one) or one for one in (get_args(hint) if get_origin(hint) is not None else [hint])]
    for one, value in ((bool, True), (float, 0.5), (int, 5), (dict, {"a": 1}), (list, ["a"]), (str, "a")):
        if one in kinds:
            return value
    return "a"


def unchecked(kind, **values):
    """A configuration of these values and defaults for which nothing was run yet."""
    config = object.__new__(kind)
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        setattr(config, f.name, values.get(f.name, default))
    return config


@pytest.fixture
def warned(monkeypatch):
    warnings = []
    monkeypatch.setattr(fields.logger, "warning_once", warnings.append)
    return warnings


@pytest.mark.parametrize("kind", TABLES)
def test_every_field_is_in_the_table(kind):
    assert {f.name for f in dataclasses.fields(kind)} == set(TABLES[kind])


def test_every_field_of_the_scripts_is_in_the_table():
    assert {f.name for f in dataclasses.fields(ScriptArguments)} == set(fields.SCRIPT)
    assert {f.name for f in dataclasses.fields(ModelConfig)} == set(fields.FROZEN_LM) == set(fields.TRAINED_LM)


@pytest.mark.fault
@pytest.mark.parametrize(("kind", "name"), cases("refused"), ids=lambda x: getattr(x, "__name__", x))
def test_a_refused_field_is_one_sentence(kind, name):
    value = away(kind, name)
    with pytest.raises(ValueError, match=f"`{name}=") as error:
        kind(**{name: value} | ({"output_dir": "x"} if "output_dir" in TABLES[kind] else {}))
    assert str(error.value) == f"`{name}={value!r}` is not supported: {TABLES[kind][name].why}."


@pytest.mark.parametrize(("kind", "name"), cases("no effect"), ids=lambda x: getattr(x, "__name__", x))
def test_a_field_without_effect_is_one_warning(kind, name, warned):
    value = away(kind, name)
    fields.check_fields(unchecked(kind, **{name: value}), TABLES[kind])
    assert warned == [f"`{name}={value!r}` has no effect: {TABLES[kind][name].why}."]


@pytest.mark.parametrize("method", ["proxy", "ppo", "rloo", "grpo", "dpo"])
def test_nothing_is_said_of_what_nobody_set(method, warned):
    make_parser(method).parse_args_and_config(["--output_dir", "x", "--use_cpu"])
    assert not warned


@pytest.mark.parametrize(("kind", "name"), cases("used"), ids=lambda x: getattr(x, "__name__", x))
def test_a_field_that_needs_another(kind, name, warned):
    """It warns without the other, and nothing else that is used does."""
    needs, value = TABLES[kind][name].needs, away(kind, name)
    others = {"use_peft": False} if needs == "use_peft" else {}
    fields.check_fields(unchecked(kind, **{name: value} | others), TABLES[kind])
    assert warned == ([f"`{name}={value!r}` has no effect: `{needs}` is off."] if needs else [])
    warned.clear()
    if needs:
        fields.check_fields(unchecked(kind, **{name: value, needs: True}), TABLES[kind])
        assert warned == []


@pytest.mark.parametrize("kind", TABLES)
def test_defaults_say_nothing_and_a_copy_neither(kind, warned):
    config = kind(**({"output_dir": "x"} if "output_dir" in TABLES[kind] else {}))
    dataclasses.replace(config, **({"generation_batch_size": None} if "output_dir" in TABLES[kind] else {}))
    assert warned == []


@pytest.mark.fault
@pytest.mark.parametrize("name", ["max_completion_length", "num_generations"])
@pytest.mark.parametrize("kind", [PPOConfig, ProxyPPOConfig])
def test_a_rollout_has_a_size(kind, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a number, got None"):
        kind(output_dir="x", **{name: None})


@pytest.mark.fault
@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("proxy", ["--use_peft"], "`use_peft=True` is not supported: the LM is frozen"),
        ("proxy", ["--lora_r", "8"], "`lora_r=8` is not supported"),
        ("proxy", ["--lora_target_modules", "q_proj"], r"`lora_target_modules=\['q_proj'\]` is not supported"),
        ("proxy", ["--top_k", "5"], "`top_k=5` is not supported: the gate's candidates take its place"),
        ("proxy", ["--ignore_bias_buffers"], "`ignore_bias_buffers=True` is not supported"),
        ("ppo", ["--ignore_bias_buffers", "true"], "`ignore_bias_buffers=True` is not supported"),
        ("dpo", ["--ignore_bias_buffers", "true"], "`ignore_bias_buffers=True` is not supported"),
        ("proxy", ["--max_completion_length", "none"], "`max_completion_length` must be a number"),
        ("proxy", ["--vllm_structured_outputs_regex", "a+"], "it sets up vLLM"),
    ],
)
def test_a_refused_flag_ends_a_script_as_it_starts(method, words, message):
    with pytest.raises(ValueError, match=message):
        make_parser(method).parse_args_and_config(["--output_dir", "x", *words])


# What the trainers do with them


def any_reward(prompts, completions, **kwargs):
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture
def trainer_of(tmp_path, tiny_lm, tiny_tokenizer):
    """`trainer_of(kind, lm=None, arguments={}, **config)` -> a ProxyPPOTrainer or a PPOTrainer."""

    def build(kind=ProxyPPOTrainer, lm=None, arguments=(), dataset=None, **config):
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 16,
            "num_generations": 2,
            "num_iterations": 1,
            "max_completion_length": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            **config,
        }
        torch.manual_seed(0)
        lm = lm or tiny_lm("llama")
        proxy = kind is ProxyPPOTrainer
        return kind(
            **{
                "model": ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.001, gate_hidden_sizes=[8])) if proxy else lm,
                "reward_funcs": any_reward,
                "args": (ProxyPPOConfig if proxy else PPOConfig)(**settings),
                "train_dataset": dataset or Dataset.from_dict({"prompt": PROMPTS}),
                "processing_class": tiny_tokenizer,
                **dict(arguments),
            }
        )

    return build


def rollout(trainer):
    trainer.model.train()
    torch.manual_seed(1)
    return trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:8] for _ in range(2)])


@pytest.mark.parametrize("kind", [ProxyPPOTrainer, PPOTrainer])
def test_whitening_has_a_switch(trainer_of, kind):
    shared = {"beta": 0.0} | ({"replay_rollouts": 1} if kind is ProxyPPOTrainer else {})
    plain, whitened = (rollout(trainer_of(kind, normalize_advantages=on, **shared)) for on in (False, True))
    mask = plain["action_mask"]
    assert torch.equal(mask, whitened["action_mask"])
    advantages = plain["advantages_per_step"][mask]
    assert abs(advantages.std(correction=0) - 1) > 0.05, "they are whitened"
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(whitened["advantages_per_step"][mask], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain["returns"], whitened["returns"])


@pytest.mark.parametrize("kind", [ProxyPPOTrainer, PPOTrainer])
def test_a_response_that_was_cut_off_can_be_left_out(trainer_of, kind, tmp_path):
    shared = {"beta": 0.0} | ({"replay_rollouts": 1} if kind is ProxyPPOTrainer else {})
    trainer = trainer_of(kind, mask_truncated_completions=True, **shared)
    cut = iter([True, False] * 4 + [True] * 8)
    whole = trainer._generate_single_turn
    end = trainer._tokenizer.eos_token_id
    trainer._generate_single_turn = lambda *args: [
        ids if next(cut) else [*ids[:-1], end] for ids in ([x for x in row if x != end] or [5] for row in whole(*args))
    ]
    output = rollout(trainer)
    learns = output["action_mask"].any(-1).tolist()
    assert not any(learns[i] for i in (0, 2, 4, 6, *range(8, 16)))
    assert any(learns[i] for i in (1, 3, 5, 7))
    assert not output["advantages_per_step"][~output["action_mask"]].any()


def test_a_run_of_cut_responses_learns_nothing_and_logs_numbers(trainer_of, tiny_lm):
    lm = tiny_lm("llama", tie=False)
    with torch.no_grad():
        lm.lm_head.weight[2] = 0.0  # of the end of sequence
    trainer = trainer_of(lm=lm, mask_truncated_completions=True)
    before = {name: x.clone() for name, x in trainer.model.gate.mlp.state_dict().items()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["completions/clipped_ratio"] == 1.0, "a response has ended"
    assert all(torch.equal(x, before[name]) for name, x in trainer.model.gate.mlp.state_dict().items())
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_mixture_of_experts_is_balanced(trainer_of, tiny_tokenizer):
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        eos_token_id=2,
        pad_token_id=0,
    )
    evaluated, logged = {}, {}
    for coefficient in (0.0, 0.5):
        for found in (evaluated, logged):
            torch.manual_seed(0)
            trainer = trainer_of(
                PPOTrainer, AutoModelForCausalLM.from_config(config), router_aux_loss_coef=coefficient, beta=0.0
            )
            if found is evaluated:
                trainer.evaluate(trainer.train_dataset)
            else:
                trainer.train()
            found[coefficient] = {name.removeprefix("eval_"): x for name, x in trainer.state.log_history[0].items()}
    for found in (evaluated, logged):
        assert found[0.5]["aux_loss"] > 0
        assert "aux_loss" not in found[0.0]
        difference = found[0.5]["loss"] - found[0.0]["loss"]
        assert difference == pytest.approx(0.5 * found[0.5]["aux_loss"], rel=0.02)


class Processor(ProcessorMixin):
    def __init__(self):
        pass


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ProxyPPOTrainer, {"peft_config": LoraConfig()}, "ProxyPPOTrainer takes no `peft_config`: the LM is frozen"),
        (ProxyPPOTrainer, {"quantization_config": object()}, "takes no `quantization_config`: the LM is loaded"),
        (ProxyPPOTrainer, {"tools": []}, "takes no `tools`: a response is one turn"),
        (ProxyPPOTrainer, {"compute_metrics": len}, "takes no `compute_metrics`: evaluation keeps no predictions"),
        (ProxyPPOTrainer, {"nonsense": 1}, "takes no `nonsense`: it takes those of RLOOTrainer"),
        (PPOTrainer, {"nonsense": 1}, "PPOTrainer takes no `nonsense`: it takes those of RLOOTrainer"),
        (ProxyPPOTrainer, {"callbacks": [BEMACallback()]}, "BEMACallback is not supported"),
        (ProxyPPOTrainer, {"processing_class": Processor()}, "is a Processor, but images are not supported"),
        (PPOTrainer, {"processing_class": Processor()}, "is a Processor, but images are not supported"),
    ],
)
def test_refused_arguments_are_one_sentence(trainer_of, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(kind, arguments=arguments)


@pytest.mark.fault
@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(trainer_of, column):
    rows = Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS})
    with pytest.raises(
        ValueError, match=f"`train_dataset` has a column `{column}`, which TRL's trainers read as pictures"
    ):
        trainer_of(dataset=rows)
    with pytest.raises(ValueError, match=f"`eval_dataset`.*has a column `{column}`, which TRL's trainers"):
        trainer_of(arguments={"eval_dataset": {"a": rows}})


def test_what_is_not_set_may_be_given_as_none(trainer_of):
    trainer = trainer_of(arguments={"peft_config": None, "quantization_config": None, "callbacks": None})
    with pytest.raises(ValueError, match="BEMACallback is not supported"):
        trainer.add_callback(BEMACallback)


def test_the_card_says_what_was_trained(trainer_of, tmp_path, monkeypatch):
    trainer = trainer_of()
    trainer.create_model_card(tags="mine")
    text = (tmp_path / "README.md").read_text()
    rewards = ", ".join(f"1 x `{name}`" for name in trainer.reward_func_names)
    assert f"with `trl-proxy` on the prompts given to the trainer for 0 steps, on the reward {rewards}.\n" in text
    assert "\n- mine\n" in text
    assert "hf_jobs" not in text

    trainer.state.log_history = [{"eval_reward": 0.25}, {"loss": 1.0}, {"eval_reward": 0.75}, {"eval_reward": 0.5}]
    for name in ("trackio_space", "comet_experiment"):
        monkeypatch.setattr(card, f"get_{name}_url", lambda name=name: f"https://x.org/{name}")
    monkeypatch.setenv("JOB_ID", "1")
    trainer.create_model_card("name", "data", tags=["mine", "trl"])
    text = (tmp_path / "README.md").read_text()
    assert (
        f"on data for 0 steps, on the reward {rewards}. On the validation prompts the reward was 0.250 at first, "
        "0.750 at best. Its training is logged at [Trackio](https://x.org/trackio_space), [Comet](https://x.org/comet_"
        "experiment).\n"
    ) in text
    for tag in ("trl", "trl-proxy", "mine", "hf_jobs", "trackio:https://x.org/trackio_space"):
        assert text.count(f"\n- {tag}\n") == 1, tag


# The LM's


def test_model_init_kwargs_reach_the_lm(tiny_lm, tiny_tokenizer, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    args = ProxyPPOConfig(output_dir="x", use_cpu=True, model_init_kwargs={"rms_norm_eps": 0.25})
    assert load_policy(FrozenModelConfig(str(tmp_path)), args, "cpu")[0].config.rms_norm_eps == 0.25


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float32"}, "`model_init_kwargs` must not set `dtype`: use --dtype"),
        ({"revision": "x"}, "`model_init_kwargs` must not set `revision`: use --model_revision"),
        ({"nonsense": 1}, "`model_init_kwargs` {'nonsense': 1} do not suit the LM"),
    ],
)
def test_bad_model_init_kwargs(tiny_lm, tiny_tokenizer, tmp_path, kwargs, message):
    tiny_lm("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    args = ProxyPPOConfig(output_dir="x", use_cpu=True, model_init_kwargs=kwargs)
    with pytest.raises(ValueError, match=message):
        load_policy(FrozenModelConfig(str(tmp_path)), args, "cpu")


@pytest.mark.fault
def test_only_the_hub_has_revisions(tmp_path):
    args = ProxyPPOConfig(output_dir="x", use_cpu=True)
    for name, what in ((None, "embedded LM"), ("embedded", "embedded LM"), (str(tmp_path), f"folder {tmp_path}")):
        with pytest.raises(ValueError, match=f"The {what} has no revision v1: leave out --model_revision"):
            load_policy(FrozenModelConfig(name, model_revision="v1"), args, "cpu")


def test_the_run_knows_what_was_asked():
    (run_args, *_) = make_parser("proxy").parse_args_and_config(["--output_dir", "x", "--seed", "3"])
    assert isinstance(run_args, RunArguments)
    assert run_args.asked == {"output_dir": "x", "seed": 3}
