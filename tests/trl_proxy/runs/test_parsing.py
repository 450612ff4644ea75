"""The help of the training scripts begins with what is this project's."""

import dataclasses
import inspect
import re

import pytest

from trl_proxy import ProxyConfig, ProxyPPOConfig
from trl_proxy.core.config import MODEL_FIELDS


@pytest.fixture(scope="module")
def parser(load_script):
    return load_script("train_proxy").make_parser()


def options(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_the_proxys_own_options_come_first(parser):
    shown = options(parser.format_help())
    own = [f.name for f in dataclasses.fields(ProxyConfig) if f.name not in ("temperature", *MODEL_FIELDS)]
    assert shown[1 : 1 + len(own)] == own  # after --help_all
    assert shown.index("dataset_name") < shown.index("lm_logp_coef") < shown.index("report_to")
    assert len(shown) == len(set(shown))
    assert parser.format_help().count("\n") < 250


def test_every_option_that_is_ours_is_in_the_short_help(parser):
    shown = options(parser.format_help())
    for kind in (ProxyPPOConfig, *ProxyPPOConfig.__mro__):
        if kind.__module__.startswith("trl_proxy") and dataclasses.is_dataclass(kind):
            assert set(inspect.get_annotations(kind)) <= set(shown), kind


def test_help_all_shows_every_option_once(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args_and_config(["--help_all"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = options(text)
    assert len(shown) == len(set(shown))
    known = {action.dest for action in parser._actions if action.dest != "help"}
    assert set(shown) == known
    number = int(re.search(r"(\d+) more options", parser.format_help())[1])
    assert number == len(known) - len(options(parser.format_help()))


def test_help_of_every_method(load_script, capsys):
    script = load_script("train_baseline")
    for method in ("ppo", "rloo", "grpo", "dpo"):
        with pytest.raises(SystemExit) as end:
            script.parse(["--method", method, "--help"])
        assert end.value.code == 0
        assert f"{method}: " in capsys.readouterr().out


def test_values_are_parsed_in_the_order_that_main_takes(parser):
    run_args, training_args, proxy_args, model_args = parser.parse_args_and_config(
        ["--p_t", "0.2", "--output_dir", "x", "--verbose", "--model_name_or_path", "y"]
    )
    assert (run_args.verbose, training_args.output_dir, proxy_args.p_t) == (True, "x", 0.2)
    assert model_args.model_name_or_path == "y"
