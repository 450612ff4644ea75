"""Recipes: settings in a YAML file.

They are YAML 1.2, as most people write it: `1e-5` is a number, and `no` is a word. PyYAML alone reads YAML 1.1.
"""

import os
import re
from typing import Any

import yaml


class _Number(float):
    """A number that is shown as it was written, for options that take text."""

    written: str

    def __str__(self) -> str:
        return self.written


class _RecipeLoader(yaml.SafeLoader):
    """The core schema of YAML 1.2. A key that comes twice is an error."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"`{twice[0][1]}` comes twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node) -> _Number:
        number = _Number(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.written = node.value if node.value[-1] in "0123456789." else repr(float(number))
        return number


for _name, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_RecipeLoader.add_constructor("tag:yaml.org,2002:float", _RecipeLoader.construct_number)


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a YAML file. `ValueError` if it is no mapping of names to values, or a name comes twice."""
    try:
        with open(path, encoding="utf-8") as file:
            recipe = _RecipeLoader(file).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{path} is no YAML ({problem}{f', line {mark.line + 1}' if mark else ''}).") from error
    except OSError as error:
        raise ValueError(f"The recipe {path} cannot be read ({error.strerror}): check the path.") from error
    if recipe is None:
        raise ValueError(f"{path} is empty: write a setting in it, such as `seed: 1`, or leave out --config.")
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise ValueError(f"{path} must map names to values, such as `seed: 1`.")
    return recipe
