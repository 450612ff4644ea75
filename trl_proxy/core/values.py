"""Values of the types that their fields take: in a configuration, within the field's bounds, and in what was read from
JSON."""

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any

# A name means the same in every configuration, TRL's and transformers' included.
_BOUNDS = {
    "at least 1": (
        "max_candidates gate_hidden_sizes max_completion_length max_new_tokens max_length num_generations "
        "num_generations_eval num_iterations steps_per_generation generation_batch_size per_device_train_batch_size "
        "per_device_eval_batch_size gradient_accumulation_steps replay_rollouts rollout_batch_size "
        "reward_shaping_tokens batch_size best_of num_prompts num_pair_prompts samples_per_prompt "
        "sampling_batch_size jobs lora_r lora_alpha dataset_num_proc precompute_ref_batch_size pad_to_multiple_of "
        "num_completions_to_print save_total_limit torch_empty_cache_steps ddp_bucket_cap_mb ref_model_sync_steps "
        "dataloader_prefetch_factor eval_accumulation_steps"
    ),
    "at least 1, or -1 to train for `num_train_epochs`": "max_steps",
    "at least 0": (
        "learning_rate weight_decay adam_epsilon max_grad_norm vf_coef beta warmup_steps seed data_seed seeds top_k "
        "initial_accept_bias eval_delay dataloader_num_workers "
        "neftune_noise_alpha router_aux_loss_coef"
    ),
    "above 0": (
        "temperature epsilon epsilon_high cliprange_value missing_eos_penalty reward_timeout max_train_seconds "
        "repetition_penalty num_train_epochs eval_steps save_steps logging_steps ddp_timeout"
    ),
    "in [0, 1]": "gamma gae_lambda adam_beta1 adam_beta2 min_p lora_dropout ref_model_mixup_alpha",
    "in (0, 1]": "top_p p_t",
}
BOUNDS = {name: allowed for allowed, names in _BOUNDS.items() for name in names.split()}
_IS_ALLOWED = {
    "at least 1": lambda x: x >= 1,
    "at least 0": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "at least 1, or -1 to train for `num_train_epochs`": lambda x: x >= 1 or x == -1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}
# Limits: infinity is no limit.
_MAY_BE_INFINITE = (
    *("epsilon", "epsilon_high", "cliprange_value", "max_grad_norm", "reward_clip_range"),
    *("reward_timeout", "max_train_seconds"),
)
# Options that take a file's path in place of a dict.
DICT_OR_PATH = ("accelerator_config", "deepspeed", "fsdp_config")

# A type -> the values that it stands for, what one is called, and what several are.
_TYPES: dict[Any, tuple[Any, str, str]] = {
    str: (str, "text", "texts"),
    bool: (bool, "true or false", "true or false"),
    int: (Integral, "a whole number", "whole numbers"),
    float: (Real, "a number", "numbers"),
    list: ((list, tuple), "a list", "lists"),
    dict: (dict, "a dict", "dicts"),
    NoneType: (NoneType, "null", "nulls"),
}


def type_flaw(value: Any, hint: Any, name: str) -> str | None:
    """
    What is wrong with a value, None if nothing is.

    Args:
        hint: its type: one of `_TYPES`, a list or dict of one, a tuple, a `Literal`, a union, `Any`, or a `TypedDict`,
            whose further keys may be anything.
        name: of the value, as the sentence has it.
    """
    if hint is Any:
        return None
    kinds = _alternatives(hint)
    fitting = [kind for kind in kinds if _is_of(value, kind)]
    if not fitting:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
        return f"{name} must be {' or '.join(map(_named, kinds))}, got {shown}"
    flaws = [next(_part_flaws(value, kind, name), None) for kind in fitting]
    return None if None in flaws else flaws[0]


def _alternatives(hint) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _container(kind: Any) -> Any:
    """The entry of `_TYPES` that a type belongs to; a `Literal` has none."""
    origin = typing.get_origin(kind) or kind
    return dict if typing.is_typeddict(kind) else list if origin is tuple else origin


def _is_of(value: Any, kind: Any) -> bool:
    container = _container(kind)
    if container is typing.Literal:
        return value in typing.get_args(kind)
    is_number = container in (int, float)
    return isinstance(value, _TYPES[container][0]) and not (is_number and isinstance(value, bool))


def _parts(kind: Any) -> list:
    """The types of a list's items; none if they may be anything."""
    return [one for part in typing.get_args(kind) if part is not Ellipsis for one in _alternatives(part)]


def _named(kind: Any, several: bool = False) -> str:
    container = _container(kind)
    if container is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if container is list and (parts := _parts(kind)):
        return f"a list of {' or '.join(dict.fromkeys(_named(part, True) for part in parts))}"
    _, one, more = _TYPES[container]
    return more if several else one


def _part_flaws(value: Any, kind: Any, name: str) -> Iterator[str]:
    """The flaws of what a list or a dict holds."""
    parts = typing.get_args(kind)
    named: Iterable[tuple[str, Any, Any]] = ()
    if typing.is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - value.keys()):
            yield f"{name} lacks {', '.join(missing)}"
        named = [(key, value[key], hint) for key, hint in typing.get_type_hints(kind).items() if key in value]
    elif isinstance(value, dict) and parts:
        named = [(key, part, parts[1]) for key, part in value.items()]
    elif typing.get_origin(kind) is tuple and Ellipsis not in parts:
        if len(value) != len(parts):
            yield f"{name} must have {len(parts)} entries, got {len(value)}"
        named = [(str(i), part, hint) for i, (part, hint) in enumerate(zip(value, parts))]
    elif isinstance(value, list | tuple) and parts:
        named = ((str(i), part, parts[0]) for i, part in enumerate(value))
    for key, part, hint in named:
        if flaw := type_flaw(part, hint, f"{name}.{key}" if name else key):
            yield flaw


# Configurations


def is_json_object(text: str) -> bool:
    """Whether a text is the JSON of a dict."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@functools.cache
def _kinds(kind: type) -> dict[str, tuple]:
    """The types that each field of a dataclass takes, of the fields that take what JSON has."""
    found = {name: _alternatives(hint) for name, hint in typing.get_type_hints(kind).items()}
    return {name: kinds for name, kinds in found.items() if all(map(_is_of_json, kinds))}


def _is_of_json(kind: Any) -> bool:
    container = _container(kind)
    return container is typing.Literal or (
        container in _TYPES and (container is not list or all(map(_is_of_json, _parts(kind))))
    )


def check_values(config) -> None:
    """Checks the fields of a dataclass: their types, and the bounds above.

    Raises:
        ValueError: a value of another type than the field's, such as a text for a number or a number for a dict; NaN;
            a number out of its bounds. The message names the field, its value and what is allowed.
    """
    kinds = _kinds(config.__class__)
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name, None)) is field.default:
            continue
        if field.name in kinds and isinstance(value, Real | str | list | tuple | dict | NoneType):
            _check_kind(field.name, value, kinds[field.name])
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, Real) and not isinstance(number, bool):
                _check_bounds(field.name, value, number)
    low_high = getattr(config, "reward_clip_range", None)
    if low_high is not None and not low_high[0] < low_high[1]:
        raise ValueError(f"`reward_clip_range` must be a smaller and a larger number, got {low_high}.")


def _check_kind(name: str, value: Any, kinds: tuple) -> None:
    if isinstance(value, str) and any(_container(kind) is list and str in _parts(kind) for kind in kinds):
        return  # TRL and PEFT take one text for a list of one
    if dict in map(_container, kinds):
        kinds = tuple(kind for kind in kinds if kind is not str)
        if isinstance(value, str) and (name in DICT_OR_PATH or is_json_object(value)):
            return
    if all(type_flaw(value, kind, name) for kind in kinds):
        allowed = " or ".join(_named(kind) for kind in kinds if kind is not NoneType)
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def _check_bounds(name: str, value: Any, number: Any) -> None:
    if math.isnan(number) or (math.isinf(number) and name not in _MAY_BE_INFINITE):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")
    if name in BOUNDS and not _IS_ALLOWED[BOUNDS[name]](number):
        raise ValueError(f"`{name}` must be {BOUNDS[name]}, got {value}.")
