"""Values of the types that their fields take: numbers in a configuration, within the field's bounds, and what was read
from JSON."""

import dataclasses
import functools
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
        "num_completions_to_print"
    ),
    "at least 0": (
        "learning_rate weight_decay adam_epsilon max_grad_norm vf_coef beta warmup_steps seed data_seed seeds top_k "
        "initial_accept_bias eval_delay dataloader_num_workers"
    ),
    "above 0": (
        "temperature epsilon epsilon_high cliprange_value missing_eos_penalty reward_timeout max_train_seconds "
        "repetition_penalty num_train_epochs eval_steps save_steps ddp_timeout"
    ),
    "in [0, 1]": "gamma gae_lambda adam_beta1 adam_beta2 min_p lora_dropout",
}
BOUNDS = {name: allowed for allowed, names in _BOUNDS.items() for name in names.split()}
_IS_ALLOWED = {
    "at least 1": lambda x: x >= 1,
    "at least 0": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}
# Limits: infinity is no limit.
_MAY_BE_INFINITE = (
    *("epsilon", "epsilon_high", "cliprange_value", "max_grad_norm", "reward_clip_range"),
    *("reward_timeout", "max_train_seconds"),
)


@functools.cache
def _number_hints(kind: type) -> dict[str, tuple[bool, bool, bool, bool]]:
    """Fields that take numbers alone: name -> whether they take one number, several, fractions, None."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        several = [typing.get_args(one) for one in kinds if typing.get_origin(one) in (list, tuple)]
        numbers = {*(one for one in kinds if typing.get_origin(one) is None and one is not NoneType)}
        numbers.update(part for parts in several for part in parts if part is not Ellipsis)
        if numbers and numbers <= {int, float}:
            single = any(one in (int, float) for one in kinds)
            found[name] = single, bool(several), float in numbers, NoneType in kinds
    return found


def check_values(config) -> None:
    """Checks the fields of a dataclass that take numbers, and those named above.

    Raises:
        ValueError: a text, a list or a fraction where there must be a number, a list, a whole number; NaN; a number
            out of its bounds. The message names the field, its value and what is allowed.
    """
    hints = _number_hints(config.__class__)
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name, None)) is field.default:
            continue
        if field.name in hints:
            _check_kind(field.name, value, *hints[field.name])
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, Real) and not isinstance(number, bool):
                _check_bounds(field.name, value, number)
    low_high = getattr(config, "reward_clip_range", None)
    if low_high is not None and not low_high[0] < low_high[1]:
        raise ValueError(f"`reward_clip_range` must be a smaller and a larger number, got {low_high}.")


def _check_kind(name: str, value: Any, single: bool, several: bool, fractions: bool, optional: bool) -> None:
    def fits(number) -> bool:
        return isinstance(number, Real if fractions else Integral) and not isinstance(number, bool)

    if value is None and optional:
        return
    if (single and fits(value)) or (several and isinstance(value, list | tuple) and all(map(fits, value))):
        return
    number = "number" if fractions else "whole number"
    kind = f"a list of {number}s" if several and not single else f"a {number}"
    raise ValueError(f"`{name}` must be {kind}, got {value!r}.")


def _check_bounds(name: str, value: Any, number: Any) -> None:
    if math.isnan(number) or (math.isinf(number) and name not in _MAY_BE_INFINITE):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")
    if name in BOUNDS and not _IS_ALLOWED[BOUNDS[name]](number):
        raise ValueError(f"`{name}` must be {BOUNDS[name]}, got {value}.")


# What JSON may hold where a type is asked for, and what it is called.
_JSON_TYPES: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "a text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    list: (list, "a list"),
    dict: (dict, "an object"),
    NoneType: (NoneType, "null"),
}


def type_flaw(value: Any, hint: Any, name: str) -> str | None:
    """
    What is wrong with a value read from JSON, None if nothing is.

    Args:
        hint: its type: one of `_JSON_TYPES`, a list or dict of one, a tuple (a list of that length), a union, `Any`,
            or a `TypedDict`, whose further keys may be anything.
        name: of the value, as the sentence has it.
    """
    if hint is Any:
        return None
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    fitting = [kind for kind in kinds if _is_json(value, typing.get_origin(kind) or kind)]
    if not fitting:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
        names = [_JSON_TYPES[_container(typing.get_origin(kind) or kind)][1] for kind in kinds]
        return f"{name} must be {' or '.join(names)}, got {shown}"
    return next(_part_flaws(value, fitting[0], name), None)


def _container(kind: Any) -> type:
    return dict if typing.is_typeddict(kind) else list if kind is tuple else kind


def _is_json(value: Any, kind: Any) -> bool:
    is_number = _container(kind) in (int, float)
    return isinstance(value, _JSON_TYPES[_container(kind)][0]) and not (is_number and isinstance(value, bool))


def _part_flaws(value: Any, kind: Any, name: str) -> Iterator[str]:
    """The flaws of what a list or an object holds."""
    parts = typing.get_args(kind)
    named: Iterable[tuple[str, Any, Any]] = ()
    if typing.is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - value.keys()):
            yield f"{name} lacks {', '.join(missing)}"
        named = [(key, value[key], hint) for key, hint in typing.get_type_hints(kind).items() if key in value]
    elif isinstance(value, dict) and parts:
        named = [(key, part, parts[1]) for key, part in value.items()]
    elif typing.get_origin(kind) is tuple:
        if len(value) != len(parts):
            yield f"{name} must have {len(parts)} entries, got {len(value)}"
        named = [(str(i), part, hint) for i, (part, hint) in enumerate(zip(value, parts))]
    elif isinstance(value, list) and parts:
        named = ((str(i), part, parts[0]) for i, part in enumerate(value))
    for key, part, hint in named:
        if flaw := type_flaw(part, hint, f"{name}.{key}" if name else key):
            yield flaw
