"""`python -m trl_proxy`."""

import subprocess
import sys

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


def test_a_package_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(main, "PACKAGES", ("no-such-package",))
    main.main()
    assert "no-such-package is not installed" in capsys.readouterr().out


def test_an_accelerator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    assert main.describe_device() == "GPU 0, GPU 1"
