"""What goes wrong in the middle of a run, done for real: kills, full disks, damaged checkpoints, a reward server that
goes away. Nothing is lost, and the same command resumes to the result of an undisturbed run."""

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback

from eval.records import read_record, read_records
from trl_proxy import ProxyConfig, files
from trl_proxy.files import WriteError, damaged_files
from trl_proxy.runs import resume
from trl_proxy.runs.process import one_sentence
from trl_proxy.trainer.reward_guards import RewardError

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
WEIGHTS = "proxy_model.safetensors"


def assert_same_weights(folder: Path, other: Path) -> None:
    first, second = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


# A reward that leaves a mark at every call; the call whose number stands in `at_most` waits until that file is gone:
# however slow a test is, what it is about to kill has not ended.
MARKING = """
import os
import time


def enough():
    try:
        with open("at_most") as file:
            return os.path.getsize("calls") >= int(file.read())
    except OSError:
        return False


def upper(prompts, completions, **kwargs):
    with open("calls", "a") as file:
        file.write(".")
    while enough():
        time.sleep(0.01)
    return [float(sum(c.isupper() for c in x)) for x in completions]
"""


def wait_for_calls(path: Path, number: int, script) -> None:
    """Until the reward has been called so often, or the script has ended."""
    while os.path.isdir(f"/proc/{script.pid}") and (not path.exists() or path.stat().st_size < number):
        time.sleep(0.01)


def test_a_training_that_is_killed_at_any_moment(fork_server, tiny_run, tmp_path):
    (tmp_path / "my_rewards.py").write_text(MARKING)
    calls, log = tmp_path / "calls", tmp_path / "log.txt"

    def start(name):
        arguments = tiny_run(max_steps=96, save_steps=4, replay_rollouts=2, output_dir=tmp_path / name)
        return fork_server([ROOT / "scripts" / "train_proxy.py", *arguments], tmp_path, log)

    assert start("whole").wait() == 0, log.read_text()
    assert calls.stat().st_size > 4 * 5  # of four starts each makes five calls at most
    moments, limit = random.Random(0), tmp_path / "at_most"
    for _ in range(4):
        calls.unlink()
        limit.write_text("5")
        script = start("killed")
        wait_for_calls(calls, moments.randint(1, 2), script)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(script.pid, signal.SIGKILL)
        limit.unlink()
        assert script.wait() == -signal.SIGKILL
        for checkpoint in checkpoints(tmp_path / "killed"):
            assert (checkpoint / "checksums.json").is_file()
            assert not damaged_files(checkpoint)
    assert not (tmp_path / "killed" / "train_results.json").exists()
    assert start("killed").wait() == 0, log.read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert log.read_text().count("Resuming from") >= 2


def kill_all(folder: Path) -> None:
    """Kills every process at work in the folder, as a machine does that loses its power."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                os.kill(int(process.name), signal.SIGKILL)


def assert_same_records(folder: Path, other: Path) -> None:
    first, second = read_records(folder), read_records(other)
    assert [record["method"] for record in first] == [record["method"] for record in second]
    for one, two in zip(first, second, strict=True):
        for key in ("responses", "rewards", "trace", "delta_vs_sft", "episodes", "kl_to_lm", "lm_logprob_per_token"):
            assert one[key] == two[key], key


def test_a_comparison_that_is_interrupted_at_any_moment(fork_server, tiny_run, with_random_gate, tiny_lm, tmp_path):
    (tmp_path / "my_rewards.py").write_text(MARKING)
    calls, log = tmp_path / "calls", tmp_path / "log.txt"
    tiny_run()
    for features in ("prefix", "candidate"):
        with_random_gate(tiny_lm(), ProxyConfig(p_t=0.02, features=features)).save_pretrained(tmp_path / features)
    flags = "--proxies prefix:1 candidate:2 --model_name_or_path lm --dataset_name prompts.jsonl --split train"
    flags += " --reward_model_name_or_path my_rewards.upper --gold_reward_model_name_or_path none --best_of 1 2"
    argv = [ROOT / "scripts" / "compare.py", *flags.split(), "--max_new_tokens", "6", "--output_dir"]

    assert fork_server([*argv, "whole"], tmp_path, log).wait() == 0, log.read_text()
    assert calls.stat().st_size >= 3 + 2  # of four starts the first three finish a call each
    moments, limit = random.Random(1), tmp_path / "at_most"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        calls.unlink()
        limit.write_text("2")
        script = fork_server([*argv, "out"], tmp_path, log)
        wait_for_calls(calls, 1, script)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(script.pid, number)
        limit.unlink()
        assert script.wait() == (-number if number == signal.SIGKILL else 130)
        if (tmp_path / "out" / "records").is_dir():
            for record in (tmp_path / "out" / "records").glob("*.json"):
                read_record(record)
    assert log.read_text().count("compare: interrupted; the same command resumes.") == 2
    assert not (tmp_path / "out" / "report.md").exists()
    assert fork_server([*argv, "out"], tmp_path, log).wait() == 0, log.read_text()
    assert_same_records(tmp_path / "whole", tmp_path / "out")
    assert "Traceback" not in log.read_text()
    with FileLock(tmp_path / "out" / "_lock"):
        assert fork_server([*argv, "out"], tmp_path, log).wait() == 1
    assert "compare: Another process is at work in out: let it end" in log.read_text()


def test_a_sweep_that_is_interrupted_at_any_moment(fork_server, tiny_run, tmp_path):
    """Told to end, as its trainings are then; everything killed at once; and killed alone, while they continue."""
    (tmp_path / "my_rewards.py").write_text(MARKING)
    calls, log = tmp_path / "calls", tmp_path / "log.txt"
    words = iter(tiny_run(max_steps=24, gate_hidden_sizes=8))
    recipe = {name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(words, words)}
    recipe |= {"gate_hidden_sizes": [8], "reward_funcs": ["my_rewards.upper"]}
    del recipe["output_dir"]
    compare = {"split": "train", "reward_model_name_or_path": "my_rewards.upper", "max_new_tokens": 6}
    compare |= {"gold_reward_model_name_or_path": "none"}
    compare |= {name: recipe[name] for name in ("model_name_or_path", "dataset_name")}
    sweep = {"recipe": "train.yaml", "evaluate": "compare.yaml", "grid": {"p_t": [0.1, 0.02]}, "jobs": 2}
    sweep |= {"launch": fork_server.python, "output_dir": "out"}
    one = sweep | {"grid": {"p_t": [0.02]}, "output_dir": "whole"}
    for name, values in (("train", recipe), ("compare", compare), ("sweep", sweep), ("one", one)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def start(config="sweep.yaml"):
        return fork_server([ROOT / "scripts" / "sweep.py", "--config", config], tmp_path, log)

    # One cell is enough to compare with.
    assert start("one.yaml").wait() == 0, log.read_text()
    assert calls.stat().st_size > 6  # of three starts each makes four calls at most, for two cells
    moments, limit = random.Random(0), tmp_path / "at_most"
    for how in ("told", "all", "alone"):
        calls.unlink()
        limit.write_text("4")
        script = start()
        wait_for_calls(calls, moments.randint(1, 3), script)
        time.sleep(moments.uniform(0, 0.1))
        if how == "all":
            kill_all(tmp_path)
        else:
            os.kill(script.pid, signal.SIGKILL if how == "alone" else signal.SIGTERM)
        limit.unlink()
        assert script.wait() == (130 if how == "told" else -signal.SIGKILL)
        assert not (tmp_path / "out" / "sweep.md").exists()
    assert log.read_text().count("sweep: interrupted; the same command resumes.") == 1
    assert start().wait() == 0, log.read_text()
    cell = "p_t=0.02-seed0"
    assert_same_weights(tmp_path / "whole" / cell, tmp_path / "out" / cell)
    assert_same_records(tmp_path / "whole" / cell, tmp_path / "out" / cell)
    assert (tmp_path / "out" / "sweep.md").read_text().count("\n") == 4
    for path in (log, *(tmp_path / "out").glob("*/log.txt")):
        assert "Traceback" not in path.read_text()


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("trl_proxy.runs.train")


@pytest.fixture
def train(script, tiny_run, monkeypatch, tmp_path):
    """`train(at_step_5=None, **flags)`: scripts/train_proxy.py in this process; at its fifth step, which is in the
    middle of a rollout's updates, something happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fit = script.fit

    def run(at_step_5=None, **flags):
        class Happening(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5 and at_step_5:
                    at_step_5()

        def fit_with_it(trainer, *args):
            trainer.add_callback(Happening())
            fit(trainer, *args)

        monkeypatch.setattr(script, "fit", fit_with_it)
        monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
        arguments = tiny_run(**{"output_dir": "out", "max_steps": 12, "save_steps": 4, "replay_rollouts": 2, **flags})
        return script.train(*script.make_parser().parse_args_and_config(arguments))

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "whole"


@pytest.fixture
def whole(train, kept, tmp_path):
    """The output folder of a run that nothing happened to, made once."""
    if not kept.exists():
        train(output_dir="whole")
        shutil.copytree(tmp_path / "whole", kept)
    return kept


def assert_one_sentence(error: BaseException, *parts: str) -> None:
    message = one_sentence(error)
    assert message == str(error)
    assert message.endswith(".")
    for part in parts:
        assert part in message


# Full disks and folders that cannot be written

PARTIAL = ".partial/checkpoint-8"
WRITTEN = [
    f"{PARTIAL}/proxy_config.json.tmp",
    f"{PARTIAL}/optimizer.pt",
    f"{PARTIAL}/scheduler.pt",
    f"{PARTIAL}/rng_state.pth",
    f"{PARTIAL}/trainer_state.json",
    f"{PARTIAL}/tokenizer.json",
    f"{PARTIAL}/checksums.json.tmp",
    "README.md",
    "proxy_config.json.tmp",
    "trainer_state.json",
    "train_results.json.tmp",
]


@pytest.fixture
def known_names(monkeypatch):
    """Temporary files have names that a test knows."""
    monkeypatch.setattr(files, "temporary_path", lambda path: f"{path}.tmp")


@pytest.mark.parametrize("place", WRITTEN)
def test_a_full_disk_loses_nothing(train, whole, tmp_path, place, known_names):
    """Every kind of file that a training writes, at the moment when that one finds no room."""
    full = tmp_path / "out" / place

    def fill_the_disk():
        full.parent.mkdir(parents=True, exist_ok=True)
        full.unlink(missing_ok=True)
        full.symlink_to("/dev/full")

    with pytest.raises(WriteError) as error:
        train(fill_the_disk)
    in_checkpoint = place.startswith(PARTIAL) or place == "README.md"
    assert_one_sentence(error.value, "out", "could not be written", "make room", "the same command resumes")
    left = checkpoints(tmp_path / "out")
    assert left[-1].name == ("checkpoint-4" if in_checkpoint else "checkpoint-12")
    assert not any(damaged_files(path) for path in left)
    assert not (tmp_path / "out" / ".partial").exists()
    assert not (tmp_path / "out" / "train_results.json").exists()
    if full.is_symlink():
        full.unlink()
    train()
    assert_same_weights(whole, tmp_path / "out")


@pytest.mark.parametrize("size", [10_000, 25_000])
def test_a_file_that_cannot_grow_loses_nothing(train, whole, tmp_path, size):
    """Of the proxy's weights, 17 kB, and of the optimizer's state, 34 kB: no file of this process may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(WriteError) as error:
            train(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_sentence(error.value, "out/checkpoint-8 could not be written")
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-4"]
    train()
    assert_same_weights(whole, tmp_path / "out")


def test_a_folder_that_turns_into_a_file(train, whole, tmp_path):
    with pytest.raises(WriteError) as error:
        train((tmp_path / "out" / ".partial").touch)
    assert_one_sentence(error.value, "out/checkpoint-8 could not be written (", "the same command resumes")
    (tmp_path / "out" / ".partial").unlink()
    train()
    assert_same_weights(whole, tmp_path / "out")


def test_the_rollouts_that_are_replayed_cannot_be_written(train, tmp_path):
    with pytest.raises(WriteError) as error:
        train(lambda: (tmp_path / "out" / PARTIAL / "replay_0.safetensors").mkdir(parents=True))
    assert_one_sentence(error.value, "out/checkpoint-8 could not be written (Is a directory)")


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "/dev/full/out", "prompts.jsonl/out"])
def test_an_output_folder_that_cannot_be_made(train, place):
    with pytest.raises(ValueError, match="cannot be written") as error:
        train(output_dir=place)
    assert_one_sentence(error.value, f"The folder {place} cannot be written (", "choose another --output_dir")


def test_the_records_file_is_the_first(train, tmp_path, known_names):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.tmp").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"run\.json could not be written \(No space left on device\)"):
        train()
    assert not checkpoints(tmp_path / "out")


# Damaged checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


FILES = [
    WEIGHTS,
    "proxy_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "replay_0.safetensors",
    "trainer_state.json",
    "training_args.bin",
    "checksums.json",
]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused(whole, tmp_path, name, damage):
    if name == "checksums.json" and damage is Path.unlink:
        pytest.skip("an older checkpoint: what is there is trusted")
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    resume.check_checkpoint(str(folder / "checkpoint-12"))
    damage(folder / "checkpoint-12" / name)
    with pytest.raises(ValueError, match="is damaged") as error:
        resume.check_checkpoint(str(folder / "checkpoint-12"))
    offered = f"with --resume_from_checkpoint {folder / 'checkpoint-8'}."
    listed = "" if name == "checksums.json" else f"checkpoint-12 is damaged ({name}): "
    assert_one_sentence(error.value, listed, offered)


def test_the_checkpoint_that_is_offered_goes_on(train, whole, tmp_path):
    train()
    os.remove(tmp_path / "out" / "train_results.json")
    flip_a_bit(tmp_path / "out" / "checkpoint-12" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"resume .* with --resume_from_checkpoint out/checkpoint-8\."):
        train()
    train(resume_from_checkpoint="out/checkpoint-8")
    assert_same_weights(whole, tmp_path / "out")
    train()  # the damaged one was written anew
    for checkpoint in checkpoints(tmp_path / "out"):
        truncate(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="no whole one before it, start anew with --overwrite_output_dir true"):
        train()
    train(overwrite_output_dir="true")
    assert_same_weights(whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "run.json").write_text("{"), "out/run.json is damaged"),
        (lambda out: (out / "run.json").write_text("[]"), "out/run.json is damaged"),
        (lambda out: (out / "run.json").write_bytes(b"\xff\xfe"), "out/run.json is damaged"),
        (lambda out: shutil.rmtree(out / "checkpoint-12") or (out / "checkpoint-12").mkdir(), "trainer_state.json"),
    ],
)
def test_a_damaged_output_folder_is_refused(train, whole, tmp_path, damage, message):
    shutil.copytree(whole, tmp_path / "out")
    run = {**json.loads((whole / "run.json").read_text())}
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        resume.checkpoint_to_resume(
            SimpleNamespace(overwrite_output_dir=False),
            SimpleNamespace(resume_from_checkpoint=None, output_dir="out"),
            run,
        )
    assert_one_sentence(error.value)


@pytest.mark.parametrize("name", ["nowhere", "prompts.jsonl", "true"])
def test_no_checkpoint_to_go_on_from(train, name):
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint must be a checkpoint folder, got {name}"):
        train(resume_from_checkpoint=name)


# A reward server

ASKING = """
import json, urllib.request

def upper(prompts, completions, **kwargs):
    request = urllib.request.Request("http://127.0.0.1:{port}", json.dumps(completions).encode())
    return json.load(urllib.request.urlopen(request))
"""


class RewardServer:
    """Scores completions as the reward of `tiny_run` does, at `port`; goes away and comes back."""

    def __init__(self):
        self.hangs = False
        self.port = 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                while outer.hangs:
                    time.sleep(0.01)
                body = json.dumps([float(sum(c.isupper() for c in x)) for x in texts]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, address):
                pass  # the client was told to wait no longer

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("hangs", [False, True], ids=["gone", "hangs"])
def test_a_reward_server_that_goes_away_and_comes_back(train, whole, tmp_path, hangs):
    server = RewardServer()
    (tmp_path / "my_rewards.py").write_text(ASKING.format(port=server.port))

    def go_away():
        if hangs:
            server.hangs = True
        else:
            server.stop()

    with pytest.raises(RewardError) as error:
        train(go_away, reward_timeout=0.5)
    happened = "took longer than reward_timeout=0.5 seconds" if hangs else "raised URLError (<urlopen error"
    assert_one_sentence(error.value, f"The reward function upper {happened}", "on the prompt '")
    assert_one_sentence(error.value, "the same command resumes from checkpoint-8, saved just now")
    assert checkpoints(tmp_path / "out")[-1].name == "checkpoint-8"
    if hangs:
        server.hangs = False
    else:
        server.start()
    train(reward_timeout=60)
    assert_same_weights(whole, tmp_path / "out")
    server.stop()
