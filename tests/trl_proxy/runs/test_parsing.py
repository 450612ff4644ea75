"""A value means the same in a recipe, on the command line and in Python. The help begins with what is ours."""

import dataclasses
import inspect
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trl_proxy import ProxyConfig, ProxyPPOConfig
from trl_proxy.core.config import MODEL_FIELDS
from trl_proxy.runs.parsing import RecipeParser
from trl_proxy.runs.recipes import read_recipe
from trl_proxy.runs.resume import ASKED, RESULTS_FILE, RUN_FILE, changed_keys, identity, is_finished


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


def test_parsers_are_built_in_threads():
    """As the cells of a sweep do. TRL's parser changes the dataclass's own fields while it reads them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            built = list(pool.map(lambda _: RecipeParser(ProxyPPOConfig).defaults(), range(16)))
    finally:
        sys.setswitchinterval(before)
    assert all(defaults == built[0] for defaults in built)


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


# Values


@dataclasses.dataclass
class Everything:
    """A field of each kind that the scripts have."""

    rate: float = 0.1
    steps: int = 1
    flag: bool = False
    on: bool = True
    name: str = "x"
    number_or_none: float | None = 0.5
    count_or_none: int | None = 2
    name_or_none: str | None = None
    flag_or_none: bool | None = None
    numbers: list[float] | None = None
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1])
    names: list[str] | None = None
    pair: tuple[float, float] | None = None
    settings: dict | str | None = None
    only_settings: dict | None = None
    choice: Literal["a", "b"] = "a"
    names_or_text: None | str | list[str] = None  # noqa: RUF036 - as in TrainingArguments


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Field -> texts of its value, in a recipe and on the command line, and the value in Python.
NUMBERS = FLOATS.flatmap(lambda x: st.sampled_from([repr(x), f"{x:.17e}", f"{x:.17g}"]).map(lambda text: (text, x)))
WHOLE = st.integers(-(10**9), 10**9).flatmap(
    lambda n: st.sampled_from([str(n), f"{n}.0", f"{n}.", f"{n}e0"]).map(lambda text: (text, n))
)
WORDS = st.sampled_from(["no", "yes", "on", "1e5", "0123", "12e3", "7", "1.50", "true", "2024-01-01", "0x1F", "a b"])


def parse(words, recipe, tmp_path_factory):
    parser = RecipeParser(Everything)
    if recipe is not None:
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(recipe)
        words = ["--config", str(path), *words]
    return parser.parse_args_and_config(words)[0], parser.asked(words)


def check_same(tmp_path_factory, text, words, value, name):
    from_recipe, asked = parse([], f"{name}: {text}\n", tmp_path_factory)
    from_words, also_asked = parse([f"--{name}", *words], None, tmp_path_factory)
    assert from_recipe == from_words
    assert asked == also_asked == {name: value}
    in_python = Everything(**{name: json.dumps(value) if isinstance(value, dict) else value})
    assert from_recipe == in_python
    assert identity(from_recipe) == identity(from_words) == identity(in_python)
    assert type(getattr(from_recipe, name)) is type(getattr(from_words, name))


@given(st.sampled_from(["rate", "number_or_none"]), NUMBERS)
@example("rate", ("1e-5", 1e-5))
@example("rate", ("3", 3.0))
@example("number_or_none", ("null", None))
@example("number_or_none", ("none", None))
@example("rate", ("'1e-5'", 1e-5))
def test_a_number_is_the_same_everywhere(tmp_path_factory, name, written):
    text, value = written
    check_same(tmp_path_factory, text, [text.strip("'")], value, name)


@given(st.sampled_from(["steps", "count_or_none"]), WHOLE)
def test_a_whole_number_is_the_same_everywhere(tmp_path_factory, name, written):
    text, value = written
    check_same(tmp_path_factory, text, [text], value, name)


@given(st.sampled_from(["name", "name_or_none"]), WORDS)
def test_a_text_is_the_same_everywhere(tmp_path_factory, name, text):
    """As it is written, even if it looks like a number."""
    if text != "true":  # YAML has no other spelling of it
        check_same(tmp_path_factory, text, [text], text, name)
    check_same(tmp_path_factory, repr(text), [text], text, name)


@pytest.mark.parametrize("name", ["flag", "on", "flag_or_none"])
@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("no", False), ("'true'", True), ("1", True), ("OFF", None)]
)
def test_a_switch_is_the_same_everywhere(tmp_path_factory, name, text, value):
    if value is None:
        with pytest.raises(ValueError, match=f"recipe.yaml: `{name}` must be true or false, got 'OFF'"):
            parse([], f"{name}: {text}\n", tmp_path_factory)
    else:
        check_same(tmp_path_factory, text, [text.strip("'")], value, name)


@given(st.lists(NUMBERS, min_size=1, max_size=3), st.lists(WHOLE, min_size=1, max_size=3))
def test_lists_are_the_same_everywhere(tmp_path_factory, numbers, sizes):
    for name, written in (("numbers", numbers), ("sizes", sizes)):
        texts, values = [text for text, _ in written], [value for _, value in written]
        check_same(tmp_path_factory, f"[{', '.join(texts)}]", texts, values, name)


@given(st.dictionaries(st.text("abc", min_size=1), st.one_of(FLOATS, st.booleans(), st.none(), st.lists(FLOATS))))
@example({"num_decay_steps": 1e-5})
def test_mappings_are_the_same_everywhere(tmp_path_factory, value):
    """The command line takes JSON, and JSON is YAML."""
    check_same(tmp_path_factory, json.dumps(value), [json.dumps(value)], value, "settings")


def test_a_pair_and_names(tmp_path_factory):
    check_same(tmp_path_factory, "[-5, 5]", ["-5", "5"], [-5.0, 5.0], "pair")
    check_same(tmp_path_factory, "[a, 'no']", ["a", "no"], ["a", "no"], "names")
    check_same(tmp_path_factory, "wandb", ["wandb"], "wandb", "names_or_text")
    assert parse([], "names_or_text: [wandb, trackio]", tmp_path_factory)[0].names_or_text == ["wandb", "trackio"]
    assert parse([], "sizes: 3", tmp_path_factory)[0].sizes == [3]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", r"recipe.yaml is empty: write a setting in it, such as `seed: 1`"),
        ("# nothing\n", "recipe.yaml is empty"),
        ("- rate\n", "recipe.yaml must map names to values"),
        ("rate\n", "recipe.yaml must map names to values"),
        ("1: 2\n", "recipe.yaml must map names to values"),
        ("rate: 1\nrate: 2\n", r"recipe.yaml is no YAML \(`rate` comes twice, line 1\)"),
        ("settings: {a: 1, a: 2}\n", r"`a` comes twice, line 1"),
        ("rate: [1\n", r"recipe.yaml is no YAML \(.*line 2\)"),
        ("\tseed: 1\n", "recipe.yaml is no YAML"),
        ("rat: 1\n", r"recipe.yaml sets `rat`, which is no option: rate\?"),
        ("zzz: 1\n", r"recipe.yaml sets `zzz`, which is no option\."),
        ("rate: fast\n", "recipe.yaml: `rate` must be float, got 'fast'"),
        ("rate: true\n", "recipe.yaml: `rate` must be float, got True"),
        ("rate: null\n", "recipe.yaml: `rate` must be float, got null"),
        ("rate: [1.0]\n", r"recipe.yaml: `rate` must be float, got \[1.0\]"),
        ("rate: {a: 1}\n", "recipe.yaml: `rate` must be float, got {'a': 1}"),
        ("steps: 1.5\n", "recipe.yaml: `steps` must be int, got 1.5"),
        ("name: {a: 1}\n", "recipe.yaml: `name` must be text, got {'a': 1}"),
        ("sizes: [1, a]\n", "recipe.yaml: `sizes` must be int, got 'a'"),
        ("pair: [1]\n", r"recipe.yaml: `pair` must be 2 values, got \[1\]"),
        *(
            (f"{name}: {value}\n", f"recipe.yaml: `{name}` must be a mapping of names to values, got ")
            for name in ("settings", "only_settings")
            for value in ("5", "[1]", "word", "'[1]'", "true")
        ),
        *((f"choice: {value}\n", "`choice` must be one of a, b, got ") for value in ("[a]", "null", "c", "{a: 1}")),
        ("env: text\n", "recipe.yaml: `env` must map names of environment variables to values, got 'text'"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path_factory, recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        parse([], recipe, tmp_path_factory)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config must be followed by a recipe's path"),
        (["--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--rat3", "1"], "--rat3 is no option"),
        (["--pair", "1"], "argument --pair: expected 2 arguments"),
        *((["--settings", text], "^--settings must be a JSON object, such as .*, got ") for text in ("[1]", "{", "5")),
        (["--only_settings", "[1]"], r"^--only_settings must be a JSON object, such as .*, got \[1\]"),
        (
            ["--config", "nope.yaml"],
            "^The recipe nope.yaml cannot be read .No such file or directory.: check the path",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path_factory, words, message):
    with pytest.raises(ValueError, match=message):
        parse(words, None, tmp_path_factory)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr_scheduler_kwargs", '{"a": 1}'], "`lr_scheduler_type=linear` with `lr_scheduler_kwargs={'a': 1}` cannot"),
        (["lr_scheduler_kwargs", '{"a": 1}', "--lr_scheduler_type", "constant"], "it takes none"),
        (
            ["lr_scheduler_kwargs", '{"num_cycles": "x"}', "--lr_scheduler_type", "cosine"],
            "'num_cycles': 'x'}` cannot",
        ),
        (["lr_scheduler_type", "cosine_with_min_lr"], "min_lr_rate should be set"),
        (["torch_compile_mode", "zzz"], "`torch_compile_mode=zzz` cannot be used .*max-autotune"),
        (["torch_compile_backend", "zzz"], "`torch_compile_backend=zzz` with .* cannot be used"),
    ],
)
def test_what_training_would_make_late_is_tried_early(words, message, parser, tmp_path):
    with pytest.raises(ValueError, match=message):
        parser.parse_args_and_config(["--output_dir", str(tmp_path), "--use_cpu", "--" + words[0], *words[1:]])


def test_an_anchor_may_be_merged(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &base {a: 1, b: 2}\nchild: {<<: *base, b: 3}\n")
    assert read_recipe(tmp_path / "a.yaml")["child"] == {"a": 1, "b": 3}


RECIPES = {
    "learning_rate": ("1e-5", ["1e-5"], 1e-5),
    "max_steps": ("3.0", ["3"], 3),
    "eval_strategy": ("no", ["no"], "no"),
    "report_to": ("none", ["none"], "none"),
    "use_cpu": ("false", ["false"], False),  # true on a machine without an accelerator
    "bf16": ("null", ["none"], None),
    "model_init_kwargs": ("{rms_norm_eps: 8e-1}", ['{"rms_norm_eps": 0.8}'], {"rms_norm_eps": 0.8}),
    "accelerator_config": ("{split_batches: true}", ['{"split_batches": true}'], {"split_batches": True}),
    "reward_clip_range": ("[-5, 5.0]", ["-5", "5"], (-5.0, 5.0)),
    "max_completion_length": ("12", ["12"], 12),
    "warmup_steps": ("1e1", ["10"], 10),
    "reward_weights": ("[1, 2e0]", ["1", "2"], [1.0, 2.0]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_the_same_run_however_it_is_written(parser, tmp_path, name):
    text, words, value = RECIPES[name]
    (tmp_path / "a.yaml").write_text(f"output_dir: x\nseed: 3\n{name}: {text}\n")
    by_recipe = ["--config", str(tmp_path / "a.yaml")]
    by_words = ["--output_dir", "y", "--seed", "3", f"--{name}", *words]
    runs = [parser.parse_args_and_config(one)[:2] for one in (by_recipe, by_words)]
    runs.append((type(runs[0][0])(), ProxyPPOConfig(output_dir="z", seed=3, **{name: value})))
    identities = [identity(*run) for run in runs]
    assert changed_keys(identities[0], identities[1]) == []
    assert set(changed_keys(identities[0], identities[2])) <= {ASKED}
    (tmp_path / RUN_FILE).write_text(json.dumps(identities[0]))
    (tmp_path / RESULTS_FILE).write_text("{}")
    defaults = parser.defaults()
    for words in (by_recipe, by_words):
        assert is_finished(tmp_path, parser.asked(words), defaults)
    assert not is_finished(tmp_path, parser.asked(["--seed", "4", *by_recipe]), defaults)
    assert not is_finished(tmp_path, parser.asked(["--gae_lambda", "0.5", *by_recipe]), defaults)
    assert is_finished(tmp_path, parser.asked(["--gae_lambda", "0.95", *by_recipe]), defaults)
