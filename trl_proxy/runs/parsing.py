"""The scripts' command line: TRL's parser with a `--help` that begins with this project's options."""

import argparse
import dataclasses
import inspect
from collections.abc import Iterator

from trl import TrlParser

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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, the type of its value, and its default if it has one."""

    def _format_action_invocation(self, action):
        if action.nargs == 0 or not action.option_strings:
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


class ScriptParser(TrlParser):
    """[`~trl.TrlParser`] whose help lists this project's options of each configuration, then the common ones of TRL
    and transformers.

    Args:
        sections: title -> a dataclass, in the order of the help.
        order: the dataclasses in the order of `parse_args_and_config`; by default that of the help.
        kwargs: as for [`~trl.TrlParser`].
    """

    def __init__(self, sections: dict[str, type], order: tuple[type, ...] | None = None, **kwargs):
        self._sections = sections
        super().__init__(order or tuple(sections.values()), formatter_class=_Formatter, **kwargs)
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
