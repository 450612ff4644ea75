"""What the README shows runs: its Python on a tiny LM, its commands' flags, its file tree and its make targets."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path, readme_example, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(readme_example, "README.md", "exec"), {"__name__": "readme"})
    assert "trainable params:" in capsys.readouterr().out
    assert (tmp_path / "short-proxy" / "proxy_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm").num_parameters() > 0


@pytest.mark.parametrize("script", ["train_proxy", "compare", "generate"])
def test_the_commands_flags_exist(script):
    text = (ROOT / "scripts" / f"{script}.py").read_text() + (ROOT / "trl_proxy" / "config.py").read_text()
    # TRL's own flags, which the scripts inherit
    inherited = {"model_name_or_path", "load_in_4bit", "output_dir"}
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    named = [c for c in commands if f"scripts/{script}.py" in c]
    assert named
    for command in named:
        for word in shlex.split(command):
            if word.startswith("--"):
                assert word[2:] in inherited or word[2:] in text, word


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
    for source in [
        *(ROOT / "trl_proxy").glob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "eval").glob("*.py"),
    ]:
        if source.name != "__init__.py":
            assert source.name in tree, source


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]*)", README + (ROOT / "CONTRIBUTING.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
