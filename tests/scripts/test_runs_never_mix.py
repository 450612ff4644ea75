"""What happens to an output folder: every state that it can be in, and every command that meets it."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from eval.trained import read_baseline, read_proxy
from trl_proxy import ProxyConfig
from trl_proxy.files import write_checksums
from trl_proxy.runs.process import Interrupted
from trl_proxy.runs.resume import differences, is_finished, read_run
from trl_proxy.trainer.checkpoints import AtomicCheckpointMixin

BASELINES = ("ppo", "rloo", "grpo", "dpo")
WEIGHTS = "proxy_model.safetensors"
MORE = {"max_steps": 12}
OTHER_SEED = {"seed": 1}


class Killed(BaseException):
    """Ends a training as SIGKILL does: nothing is tidied up."""


class Kill(TrainerCallback, ExportableState):
    """Ends a training at a step, in the middle of its checkpoint, or after its last one."""

    now = 0

    def __init__(self, step: int | None = None, saving: int | None = None, end: bool = False):
        self.step, self.saving, self.end = step, saving, end

    def on_step_end(self, args, state, control, **kwargs):
        self.now = state.global_step
        if self.now == self.step:
            raise Killed

    def state(self):
        if self.now == self.saving:
            raise Killed
        return {"args": {}, "attributes": {}}

    def on_train_end(self, args, state, control, **kwargs):
        if self.end:
            raise Killed


@pytest.fixture
def train(load_script, tiny_run, monkeypatch, tmp_path):
    """`train(method="proxy", kill={}, **flags)`: a training script in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(method="proxy", kill=None, **flags):
        monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
        flags = {"output_dir": "out", "num_generations": 2, **flags}
        if method == "proxy":
            script = importlib.import_module("trl_proxy.runs.train")
            main, parse = script.train, script.make_parser().parse_args_and_config
        else:
            main, parse = load_script("train_baseline").main, lambda words: [words]
            flags |= {"learning_rate": 0.01, "lora_r": 4, "gradient_checkpointing": "false"}
        words = tiny_run(**flags)
        drop = ["--gate_hidden_sizes"] if method != "proxy" else []
        drop += ["--steps_per_generation", "--num_iterations", "--num_generations"] if method == "dpo" else []
        for name in drop:
            del words[words.index(name) : words.index(name) + 2]
        if method != "proxy":
            words += ["--method", method]
        init = AtomicCheckpointMixin.__init__

        def init_and_kill(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.add_callback(Kill(**(kill or {})))

        with monkeypatch.context() as patch:
            patch.setattr(AtomicCheckpointMixin, "__init__", init_and_kill)
            if kill is None:
                return main(*parse(words))
            with pytest.raises(Killed):
                main(*parse(words))
            return None

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


STATES = {
    "killed": {"kill": {"step": 7}},
    "killed while it saved": {"kill": {"saving": 8}},
    "killed at its end": {"kill": {"end": True}},
    "killed before its first checkpoint": {"kill": {"step": 3}},
    "finished": {},
    "finished with another seed": OTHER_SEED,
    "overwritten and killed": {"kill": {"step": 5}},
}


@pytest.fixture
def folder(train, made, tmp_path):
    """`folder(state)`: puts an output folder in a state, made once, at `out`."""

    def put(state: str, at: str = "out") -> Path:
        kept = made / state
        if not kept.exists():
            if state == "overwritten and killed":
                shutil.copytree(folder_of("finished with another seed"), tmp_path / "made")
                train(output_dir="made", overwrite_output_dir="true", **STATES[state])
            else:
                train(output_dir="made", **STATES[state])
            shutil.move(tmp_path / "made", kept)
        shutil.copytree(kept, tmp_path / at)
        return tmp_path / at

    def folder_of(state: str) -> Path:
        shutil.rmtree(put(state, at="other"))
        return made / state

    put.of = folder_of
    return put


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "_lock"}


def same_weights(folder: Path, other: Path) -> bool:
    first, second = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    return all(torch.equal(first[name], second[name]) for name in first)


def is_whole(folder: Path) -> None:
    """A finished run, and nothing but that."""
    assert json.loads((folder / "train_results.json").read_text())["steps"] == max(steps(folder))
    owner = read_run(folder)
    assert not [checkpoint for checkpoint in folder.glob("checkpoint-*") if differences(read_run(checkpoint), owner)]
    assert not [path for path in folder.iterdir() if path.name in (".partial", ".hub") or path.suffix == ".tmp"]


@pytest.mark.fault
@pytest.mark.parametrize("state", [state for state in STATES if state != "finished with another seed"])
def test_the_same_command(train, folder, tmp_path, state, capsys):
    """Comes to the result of an undisturbed run, from wherever it was interrupted."""
    whole, out = folder.of("finished"), folder(state)
    for name in (".partial", ".hub"):  # as a kill leaves them
        (out / name / "checkpoint-8").mkdir(parents=True, exist_ok=True)
    (out / "train_results.json.0123abcd.tmp").touch()
    train()
    assert same_weights(out, whole)
    is_whole(out)
    said = capsys.readouterr().out
    resumed = {"killed at its end": "out/checkpoint-8 is the end", "finished": "out/checkpoint-8 is the end"}
    assert resumed.get(state, "" if "first" in state else "Resuming from out/checkpoint-4") in said


@pytest.mark.fault
@pytest.mark.parametrize("state", ["killed", "killed while it saved", "killed at its end", "finished"])
def test_other_commands_are_refused(train, folder, state):
    """And nothing is touched."""
    out = folder(state)
    before = contents(out)
    for flags, names in ((MORE, "max_steps"), (OTHER_SEED, "seed"), ({**MORE, **OTHER_SEED}, "max_steps, seed")):
        message = rf"out holds the checkpoint of another run \(different: {names}\): choose another --output_dir, "
        with pytest.raises(ValueError, match=message) as error:
            train(**flags)
        assert str(error.value).endswith("or start anew with --overwrite_output_dir.")
    assert contents(out) == before


@pytest.mark.fault
@pytest.mark.parametrize("state", ["killed while it saved", "finished", "killed before its first checkpoint"])
def test_another_command_in_its_place(train, folder, state):
    """With --overwrite_output_dir nothing is left of the run that was there; nor of one without a checkpoint."""
    other, out = folder.of("finished with another seed"), folder(state)
    (out / "notes.txt").write_text("mine")
    train(**OTHER_SEED, **({} if "first" in state else {"overwrite_output_dir": "true"}))
    assert same_weights(out, other)
    is_whole(out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.fault
def test_an_overwriting_run_that_is_interrupted_is_not_the_old_one(train, folder, tmp_path):
    """The command without the flag resumes, as it says; the old run's later checkpoints are gone."""
    out = folder("finished with another seed")
    (out / "checkpoint-8").rename(out / "checkpoint-40")  # a longer run
    signalling = (
        "import os, signal\n\n\ndef upper(prompts, completions, **kwargs):\n"
        "    if os.path.isdir('out/checkpoint-4') and not os.path.exists('sent'):\n"
        "        open('sent', 'w').close()\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(sum(c.isupper() for c in x)) for x in completions]\n"
    )
    (tmp_path / "my_rewards.py").write_text(signalling)
    message = "SIGTERM ended the run: .* and the same command without --overwrite_output_dir resumes"
    with pytest.raises(Interrupted, match=message):
        train(max_steps=12, overwrite_output_dir="true")
    assert steps(out) == [4, 8]
    train(max_steps=12)
    assert steps(out) == [4, 8, 12]
    is_whole(out)


@pytest.mark.fault
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_never_mix(train, tmp_path, method):
    """They share the proxy's code: refused, overwritten, and what a comparison reads of a folder that is not done."""
    out = tmp_path / "out"
    train(method, kill={"step": 5})
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different: seed\)"):
        train(method, **OTHER_SEED)
    with pytest.raises(
        ValueError, match=r"The training in .*out is not finished: .* checkpoint, .*out/checkpoint-4\."
    ):
        read_baseline(str(out))
    (out / "adapter_model.safetensors").write_bytes(b"old")
    train(method, kill={"step": 1}, overwrite_output_dir="true", **OTHER_SEED)
    left = {path.name for path in out.iterdir()} - {"_lock"}
    assert left == {"run.json", "log.jsonl", *(["pairs.json"] if method == "dpo" else [])}
    assert json.loads((out / "run.json").read_text())["seed"] == 1


@pytest.mark.fault
def test_a_proxy_that_is_not_finished(folder):
    """Whoever asks for it, as generate.py and a comparison do, is told of its newest checkpoint."""
    folder("killed at its end")
    with pytest.raises(
        ValueError, match=r"out holds no proxy: proxy_config\.json is missing, but out/checkpoint-8 has"
    ):
        ProxyConfig.from_pretrained("out")
    with pytest.raises(
        ValueError, match=r"out is not finished: .*the same command resumes.* checkpoint, out/checkpoint-8"
    ):
        read_proxy("out")
    assert read_proxy("out/checkpoint-8").seed == 42
    folder("finished", at="done")
    assert read_proxy("done").episodes == 16


@pytest.mark.fault
def test_a_running_folder(train, folder, tmp_path):
    out = folder("killed")
    with FileLock(out / "_lock"):
        for flags in ({}, MORE, {"overwrite_output_dir": "true"}, {"resume_from_checkpoint": "out/checkpoint-4"}):
            with pytest.raises(ValueError, match="Another process is at work in out"):
                train(**flags)
    assert steps(out) == [4]


@pytest.mark.fault
def test_a_finished_run_without_its_checkpoints(train, folder, capsys):
    """Is not trained again, and not replaced by another one."""
    out = folder("finished")
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (out / WEIGHTS).stat().st_mtime_ns
    trained = train()
    assert "out holds this run, finished: nothing left to train" in capsys.readouterr().out
    assert trained.state.global_step == 8
    assert torch.equal(load_file(out / WEIGHTS)["gate.mlp.2.weight"], trained.model.gate.mlp[-1].weight)
    assert (out / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"out holds another run \(different: seed\)"):
        train(**OTHER_SEED)


@pytest.mark.fault
def test_a_folder_that_was_moved(train, folder, tmp_path, monkeypatch):
    """And its LM and its prompts with it: the same content under another name is the same run."""
    whole = folder.of("finished")
    folder("killed", at="elsewhere/moved")
    for name in ("lm", "prompts.jsonl", "my_rewards.py"):
        shutil.copytree(tmp_path / name, tmp_path / "elsewhere" / name) if name == "lm" else shutil.copy(
            tmp_path / name, tmp_path / "elsewhere"
        )
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(output_dir="moved", model_name_or_path="lm", dataset_name="prompts.jsonl")
    assert same_weights(tmp_path / "elsewhere" / "moved", whole)


def rewrite(run_file: Path, **changes) -> None:
    run = json.loads(run_file.read_text(encoding="utf-8")) | changes
    run_file.write_text(json.dumps(run), encoding="utf-8")
    if run_file.parent.name.startswith("checkpoint"):
        write_checksums(str(run_file.parent))


@pytest.mark.fault
def test_checkpoints_of_other_versions(train, folder, capsys):
    """Another version of the code is said, another format refused, and so is a checkpoint that tells nothing."""
    out = folder("killed")
    rewrite(out / "checkpoint-4" / "run.json", versions={"trl-proxy": "0.0.1"})
    train(kill={"step": 5})
    said = capsys.readouterr().out
    assert "out/checkpoint-4 was written by other versions (peft None, now " in said
    assert "trl-proxy 0.0.1, now " in said
    rewrite(out / "checkpoint-4" / "run.json", format=0)
    with pytest.raises(ValueError, match=r"checkpoint-4 was written by trl-proxy 0\.0\.1 in another format: finish"):
        train()
    with pytest.raises(ValueError, match="in another format"):
        train(resume_from_checkpoint="out/checkpoint-4")
    (out / "checkpoint-4" / "run.json").unlink()
    write_checksums(str(out / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"out/checkpoint-4 does not tell of which run it is: name it by --resume"):
        train()


@pytest.mark.fault
def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(train, folder):
    """Copied into the folder, whose own run.json is right."""
    out, other = folder("killed"), folder("finished with another seed", at="other")
    shutil.copytree(other / "checkpoint-8", out / "checkpoint-8")
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different: seed\)"):
        train()
    with pytest.raises(ValueError, match=r"out holds checkpoint-8 of another run \(different: max_steps, seed\)"):
        train(resume_from_checkpoint="out/checkpoint-4", **MORE)


# --resume_from_checkpoint


@pytest.mark.fault
def test_a_checkpoint_is_continued_with_more_steps(train, folder, tmp_path, capsys):
    """In its own folder or in another one; a killed continuation resumes."""
    out = folder("finished")
    train(resume_from_checkpoint="out/checkpoint-8", kill={"step": 11}, save_steps=2, **MORE)
    said = "out/checkpoint-8 is of a run with other settings (max_steps, save_steps): those of this command count."
    assert said in capsys.readouterr().out
    assert steps(out) == [4, 8]  # a rollout is four steps
    assert not (out / "train_results.json").exists()
    with pytest.raises(ValueError, match=r"not finished: .* checkpoint, out/checkpoint-8"):
        read_proxy("out")
    longer = {"max_steps": 16, "save_steps": 8}
    train(resume_from_checkpoint="out/checkpoint-8", **longer)
    assert steps(out) == [4, 8, 16]
    train(
        resume_from_checkpoint="out/checkpoint-8",
        output_dir="further",
        kill={"step": 13},
        **longer | {"save_steps": 4},
    )
    train(output_dir="further", **longer | {"save_steps": 4})
    assert steps(tmp_path / "further") == [12, 16]
    assert same_weights(out, tmp_path / "further")
    is_whole(tmp_path / "further")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": 0.5}, "holds the model and the optimizer of another learning_rate: leave that as it was"),
        ({"gate_hidden_sizes": 8}, "holds the model and the optimizer of another gate_hidden_sizes"),
        ({"overwrite_output_dir": "true"}, "would delete out/checkpoint-4, which --resume_from_checkpoint names"),
        ({"output_dir": "other"}, r"other holds checkpoint-4 of another run \(different: seed\)"),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_so(train, folder, flags, message):
    folder("finished")
    folder("finished with another seed", at="other")
    with pytest.raises(ValueError, match=message):
        train(resume_from_checkpoint="out/checkpoint-4", **flags)


@pytest.mark.fault
def test_a_checkpoint_of_another_method(train, folder):
    folder("killed")
    with pytest.raises(ValueError, match="names out/checkpoint-4, a checkpoint of proxy: name one of rloo"):
        train("rloo", output_dir="other", resume_from_checkpoint="out/checkpoint-4")


# What the settings name


def change_lm(tmp_path: Path) -> None:
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file({**weights, name: weights[name] * 1.01}, tmp_path / "lm" / "model.safetensors", {"format": "pt"})


def change_template(tmp_path: Path) -> None:
    path = tmp_path / "lm" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text().replace("aw", "zw"))


def change_reward(tmp_path: Path) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(path.read_text().replace("isupper", "islower"))


def change_proxy(tmp_path: Path) -> None:
    weights = load_file(tmp_path / "first" / WEIGHTS)
    name = "gate.mlp.2.bias"
    save_file({**weights, name: weights[name] + 1}, tmp_path / "first" / WEIGHTS, {"format": "pt"})


def touch_nothing_of_it(tmp_path: Path) -> None:
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path)
    for name in ("lm", "first"):
        (tmp_path / name / "README.md").write_text("Another text.")
        (tmp_path / name / "run.json").write_text("{}")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_lm, "model_name_or_path"),
        (change_template, "model_name_or_path"),
        (change_prompts, "dataset_name"),
        (change_reward, "reward_funcs"),
        (change_proxy, "proxy_name_or_path"),
        (touch_nothing_of_it, None),
    ],
)
def test_what_is_exchanged_under_its_name_is_noticed(train, folder, tmp_path, change, named):
    """By the command that resumes, and by comparisons and sweeps, which ask whether it is finished."""
    first = folder("finished", at="first")
    (first / "run.json").unlink()
    train(proxy_name_or_path="first", max_steps=4)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert is_finished(tmp_path / "out", run["asked"], {})
    change(tmp_path)
    assert is_finished(tmp_path / "out", run["asked"], {}) == (named is None)
    if named is None:
        train(proxy_name_or_path="first", max_steps=4)
    else:
        with pytest.raises(ValueError, match=rf"checkpoint of another run \(different: the content of {named}\)"):
            train(proxy_name_or_path="first", max_steps=4)


@pytest.mark.fault
def test_pairs_are_of_the_lm_that_made_them(train, tmp_path):
    """A run that was killed before its first checkpoint leaves its pairs to the same command, and to no other LM."""
    train("dpo", kill={"step": 2})
    pairs = tmp_path / "out" / "pairs.json"
    before = pairs.read_text()
    train("dpo", kill={"step": 2})
    assert pairs.read_text() == before
    change_lm(tmp_path)
    train("dpo", kill={"step": 2})
    made_with = json.loads(pairs.read_text())["made_with"]
    assert made_with["contents"] != json.loads(before)["made_with"]["contents"]
    assert json.loads(pairs.read_text())["seconds"] != json.loads(before)["seconds"]


@pytest.mark.fault
def test_a_reward_that_failed_may_be_fixed(train, tmp_path):
    path = tmp_path / "my_rewards.py"
    train("rloo", kill={"step": 1})
    works = path.read_text()
    path.write_text(
        works.replace(
            "    return [float", "    if len(completions) == 0 or True:\n        raise OSError\n    return [float"
        )
    )
    with pytest.raises(ValueError, match="raised OSError"):
        train("rloo")
    path.write_text(works + "\n")
    train("rloo")
    assert steps(tmp_path / "out")[-1] == 8


# The best checkpoint

BEST = {"eval_strategy": "steps", "dataset_test_split": "train[:4]", "num_generations_eval": 1, "max_steps": 12}
BEST |= {"load_best_model_at_end": "true", "metric_for_best_model": "eval_reward", "greater_is_better": "false"}


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_steps": 3, "save_steps": 6},
        {"eval_steps": 5, "save_strategy": "best"},
        {"eval_steps": 4, "save_steps": 8, "save_total_limit": 1},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_the_best_model_has_a_checkpoint(train, tmp_path, flags, monkeypatch):
    """Evaluations fall on the steps of checkpoints; so the best model is found after all steps, also in a run that was
    killed at its end and moved, and when a finished run is called again."""
    train(kill={"end": True}, **BEST, **flags)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere" / "moved")
    (moved / "_lock").unlink()  # held by this process
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        trained = train(output_dir="moved", **BEST, **flags)
        best = Path(trained.state.best_model_checkpoint)
        assert best == Path("moved", f"checkpoint-{trained.state.best_global_step}")
        assert same_weights(best, moved)
        assert torch.equal(load_file(moved / WEIGHTS)["gate.mlp.2.weight"], trained.model.gate.mlp[-1].weight)
        rewards = {e["step"]: e["eval_reward"] for e in trained.state.log_history if "eval_reward" in e}
        assert rewards.keys() <= {4, 8, 12}
        assert rewards[trained.state.best_global_step] == min(rewards.values())


@pytest.mark.fault
def test_a_best_checkpoint_that_is_gone(train, tmp_path):
    flags = {**BEST, "eval_steps": 4, "save_steps": 4}
    train(kill={"step": 11}, **flags)
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    state |= {"best_global_step": 4, "best_model_checkpoint": "out/checkpoint-4"}
    (tmp_path / "out" / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    write_checksums(str(tmp_path / "out" / "checkpoint-8"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    trained = train(**flags)
    assert trained.state.best_global_step == 12
    assert same_weights(tmp_path / "out" / "checkpoint-12", tmp_path / "out")


@pytest.mark.fault
@pytest.mark.parametrize("strategy", ["steps", "best", "no"])
def test_a_signal_leaves_a_checkpoint(train, tmp_path, strategy):
    """Whatever the strategy, and if the model is not the best one."""
    flags = {**BEST, "eval_steps": 4, "save_steps": 4, "save_strategy": strategy}
    flags |= {"load_best_model_at_end": "false"} if strategy == "no" else {}
    (tmp_path / "my_rewards.py").write_text(
        "import os, signal\n\ncalls = 0\n\n\ndef upper(prompts, completions, **kwargs):\n    global calls\n"
        "    calls += 1\n    if calls == 2:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(sum(c.isupper() for c in x)) for x in completions]\n"
    )
    with pytest.raises(Interrupted):
        train(**flags)
    assert steps(tmp_path / "out")[-1] == 8
