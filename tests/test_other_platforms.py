"""Windows, macOS and devices without float64, pretended on this machine."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_proxy import ProxyConfig, devices
from trl_proxy.runs.process import run_command

# Imports every module as it is, for what others need of this system. Then again on the pretended ones.
PROGRAM = """
import importlib, os, pathlib, signal, sys
root = pathlib.Path(sys.argv[1])
OURS = ("trl_proxy", "baselines", "eval")
files = [file for name in OURS for file in (root / name).rglob("*.py") if "data" not in file.parts]
names = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
for name in names:
    importlib.import_module(name)
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None  # importing it is an ImportError
for name in ("fork", "killpg", "getuid", "getgid", "getpgid", "setsid", "uname", "sysconf", "wait4",
             "sched_getaffinity", "sched_setaffinity", "sched_yield", "posix_fadvise", "memfd_create"):
    delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGCHLD", "setitimer", "ITIMER_REAL", "pthread_sigmask"):
    delattr(signal, name)
for sys.platform in ("win32", "darwin"):
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    for name in names:
        importlib.import_module(name)
    print(len(names), "modules on", sys.platform)
"""


def test_every_module_can_be_imported(fork_server, tmp_path, pytestconfig):
    (tmp_path / "program.py").write_text(PROGRAM)
    log = tmp_path / "log"
    status = fork_server([tmp_path / "program.py", pytestconfig.rootpath], tmp_path, log).wait()
    assert (status, log.read_text().split()[-1:]) == (0, ["darwin"]), log.read_text()


def test_a_command_is_stopped_without_groups_of_processes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr("os.killpg")
    asked = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-S", "-c", "import time; time.sleep(60)"], stopped=lambda: next(asked))


@pytest.mark.parametrize(("platform", "peak", "expected"), [("linux", 2048, 2.0), ("darwin", 3 * 2**20, 3.0)])
def test_the_peak_memory_of_a_process_in_each_systems_unit(monkeypatch, platform, peak, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=peak))
    assert devices.peak_memory_mb(torch.device("cpu")) == expected


def test_the_peak_memory_of_a_process_on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * 2**20))
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert devices.peak_memory_mb(torch.device("cpu")) == 5.0


class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes a float64 tensor, as an Apple GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in made):
            raise TypeError(f"{func} makes a float64 tensor")
        return result


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_decoding_and_judging_make_no_float64(features, tiny_lm, with_random_gate, ragged_batch):
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.zeros(1).double()
    model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01))
    with NoFloat64():
        for sample in (False, True):
            output = model.generate(**ragged_batch([5, 3]), max_new_tokens=6, gate_sample=sample, output_rollout=True)
        judged = model(gate_features=model.rollout_features(output.rollout))
        (judged.accept_logits.sum() + judged.state_values.sum()).backward()
        if features == "prefix":
            model(**ragged_batch([5, 3]))
