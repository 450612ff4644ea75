"""Values of a configuration: the wrong kind, NaN and what is out of bounds is refused by name, before work starts."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import pytest

from baselines.grpo import GuardedGRPOConfig
from baselines.training import make_parser
from eval import runner
from eval.jobs import CompareArguments
from trl_proxy import PPOConfig, ProxyConfig, ProxyPPOConfig
from trl_proxy.core.values import BOUNDS, check_values
from trl_proxy.runs.arguments import RunArguments
from trl_proxy.trainer.fields import PROXY, Field

NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class Everything:
    """A field of each kind."""

    whole: int = 1
    fraction: float = 1.0
    maybe: int | None = None
    several: list[int] = dataclasses.field(default_factory=lambda: [1])
    pair: tuple[float, float] | None = None
    either: float | list[float] = 1.0
    text: str = "x"
    number_or_text: int | str | None = None
    flag: bool = True
    names: list[str] | None = None
    mapping: dict | str | None = None
    deepspeed: dict | str | None = None
    choice: Literal["a", "b"] = "a"
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    temperature: float = 1.0
    cliprange_value: float = 1.0


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(("whole", value, "a whole number") for value in (12.5, "1", None, [1], True, {}, NAN)),
        *(("fraction", value, "a number") for value in ("1e-5", None, [1.0], False, (1.0,))),
        *(("maybe", value, "a whole number") for value in (0.5, "none", [])),
        *(("several", value, "a list of whole numbers") for value in (1, None, [0.5], ["1"], [[1]], [None], "12")),
        ("pair", 1.0, "a list of numbers"),
        ("either", "1", "a number or a list of numbers"),
        *((name, NAN, "a finite number") for name in ("fraction", "temperature", "cliprange_value")),
        *(("text", value, "text") for value in (5, None, ["x"], {"a": 1}, True)),
        *(("flag", value, "true or false") for value in ("no", None, 0, [])),
        *(("names", value, "a list of texts") for value in (5, [1], ["a", None], {})),
        *(("mapping", value, "a dict") for value in (5, [1], "[1]", "{", "5", "word", True)),
        *(("deepspeed", value, "a dict") for value in (5, [1])),
        *(("choice", value, "one of a, b") for value in ("c", None, ["a"])),
        ("number_or_text", NAN, "a whole number or text"),
        ("fraction", INF, "a finite number"),
        ("either", [1.0, -INF], "a finite number"),
        ("seeds", [0, -1], "at least 0"),
        ("temperature", 0, "above 0"),
    ],
)
def test_a_wrong_value_is_named(field, value, allowed):
    with pytest.raises(ValueError, match=rf"^`{field}` must be {allowed}, got ") as refused:
        check_values(Everything(**{field: value}))
    assert str(value) in str(refused.value)


def test_other_values_pass():
    check_values(Everything(whole=-3, fraction=2, maybe=None, several=[], pair=(0, 1), text=""))
    check_values(Everything(either=[1, 2.5], number_or_text="1e5", cliprange_value=INF, seeds=(1, 2), fraction=1e-8))
    check_values(Everything(flag=False, names="one", mapping='{"a": 1}', deepspeed="a/path", choice="b", text=Path()))
    check_values(Everything(names=["a"], mapping={}, deepspeed={}))


REFUSED = [
    *((ProxyConfig, name, value) for name, value in (("p_t", None), ("p_t", NAN), ("max_candidates", 2.5))),
    *((ProxyConfig, "initial_accept_bias", value) for value in (NAN, -1.0)),
    *((ProxyConfig, "threshold", value) for value in (None, "0", INF)),
    *((ProxyConfig, "gate_hidden_sizes", value) for value in (256, [], [0], [12.5])),
    *((ProxyConfig, "feature_layers", value) for value in (-1, [1.5], None)),
    *((ProxyPPOConfig, name, 0) for name in ("rollout_batch_size", "replay_rollouts", "num_generations")),
    *((ProxyPPOConfig, name, 12.5) for name in ("max_completion_length", "replay_rollouts", "reward_shaping_tokens")),
    *(
        (ProxyPPOConfig, name, NAN)
        for name in ("lm_logp_coef", "entropy_coef", "learning_rate", "missing_eos_penalty")
    ),
    *((ProxyPPOConfig, name, -0.5) for name in ("beta", "vf_coef", "cliprange_value", "max_grad_norm", "gamma")),
    (ProxyPPOConfig, "rollout_batch_size", -4),
    (ProxyPPOConfig, "reward_clip_range", (1.0, -1.0)),
    (ProxyPPOConfig, "reward_weights", [1.0, NAN]),
    (PPOConfig, "num_iterations", 0),
    *(
        (PPOConfig, name, value)
        for name in ("lr_scheduler_kwargs", "model_init_kwargs", "chat_template_kwargs")
        for value in (5, "[1]")
    ),
    *((PPOConfig, name, -1) for name in ("logging_steps", "save_total_limit", "ref_model_sync_steps", "save_steps")),
    *((PPOConfig, "max_steps", value) for value in (-5, 0)),
    (PPOConfig, "log_completions", "no"),
    (ProxyConfig, "pooled_features", "no"),
    (ProxyConfig, "decoding", 5),
    (ProxyConfig, "base_model_name_or_path", 5),
    (PPOConfig, "generation_kwargs", "word"),
    (GuardedGRPOConfig, "temperature", -1.0),
    (RunArguments, "max_train_seconds", 0),
]


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED)
def test_every_configuration_checks_itself(kind, name, value, tmp_path):
    place = {"output_dir": str(tmp_path)} if hasattr(kind, "output_dir") else {}
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        kind(**{name: value}, **place)


def test_every_bound_is_of_an_option():
    """A name in a table that no configuration has would bound nothing."""
    known = {action.dest for method in ("proxy", "ppo", "grpo", "dpo") for action in make_parser(method)._actions}
    known |= {field.name for field in dataclasses.fields(CompareArguments)} | {"jobs"}
    assert set(BOUNDS) <= known


def test_every_number_that_training_uses_is_bounded():
    """Else a negative one would mean nothing, silently."""
    either_sign = {
        "entropy_coef",
        "lm_logp_coef",
        "reward_weights",
        "reward_clip_range",
        "threshold",
        "feature_layers",
    }
    parser = make_parser("proxy")
    of_numbers = {name for name, kinds in parser._kinds.items() if kinds.keys() & {int, float}}
    of_numbers |= {name for name, kinds in parser._kinds.items() if get_args(kinds.get(list)) in ((int,), (float,))}
    used = {name for name in of_numbers & parser._named.keys() if PROXY.get(name, Field()).status == "used"}
    assert used - either_sign - {"local_rank"} <= set(BOUNDS)


@pytest.mark.parametrize(
    ("script", "given", "wrong"),
    [
        ("proxy", {}, ("word",)),
        ("compare", {"methods": "[sft]"}, ("null", "[1, 2]", "{a: 1}", ".nan")),
    ],
)
def test_no_recipe_ends_in_a_traceback(script, given, wrong, tmp_path):
    """Every option with values of the wrong kind: taken, or refused in a sentence."""
    parser = make_parser("proxy") if script == "proxy" else runner.make_parser()
    recipe, refused = tmp_path / "recipe.yaml", 0
    for name in parser._named:
        for value in wrong:
            settings = {"output_dir": str(tmp_path), "use_cpu": "true", **given, name: value}
            recipe.write_text("".join(f"{key}: {text}\n" for key, text in settings.items()))
            try:
                parser.parse_args_and_config(["--config", str(recipe)])
            except (ValueError, ImportError, FileNotFoundError):  # those that a script prints as one sentence
                refused += 1
    assert refused > len(parser._named) * len(wrong) / 2
