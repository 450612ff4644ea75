"""What README and docs show is true: their Python runs on a tiny LM, their commands are parsed by what they call, and
the files, functions and make targets that they name exist."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from trl import TrlParser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every command in a page's shell blocks, and of those in running text that begin like one."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    if page != "docs/results.md":  # there, commands are those of earlier commits
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text) if is_command(span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_command(span: str) -> bool:
    return re.match(r"(accelerate launch|\S*python|make|pip install|trl-proxy)\s\S", span) is not None


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_runs(page, python_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_of(page)
    exec(compile(code, page, "exec"), {"__name__": "page"})
    if "save_pretrained" in code:
        assert (tmp_path / "short-proxy" / "proxy_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm").num_parameters() > 0


# Commands


def parse(load_script, name: str, words: list[str]) -> None:
    """Parses a command's words as the script itself does; raises `SystemExit` or `ValueError` for an unknown flag."""
    script = load_script(name)
    if name == "train_baseline":
        script.parse(words)
    elif name == "sizing":
        script.make_parser().parse_args_and_config(words, fail_with_unknown_args=False)
    elif name == "train_reward":
        script.parser().parse_args_and_config(words)
    elif name == "benchmark":
        script.make_parser().parse_args_into_dataclasses(words)
    else:
        parser = script.make_parser()
        if isinstance(parser, TrlParser):
            parser.parse_args_and_config(words)
        else:
            parser.parse_args(words)


def check(words: list[str], load_script) -> None:
    """`AssertionError`, `SystemExit` or `ValueError` if a command would not be understood."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
    if scripts:
        assert program == "python" or words[:2] == ["accelerate", "launch"], words
        parse(load_script, Path(words[scripts[0]]).stem, words[scripts[0] + 1 :])
    elif words[:1] == ["trl-proxy"] or words[:4] == ["accelerate", "launch", "-m", "trl_proxy"]:
        command, *rest = words[1:] if words[0] == "trl-proxy" else [*words[4:], "env"][:1] + words[5:]
        rest = [word for word in rest if word != "..."]
        if command == "train":
            importlib.import_module("trl_proxy.runs.train").make_parser().parse_args_and_config(rest)
        elif command == "generate" and rest:
            importlib.import_module("trl_proxy.runs.ask").make_parser().parse_args(rest)
        else:
            assert command in ("env", "generate"), words
    elif program == "make":
        assert words[1:], words
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[(\w+)\]", words[-1]):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), words
    else:
        assert words in (["python", "-m", "trl_proxy"], ["source", ".venv/bin/activate"]), words


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_are_understood(page, load_script, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        try:
            check(words, load_script)
        except (SystemExit, ValueError, subprocess.CalledProcessError) as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/compare.py --proxys outputs/proxy",
        "python scripts/generate.py --proxy outputs/proxy --traces Hello",
        "python scripts/sizing.py --load_in_4_bits",
        "python scripts/benchmark.py --quick --batches 1",
        "accelerate launch scripts/train_proxy.py --output_dir outputs/proxy --rewards x",
        "accelerate launch scripts/train_proxy.py --config scripts/recipes/none.yaml",
        "make nothing",
        'pip install -e ".[nothing]"',
        "python -m trl_prox",
    ],
)
def test_a_command_that_is_wrong_is_noticed(command, load_script, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, FileNotFoundError, SystemExit, ValueError, subprocess.CalledProcessError)):
        check(shlex.split(command), load_script)


def test_flags_in_running_text_exist():
    """Of any script: fields of its configurations, or arguments of its parser."""
    folders = ("scripts", "trl_proxy", "eval", "baselines")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = "\n".join(path.read_text() for path in sources)
    inherited = {"model_name_or_path", "load_in_4bit", "output_dir", "log_completions", "eval_strategy", "eval_steps"}
    inherited |= {"load_best_model_at_end", "metric_for_best_model", "use_cpu", "bf16", "multi_gpu", "num_processes"}
    inherited |= {"per_device_train_batch_size", "use_bnb_nested_quant", "config", "no-deps", "main_process_port"}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text) if page != "docs/results.md" else []:
            for flag in re.findall(r"(?<![\w-])--([\w-]+)", span):
                assert flag in inherited or re.search(rf"\b{flag}\b", known), f"{page}: --{flag}"


# Names


def test_the_file_tree_is_true():
    (tree,) = re.findall(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("   "):  # an entry's second line
            continue
        if not line.startswith(" "):
            folder = name
        path = ROOT / name if name == folder else ROOT / folder / name
        assert path.exists(), path
    for package in ("trl_proxy", "baselines", "eval", "scripts", "tests", "docs"):
        assert f"\n{package}/" in "\n" + tree, package
    for path in (ROOT / "trl_proxy").iterdir():
        assert not any(path.glob("*.py")) or f"  {path.name}/" in tree, path


@pytest.mark.parametrize(("page", "most"), [("README.md", 130), ("docs/results.md", 420)])
def test_pages_stay_short(page, most):
    """In lines: the README is read in a minute, and what is history goes to docs/log.md."""
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most


def has(found, names: str) -> bool:
    """Whether a module has the attribute `a.b.c`."""
    for name in names.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page):
    """Make targets, relative links, and functions written as `module.name`."""
    text, makefile = (ROOT / page).read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z][a-z-]*)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path = link.partition("#")[0]
            assert (ROOT / page).parent.joinpath(path).exists(), link
    modules: dict[str, list[str]] = {}
    for path in (ROOT / "trl_proxy").rglob("[a-z]*.py"):
        modules.setdefault(path.stem, []).append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    pattern = rf"`(?:[a-z_]+\.)*?({'|'.join(modules)})\.([\w.]+)`"
    for stem, names in re.findall(pattern, text):
        if names == "py":
            continue
        assert any(has(importlib.import_module(module), names) for module in modules[stem]), f"{page}: {stem}.{names}"


def test_every_equation_of_the_method_has_its_function():
    table = (ROOT / "docs" / "method.md").read_text().partition("## The equations")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 15
    for row in rows:
        assert re.search(r"\| `\w+\.[\w.]+` \|$", row), row


def test_the_site_has_every_page():
    """`make docs` checks its links."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {name for entry in site["nav"] for name in entry.values()}
    assert pages == {Path(page).name for page in PAGES if page.startswith("docs/")}
    assert site["strict"]
    assert site["theme"]["font"] is False
