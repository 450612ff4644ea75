"""`trl-proxy`, here as `python -m trl_proxy`."""

import subprocess
import sys

import pytest
import torch
import transformers

import trl_proxy
from trl_proxy import __main__ as main


def test_it_tells_versions_and_device():
    printed = subprocess.run([sys.executable, "-m", "trl_proxy"], capture_output=True, text=True, check=True).stdout
    lines = printed.splitlines()
    assert lines[0] == f"trl-proxy {trl_proxy.__version__}"
    assert f"transformers {transformers.__version__}" in lines
    assert f"torch {torch.__version__}" in lines
    assert lines[-1].startswith("device: ")


@pytest.fixture
def call(fork_server, tmp_path):
    """`call(*words)` -> exit status and output of `python -m trl_proxy`, without the time that its imports take."""
    (tmp_path / "main.py").write_text(
        "import runpy\nrunpy.run_module('trl_proxy', run_name='__main__', alter_sys=False)\n"
    )

    def run(*words):
        log = tmp_path / "log.txt"
        status = fork_server([tmp_path / "main.py", *words], tmp_path, log).wait()
        return status, log.read_text()

    return run


@pytest.mark.parametrize("command", ["train", "generate"])
def test_the_help_of_a_command(call, command):
    status, printed = call(command, "--help")
    assert status == 0
    assert printed.startswith(f"usage: trl-proxy {command}")


def test_the_commands_are_listed(call):
    status, printed = call("--help")
    assert status == 0
    for command in ("trl-proxy train", "trl-proxy generate", "trl-proxy env"):
        assert command in printed


@pytest.mark.fault
def test_a_command_that_is_not_there(call):
    status, printed = call("trian")
    assert status == 1
    assert printed.endswith("trl-proxy: there is no command 'trian': it must be train, generate or env.\n")


def test_a_package_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(main, "PACKAGES", ("no-such-package",))
    main.env()
    assert "no-such-package is not installed" in capsys.readouterr().out


def test_an_accelerator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    assert main.describe_device() == "GPU 0, GPU 1"
