"""Nothing works only thanks to the current folder, an environment that is activated, or what else is installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_proxy.runs.process import find_file, launcher, one_sentence, run_command

ROOT = Path(__file__).parents[1]
ALONE = ("launch.py", "minimal_proxy_rlhf.py")  # they import nothing of the project
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name not in ALONE)


def run(command, cwd, **environment) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_begins_with_its_own_checkout(script):
    """Before any other import of the project or of TRL."""
    body = ast.parse(script.read_text(encoding="utf-8")).body[1:5]
    assert [ast.unparse(node) for node in body] == [
        "import sys",
        "from pathlib import Path",
        "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))",
        "import trl_proxy",
    ]


def test_a_script_needs_no_installation_and_no_folder(bare_python, tmp_path):
    """Another checkout's packages, which are on the path, do not get in the way."""
    python = bare_python(tmp_path / "with space")
    for name in ("trl_proxy", "baselines", "eval"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "__init__.py").write_text("raise ImportError('of another checkout')")
    result = run(
        [python, ROOT / "scripts" / "compare.py", "--proxies", "nowhere"], tmp_path, PYTHONPATH=str(tmp_path / "other")
    )
    assert result.returncode == 1
    assert result.stderr.startswith("compare: nowhere is n")
    assert result.stderr.count("\n") == 1


# bitsandbytes says it only on CPUs with bfloat16: here it says it on every one.
NOISY = """
import importlib.machinery, logging, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes.backends.cpu.ops":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            logging.getLogger(name).warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
            logging.getLogger(name).warning("something else")
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train_proxy", "generate"])
def test_a_script_says_nothing_of_other_libraries(script, tmp_path):
    """What bitsandbytes says of an optional kernel is left out; whatever else it says is not."""
    result = run([sys.executable, "-c", NOISY, ROOT / "scripts" / f"{script}.py", "--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "something else\n"


@pytest.mark.fault
def test_a_console_without_the_characters(tmp_path):
    program = "from trl_proxy.runs.process import run_script\nrun_script('name', lambda: print('Δ vs SFT 😀'))"
    result = run(
        [sys.executable, "-c", program], tmp_path, PYTHONPATH=str(ROOT), PYTHONIOENCODING="latin-1", PYTHONUTF8="0"
    )
    assert (result.returncode, result.stdout) == (0, "? vs SFT ?\n"), result.stderr


def test_accelerate_is_this_environments():
    """Whether or not the environment is activated."""
    assert launcher("accelerate launch --num_processes 2")[:2] == [sys.executable, "-m"]
    words = [*launcher("accelerate launch"), "--help"]
    result = subprocess.run(words, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "usage: accelerate" in result.stdout


@pytest.mark.fault
@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("sys.exit('train: one sentence.')", 1, "train: one sentence.\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "launch: process 0 was ended by SIGKILL; the same command resumes.\n",
        ),
        ("time.sleep(3), os.kill(os.getppid(), signal.SIGINT), time.sleep(60)", 130, ""),
        ("print('done')", 0, ""),
    ],
)
def test_a_launch_ends_with_what_the_training_said(tmp_path, ending, status, said):
    script = tmp_path / "train.py"
    quietly = "signal.signal(signal.SIGINT, lambda *_: os._exit(130))"
    script.write_text(
        f"import os, signal, sys, time\n{quietly}\nif os.environ['RANK'] == '0':\n    {ending}\n"
        f"elif 'getppid' in {ending!r}:\n    time.sleep(60)\n"
    )
    config = ROOT / "scripts" / "accelerate_configs" / "cpu.yaml"
    result = run([sys.executable, ROOT / "scripts" / "launch.py", "--config_file", config, script], tmp_path)
    assert (result.returncode, result.stderr) == (status, said)


@pytest.mark.fault
def test_a_launcher_that_is_no_program():
    for command in ("no-such-launcher --x", ""):
        with pytest.raises(ValueError, match=r"--launch names .*no program"):
            launcher(command)
    with pytest.raises(ValueError, match=r"--launch must be a command line, got .*No closing quotation"):
        launcher("'unclosed")
    with pytest.raises(ValueError, match="cannot be run"):
        run_command(["/nowhere/at/all"])


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = "scripts/recipes/smollm2_cpu.yaml"
    assert find_file(recipe) == str(ROOT / recipe)
    assert find_file("nothing.yaml") == "nothing.yaml"
    (tmp_path / "scripts" / "recipes").mkdir(parents=True)
    (tmp_path / recipe).write_text("")
    assert find_file(recipe) == recipe


@pytest.mark.fault
def test_a_cache_of_the_hub_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_proxy.runs.process.HF_HOME", str(tmp_path))
    error = PermissionError(13, "Permission denied", str(tmp_path / "datasets" / "json"))
    assert one_sentence(error).endswith("(Permission denied): set HF_HOME to a folder that can be written.")
