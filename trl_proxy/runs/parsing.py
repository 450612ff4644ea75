"""The scripts' command line and recipes: a value means the same in both.

Each value of a recipe is read as the command line would read it.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser

from ..core.values import DICT_OR_PATH, check_values, is_json_object
from ..trainer.config import check_by_trying
from .recipes import read_recipe

# The options of TRL and transformers that most runs set; `--help_all` lists the rest.
COMMON = (
    *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit"),
    *("dataset_name", "dataset_train_split", "dataset_test_split", "output_dir", "resume_from_checkpoint"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
    *("max_steps", "num_train_epochs", "max_completion_length", "temperature", "reward_weights"),
    *("learning_rate", "lr_scheduler_type", "seed", "use_cpu", "bf16"),
    *("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"),
    *("logging_steps", "log_completions", "report_to", "save_steps", "save_total_limit", "push_to_hub"),
)
_FOREIGN = ("trl", "transformers", "builtins")


def _without_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe that a command line names, and its other words."""
    path, others, words = None, [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config" and not words:
            raise ValueError("--config must be followed by a recipe's path.")
        if word == "--config" or word.startswith("--config="):
            path = words.pop(0) if word == "--config" else word.partition("=")[2]
        else:
            others.append(word)
    return path, others


def _whole_number(convert: Callable) -> Callable:
    """`convert`, which makes an int of a text, for `3.0` and `1e3` too."""

    def whole(text: str):
        try:
            return convert(text)
        except ValueError:
            if not float(text).is_integer():
                raise
            return int(float(text))

    whole.__name__ = "int"  # in the help, and in messages of argparse
    return whole


def _or_none(convert: Callable) -> Callable:
    """`convert`, with `none` and `null` as TRL's parser reads them for other options."""

    def convert_or_none(text: str):
        return None if text.lower() in ("none", "null") else convert(text)

    convert_or_none.__name__ = convert.__name__
    return convert_or_none


def _json_object(kinds: dict, or_path: bool) -> Callable:
    """Reads the text of an option that takes a dict: JSON, which stays text if the option's kinds have that."""

    def convert(text: str):
        if not (or_path and not text.startswith("{")) and not is_json_object(text):
            raise argparse.ArgumentTypeError(f"must be a JSON object, such as '{{\"seed\": 1}}', got {text}")
        return text if str in kinds else json.loads(text)

    convert.__name__ = "JSON"
    return convert


_BUILDING = threading.Lock()  # TRL's parser changes the types of the dataclasses' own fields and sets them again


def _one_of(action: argparse.Action) -> str:
    return f"one of {', '.join(map(str, action.choices or ()))}"


class OneSentenceMixin:
    """For an argument parser: a mistake is a `ValueError` of one sentence, and -1e-5 is a number, which argparse takes
    for an option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message):
        sentence = re.sub(r"^argument (--\w+)[^:]*: must", r"\1 must", message)
        raise ValueError(f"{sentence.rstrip('.')}.")


class RecipeParser(OneSentenceMixin, TrlParser):
    """[`~trl.TrlParser`] that reads a value of a recipe as it reads the same words on the command line."""

    def __init__(self, dataclass_types=None, **kwargs):
        with _BUILDING:
            super().__init__(dataclass_types, **kwargs)
        self._kinds: dict[str, dict] = {}  # option -> the types that it takes: list -> list[int], int -> int, ...
        for one in self.dataclass_types:
            for name, hint in get_type_hints(one).items():
                kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
                self._kinds[name] = {get_origin(kind) or kind: kind for kind in kinds}
        self._named = {action.dest: action for action in reversed(self._actions) if action.dest in self._kinds}
        for name, action in self._named.items():
            if pair := self._kinds[name].get(tuple):
                action.nargs, action.type = len(get_args(pair)), get_args(pair)[0]
            kind = getattr(action.type, "__name__", None)
            if dict in self._kinds[name]:
                action.type = _json_object(self._kinds[name], or_path=name in DICT_OR_PATH)
            elif kind == "int":
                action.type = _whole_number(action.type)
            elif kind == "string_to_bool" and type(None) in self._kinds[name]:
                action.type = _or_none(action.type)

    def coerce(self, name: str, value: Any, where: str) -> Any:
        """The value of an option, from YAML or JSON, as the command line gives it.

        Args:
            where: what a message names: a recipe or a flag.

        Raises:
            ValueError: there is no such option, or it does not take the value.
        """
        if name not in self._named:
            close = difflib.get_close_matches(name, self._named, n=1)
            raise ValueError(f"{where} sets `{name}`, which is no option{f': {close[0]}?' if close else '.'}")
        action, kinds = self._named[name], self._kinds[name]
        if value is None and type(None) in kinds:
            return None
        if isinstance(value, dict) and dict in kinds:
            return json.loads(json.dumps(value))
        several = list in kinds or tuple in kinds
        if isinstance(action.nargs, int) and (not isinstance(value, list) or len(value) != action.nargs):
            raise ValueError(f"{where}: `{name}` must be {action.nargs} values, got {value!r}.")
        if isinstance(value, list) and several:
            return [self._converted(action, one, where) for one in value]
        converted = self._converted(action, value, where)
        return [converted] if action.nargs == "+" else converted

    def _converted(self, action: argparse.Action, value: Any, where: str) -> Any:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        convert: Callable = action.type if callable(action.type) else str
        of_dict = dict in self._kinds[action.dest]
        try:
            if value is None or isinstance(value, dict | list) or (of_dict and not isinstance(value, str)):
                raise ValueError
            converted = convert(text)
        except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
            names = {"str": "text", "string_to_bool": "true or false", "JSON": "a mapping of names to values"}
            kind = _one_of(action) if action.choices else names.get(convert.__name__, convert.__name__)
            given = "null" if value is None else repr(value)
            raise ValueError(f"{where}: `{action.dest}` must be {kind}, got {given}.") from error
        if action.choices is not None and converted not in action.choices:
            raise ValueError(f"{where}: `{action.dest}` must be {_one_of(action)}, got {text!r}.")
        return converted

    @contextmanager
    def _own_defaults(self) -> Iterator[None]:
        """Restores the options' defaults at its end."""
        before = [(action, action.default, action.required) for action in self._actions]
        try:
            yield
        finally:
            for action, default, required in before:
                action.default, action.required = default, required

    def asked(self, words: list[str], all_known: bool = True) -> dict[str, Any]:
        """What a command line and its recipe set, before any default: name -> value, as JSON has it.

        Args:
            all_known: whether a name in the recipe that is no option is a mistake.
        """
        path, words = _without_config(words)
        recipe = read_recipe(path) if path else {}
        recipe.pop("env", None)
        asked = {k: self.coerce(k, v, str(path)) for k, v in recipe.items() if all_known or k in self._named}
        with self._own_defaults():
            for action in self._actions:
                action.default, action.required = argparse.SUPPRESS, False
            namespace, _ = self.parse_known_args(words)
        for name, value in vars(namespace).items():
            is_json = isinstance(value, str) and value.startswith("{") and dict in self._kinds.get(name, {})
            asked[name] = json.loads(value) if is_json else value
        return json.loads(json.dumps(asked))

    def defaults(self) -> dict[str, Any]:
        """The value of each option that nothing sets, as JSON has it."""
        return json.loads(json.dumps({name: action.default for name, action in self._named.items()}, default=str))

    def parse_args_and_config(self, args=None, fail_with_unknown_args=True):
        """The dataclasses, from a command line (by default this process's) and the recipe that its `--config` names.
        One with a field `asked` gets what was set.

        Args:
            fail_with_unknown_args: whether a name in the recipe that is no option is a mistake.
        """
        given = list(sys.argv[1:] if args is None else args)
        path, words = _without_config(given)
        recipe = read_recipe(path) if path else {}
        environment = recipe.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(f"{path}: `env` must map names of environment variables to values, got {environment!r}.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        with self._own_defaults():
            for name, value in recipe.items():
                if name in self._named or fail_with_unknown_args:
                    value = self.coerce(name, value, str(path))
                    action = self._named[name]
                    # A mapping goes where the JSON of the command line goes.
                    action.default = (
                        json.dumps(value) if isinstance(value, dict) and str in self._kinds[name] else value
                    )
                    action.required = False
            try:
                *configs, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
            except (ArithmeticError, AttributeError, KeyError, TypeError) as error:  # of TRL's and transformers' own
                raise ValueError(f"A setting has a value of the wrong kind ({error}): see --help_all.") from error
        if unknown:
            raise ValueError(f"{unknown[0]} is no option: --help_all or --help lists them.")
        for config in configs:
            check_values(config)
            if isinstance(config, TrainingArguments):
                check_by_trying(config)
        asked = self.asked(given, all_known=fail_with_unknown_args)
        for config, kind in zip(configs, self.dataclass_types, strict=True):
            if "asked" in {field.name for field in dataclasses.fields(kind)}:
                config.asked = asked
        return tuple(configs)


class OptionsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, the type of its value, and its default if it has one."""

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        kind = getattr(action.type, "__name__", "str")
        kind = {"string_to_bool": "bool", "str": "text"}.get(kind, kind if kind.isalpha() else "text").upper()
        value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else kind
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], argparse.SUPPRESS) else super()._get_help_string(action)


class _HelpAll(argparse.Action):
    """Prints all options, in the same order."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


class ScriptParser(RecipeParser):
    """[`RecipeParser`] whose help lists this project's options of each configuration, then the common ones of TRL
    and transformers.

    Args:
        sections: title -> a dataclass, in the order of the help.
        order: the dataclasses in the order of `parse_args_and_config`; by default that of the help.
        kwargs: as for [`~trl.TrlParser`].
    """

    def __init__(self, sections: dict[str, type], order: tuple[type, ...] | None = None, **kwargs):
        self._sections = sections
        super().__init__(order or tuple(sections.values()), formatter_class=OptionsFormatter, **kwargs)
        self.add_argument(
            "--help_all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show every option, those of TRL and transformers included",
        )

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} [--config RECIPE.yaml] [--OPTION VALUE ...]", [], [])
        formatter.add_text(self.description)
        known = {action.dest: action for action in reversed(self._actions)}
        shown: set[str] = set()

        def section(title: str, names) -> None:
            names = [name for name in dict.fromkeys(names) if name in known and name not in shown]
            shown.update(names)
            formatter.start_section(title)
            formatter.add_arguments([known[name] for name in names])
            formatter.end_section()

        section("help", ["help", "help_all"])
        for title, kind in self._sections.items():
            section(title, _own_fields(kind))
        section("often set, of TRL and transformers", COMMON)
        if everything:
            section("all others, of TRL and transformers", [action.dest for action in self._actions])
        else:
            formatter.add_text(f"{len(known.keys() - shown)} more options of TRL and transformers: --help_all")
        return formatter.format_help()


def _own_fields(kind: type) -> Iterator[str]:
    """Names of a dataclass's fields that this project defines, or gives another default."""
    flags = {field.name for field in dataclasses.fields(kind) if field.init}
    for base in kind.__mro__:
        if "__dataclass_fields__" in base.__dict__ and base.__module__.partition(".")[0] not in _FOREIGN:
            yield from (name for name in inspect.get_annotations(base) if name in flags)
