"""The package as users get it: an sdist, a wheel made from it, and that wheel without a checkout."""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trl_proxy

ROOT = Path(__file__).parents[1]
SHIPPED = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "trl_proxy").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def call(*command, cwd) -> str:
    """Runs it with this interpreter's packages and no checkout on the path; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=180
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel): the sdist of a copy of the checkout, and the wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "checkout"
    for name in ("trl_proxy", "baselines", "eval", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What `python -m build` calls, in this environment: nothing is fetched.
    build = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])(sys.argv[2])"
    call(sys.executable, "-c", build, "build_sdist", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    call(sys.executable, "-c", build, "build_wheel", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == SHIPPED
    assert {"trl_proxy/py.typed", "trl_proxy/data/prompts.jsonl", "trl_proxy/data/reward/router.safetensors"} < SHIPPED
    assert wheel.stat().st_size < 10 * 2**20


def test_an_editable_installation_finds_the_checkouts_packages(tmp_path):
    """With any extra and in pip's default mode; what is published does not have them."""
    for name in ("trl_proxy", "baselines", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"
    call(sys.executable, "-c", build, tmp_path / "wheel", cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (finder,) = (name for name in file.namelist() if name.endswith("_finder.py"))
        (mapping,) = re.findall(r"^MAPPING.*= (\{.*\})$", file.read(finder).decode(), re.MULTILINE)
    found = ast.literal_eval(mapping)
    assert found == {name: str(tmp_path / name) for name in ("trl_proxy", "baselines", "eval")}


def test_the_metadata(built):
    with zipfile.ZipFile(built[1]) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(file.read(name).decode())
        assert f"{name.partition('/')[0]}/licenses/LICENSE" in file.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("trl-proxy", trl_proxy.__version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# trl-proxy")
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    # Its private methods move between minor versions.
    assert "trl<1.17,>=1.16" in needed
    # What plotting, judging and testing need comes by extras.
    assert not {"matplotlib", "openai", "pytest"} & {line.split("<")[0].split(">")[0] for line in needed}
    assert {"eval", "judge", "quantization"} <= set(metadata.get_all("Provides-Extra"))


def test_the_changelog_has_this_version():
    assert f"## [{trl_proxy.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def installed(built, bare_python, tmp_path_factory):
    """The interpreter of an environment that sees this one's packages and the wheel, but not the editable install."""
    folder = tmp_path_factory.mktemp("venv")
    python = bare_python(folder / "venv")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1], cwd=folder)
    return python


def test_the_wheel_works_without_the_checkout(installed, tmp_path):
    """With its prompts; `python -m trl_proxy` answers."""
    (site,) = (installed.parents[1] / "lib").glob("*/site-packages")
    script = tmp_path / "example.py"
    script.write_text(
        "import runpy, trl_proxy\nfrom trl_proxy.loading import load_prompts\n"
        'print("at", trl_proxy.__file__)\nprint(len(load_prompts()), "prompts")\n'
        'runpy.run_module("trl_proxy", run_name="__main__")\n'
    )
    printed = call(installed, script, cwd=tmp_path).splitlines()
    assert f"at {site / 'trl_proxy' / '__init__.py'}" in printed
    assert f"trl-proxy {trl_proxy.__version__}" in printed
    assert any(line.endswith(" prompts") and int(line.split()[0]) > 100 for line in printed)


def test_the_command_of_an_installed_wheel_trains_and_answers(installed, tiny_lm, tiny_tokenizer, tmp_path):
    """`trl-proxy train`, as a process and under `accelerate launch -m trl_proxy`, then `trl-proxy generate`."""
    command = installed.parent / "trl-proxy"
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    rows = [{"prompt": [{"role": "user", "content": f"{a}{b}"}]} for a in "abcd" for b in "wxyz"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(x[0]['content'])) for x in completions]\n"
    )
    settings = ["--model_name_or_path", "lm", "--dataset_name", "prompts.jsonl", "--reward_funcs", "my_rewards.short"]
    settings += ["--max_completion_length", "6", "--max_steps", "4", "--report_to", "none"]
    printed = call(command, "train", *settings, "--output_dir", "one", cwd=tmp_path)
    assert printed.splitlines()[-1] == "Saved to one."
    launch = [
        installed,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "-m",
        "trl_proxy",
        "train",
    ]
    call(*launch, *settings, "--output_dir", "two", cwd=tmp_path)
    one, two = (load_file(tmp_path / name / "proxy_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    asked = call(command, "generate", "--model_name_or_path", "lm", "--proxy", "one", "--trace", "ab", cwd=tmp_path)
    assert "was rejected; the text after it was accepted in its place" in asked
    assert re.search(r"\d+ tokens, \d+ proposals", asked)
