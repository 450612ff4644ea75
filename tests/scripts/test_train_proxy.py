"""scripts/train_proxy.py: flags, recipes, resuming, and what it says to a mistake."""

import importlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from trl_proxy import ProxyModelForCausalLM
from trl_proxy.runs import fit as runs
from trl_proxy.runs.process import Interrupted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("trl_proxy.runs.train")


def run(script, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's, or what it was before
    script.train(*script.make_parser().parse_args_and_config(arguments))


def test_it_trains_and_leaves_a_proxy_that_loads(script, tiny_run, tiny_lm, monkeypatch, tmp_path, capsys):
    run(script, tiny_run(), monkeypatch, tmp_path)
    assert "trainable params:" in capsys.readouterr().out
    assert {"proxy_config.json", "proxy_model.safetensors", "run.json", "trainer_state.json", "README.md"} <= set(
        os.listdir(tmp_path / "out")
    )
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    # 8 steps of 4 episodes, each episode used twice
    assert (results["episodes"], results["steps"], results["num_processes"]) == (16, 8, 1)
    assert results["train_seconds"] > 0
    assert results["train_peak_memory_mb"] > 100
    model = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), tmp_path / "out")
    assert model.proxy_config.gate_hidden_sizes == [16]
    assert model.gate.mlp[-1].weight.abs().sum() > 0


def test_a_run_says_how_its_lm_was_decoded(script, tiny_run, tiny_lm, tiny_tokenizer, monkeypatch, tmp_path):
    """The LM's own options and the user's; the proxy keeps the user's."""
    lm = tiny_lm("llama")
    lm.generation_config.suppress_tokens = [40]
    lm.save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    flags = {"generation_kwargs": '{"repetition_penalty": 1.3}', "max_steps": 4, "save_steps": 4}
    run(script, tiny_run(**flags), monkeypatch, tmp_path)
    decoding = json.loads((tmp_path / "out" / "run.json").read_text())["decoding"]
    assert {"repetition_penalty": 1.3, "suppress_tokens": [40]}.items() <= decoding["generation_kwargs"].items()
    assert (decoding["eos_token_ids"], decoding["max_new_tokens"]) == ([2], 6)
    kept = json.loads((tmp_path / "out" / "proxy_config.json").read_text())["decoding"]
    assert kept == {"generation_kwargs": {"repetition_penalty": 1.3}}
    run(script, tiny_run(**flags), monkeypatch, tmp_path)  # it is the same run


def test_what_it_prints_and_what_other_users_can_read(script, tiny_run, monkeypatch, tmp_path, capsys):
    """A line per logging step and no dictionary, which `--verbose` brings back; files have the modes of `open`."""
    run(script, tiny_run(save_total_limit=1), monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert re.findall(r"^step (\d)/8 ", printed, re.MULTILINE) == ["4", "8"]
    assert "explained_variance" not in printed
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "explained_variance" in entry] == [4, 8]
    umask = os.umask(0o022)
    os.umask(umask)
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 3  # the proxy's, the checkpoint's, and its rollouts
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    run(script, tiny_run(output_dir=tmp_path / "verbose", verbose="true"), monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert "explained_variance" in printed
    assert "left" not in printed


def test_two_launches_at_once_do_not_share_a_port(launch_two, tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import os, time\nfrom accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        "state.wait_for_everyone()\ntime.sleep(5)\n"
        "os.write(1, f'rank {state.process_index} of {state.num_processes}\\n'.encode())\n"
    )
    with ThreadPoolExecutor() as pool:
        for result in pool.map(launch_two, [script] * 2, [[]] * 2):
            assert result.returncode == 0, result.stderr[-3000:]
            assert sorted(result.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_trained_proxy_is_trained_further(script, tiny_run, tiny_lm, monkeypatch, tmp_path):
    """With its own configuration, and the moments of its input as they were."""
    run(script, tiny_run(p_t=0.02, pooled_features="true"), monkeypatch, tmp_path)
    first = load_file(tmp_path / "out" / "proxy_model.safetensors")
    changes = {"proxy_name_or_path": tmp_path / "out", "output_dir": tmp_path / "further", "max_completion_length": 8}
    run(script, tiny_run(learning_rate=1e-4, **changes), monkeypatch, tmp_path)
    second = load_file(tmp_path / "further" / "proxy_model.safetensors")
    change = {name: (second[name] - first[name]).abs().max() for name in first}
    assert all(value == 0 for name, value in change.items() if ".feature_" in name)
    weights = [value for name, value in change.items() if name.endswith("weight")]
    assert min(weights) > 0
    assert max(weights) < 8 * 1.1e-4  # Adam moves a weight by the rate at most
    config = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), tmp_path / "further").proxy_config
    assert (config.p_t, config.pooled_features) == (0.02, True)


@pytest.mark.fault
def test_a_proxy_to_train_further_that_is_none(script, tiny_run, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"proxy_config\.json"):
        run(script, tiny_run(proxy_name_or_path=tmp_path / "lm"), monkeypatch, tmp_path)


@pytest.mark.fault
def test_the_same_command_goes_on_and_equals_one_run(script, tiny_run, monkeypatch, tmp_path):
    run(script, tiny_run(), monkeypatch, tmp_path)
    whole = load_file(tmp_path / "out" / "proxy_model.safetensors")
    # An interrupted run: the last checkpoint and the folder's proxy are gone.
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    os.remove(tmp_path / "out" / "proxy_model.safetensors")
    run(script, tiny_run(), monkeypatch, tmp_path)
    again = load_file(tmp_path / "out" / "proxy_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # Once more, with nothing left to do: the same proxy and the same record.
    results = (tmp_path / "out" / "train_results.json").read_text()
    run(script, tiny_run(), monkeypatch, tmp_path)
    again = load_file(tmp_path / "out" / "proxy_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["steps"] == json.loads(results)["steps"]


# A reward that sends its own process a signal, once
SIGNALLING = """
import os, pathlib, signal

def upper(prompts, completions, **kwargs):
    sent = pathlib.Path("sent")
    if {when} and not sent.exists():
        sent.touch()
        os.kill(os.getpid(), signal.{name})
    return [float(sum(c.isupper() for c in x)) for x in completions]
"""


@pytest.mark.fault
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_its_rollout(script, tiny_run, monkeypatch, tmp_path, name):
    """With a checkpoint, from which the same command resumes to the same result."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(script, tiny_run(max_steps=12), monkeypatch, tmp_path)
    whole = load_file(tmp_path / "out" / "proxy_model.safetensors")
    monkeypatch.setattr(runs, "PATIENCE", 60.0)
    when = "os.path.isdir('signalled/checkpoint-4')"
    (tmp_path / "my_rewards.py").write_text(SIGNALLING.format(when=when, name=name))
    with pytest.raises(
        Interrupted, match=f"{name} ended the run: its checkpoint is in .*, and the same command"
    ) as end:
        run(script, tiny_run(max_steps=12, output_dir=tmp_path / "signalled"), monkeypatch, tmp_path)
    assert end.value.signum == getattr(signal, name)
    assert json.loads((tmp_path / "signalled" / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert not (tmp_path / "signalled" / "train_results.json").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    run(script, tiny_run(max_steps=12, output_dir=tmp_path / "signalled"), monkeypatch, tmp_path)
    again = load_file(tmp_path / "signalled" / "proxy_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.fault
def test_a_signal_does_not_wait_for_slow_updates(script, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    when = "os.path.isdir('out/checkpoint-4')"
    (tmp_path / "my_rewards.py").write_text(SIGNALLING.format(when=when, name="SIGTERM"))
    with pytest.raises(Interrupted):
        run(script, tiny_run(), monkeypatch, tmp_path)
    assert (tmp_path / "out" / "checkpoint-5" / "proxy_model.safetensors").is_file()


@pytest.mark.fault
def test_another_runs_folder_is_refused(script, tiny_run, monkeypatch, tmp_path):
    run(script, tiny_run(), monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different: learning_rate, p_t\)"):
        run(script, tiny_run(learning_rate=0.5, p_t=0.2), monkeypatch, tmp_path)
    run(script, tiny_run(learning_rate=0.5, overwrite_output_dir="true"), monkeypatch, tmp_path)
    run(script, tiny_run(learning_rate=0.5), monkeypatch, tmp_path)  # resumes with the new one
    os.remove(tmp_path / "out" / "run.json")
    with pytest.raises(ValueError, match="checkpoint of something else"):
        run(script, tiny_run(), monkeypatch, tmp_path)


@pytest.mark.fault
def test_a_folder_is_one_runs(script, tiny_run, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / "_lock"),
        pytest.raises(ValueError, match=r"Another process is at work in .*out: let it end, or choose another"),
    ):
        run(script, tiny_run(), monkeypatch, tmp_path)
    assert os.listdir(tmp_path / "out") in ([], ["_lock"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"The folder .*file/out cannot be written \(Not a directory\)"):
        run(script, tiny_run(output_dir=tmp_path / "file" / "out"), monkeypatch, tmp_path)


def test_no_secret_is_written(script, tiny_run, monkeypatch, tmp_path):
    secrets = {"HF_TOKEN": "hf_" + "s" * 34, "OPENAI_API_KEY": "sk-" + "t" * 40, "WANDB_API_KEY": "u" * 40}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run(script, tiny_run(), monkeypatch, tmp_path)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"run.json", "trainer_state.json", "README.md", "proxy_model.safetensors"} <= {x.name for x in written}
    for path in written:
        content = path.read_bytes()
        assert [name for name, value in secrets.items() if value.encode() in content] == [], path


def test_a_token_on_the_command_line_is_not_in_the_runs_record(script, tiny_run, monkeypatch, tmp_path):
    run(script, tiny_run(hub_token="hf_" + "s" * 34, max_steps=4), monkeypatch, tmp_path)
    for path in (tmp_path / "out").rglob("*.json"):
        assert "hf_sss" not in path.read_text(), path


RECIPES = [ROOT / "scripts" / "recipes" / f"{name}.yaml" for name in ("smollm2_cpu", "smollm2_cpu_harmless", "paper")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood(script, recipe, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    parser = script.make_parser()
    script_args, training_args, proxy_args, model_args = parser.parse_args_and_config(["--config", str(recipe)])
    assert training_args.output_dir.startswith("outputs/")
    assert proxy_args.p_t == settings["p_t"]
    assert script_args.dataset_name == settings["dataset_name"]
    assert model_args.model_name_or_path == settings["model_name_or_path"]
    assert training_args.max_completion_length == settings["max_completion_length"]


@pytest.mark.fault
def test_unknown_yaml_keys_are_named(script, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("output_dir: x\nlearning_rat: 1.0\n")
    with pytest.raises(ValueError, match="learning_rat"):
        script.make_parser().parse_args_and_config(["--config", str(path)])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"p_t": 0}, "`p_t` must be in (0, 1], got 0.0"),
        ({"temperature": 0}, "`temperature` must be above 0"),
        ({"max_candidates": 0}, "`max_candidates` must be at least 1, got 0"),
        ({"use_vllm": "true"}, "use_vllm"),
        ({"dataset_name": "/nowhere/prompts.jsonl"}, "/nowhere/prompts.jsonl"),
        ({"reward_funcs": "no_such_module.reward"}, "no_such_module"),
    ],
)
def test_a_mistake_is_one_sentence_before_work_starts(script, tiny_run, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(script, "fit", None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(script, tiny_run(**flags), monkeypatch, tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault
def test_a_mistake_ends_the_script_without_a_traceback(tiny_run, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_proxy.py"), *tiny_run(max_candidates=0)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == "train_proxy: `max_candidates` must be at least 1, got 0."
    assert "Traceback" not in result.stderr


@pytest.mark.fault
def test_two_processes_train_one_proxy(start_ranks, launch_two, tiny_run, tiny_lm, tmp_path):
    """A signal to one of two processes, or its bad reward, stops both. The same command resumes to the same result."""

    def run_both(**flags):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        statuses = start_ranks(2, [ROOT / "scripts" / "train_proxy.py", *tiny_run(**shared, **flags)], tmp_path, log)
        return statuses, log.read_text()

    shared = {"per_device_train_batch_size": 2, "num_generations": 2, "replay_rollouts": 2}
    statuses, printed = run_both(max_steps=12, output_dir=tmp_path / "whole")
    assert statuses == [0, 0], printed[-2000:]
    when = "os.environ['RANK'] == '1' and os.path.isdir('out/checkpoint-4')"
    (tmp_path / "my_rewards.py").write_text(SIGNALLING.format(when=when, name="SIGTERM"))
    statuses, printed = run_both(max_steps=12)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert printed.count("train_proxy: SIGTERM ended the run") == printed.count("train_proxy: ") == 1
    assert (tmp_path / "out" / "checkpoint-8" / "proxy_model.safetensors").is_file()
    assert not (tmp_path / "out" / "train_results.json").exists()
    statuses, printed = run_both(max_steps=12)  # the signal is sent once
    assert "Resuming from" in printed
    assert statuses == [0, 0], printed[-2000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    whole, again = (load_file(tmp_path / name / "proxy_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    model = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), tmp_path / "out")
    assert model.gate.mlp[-1].weight.abs().sum() > 0

    (tmp_path / "my_rewards.py").write_text(
        "import os\n\n\ndef upper(prompts, completions, **kwargs):\n"
        "    return [float('nan') if os.environ['RANK'] == '1' else 0.0] * len(prompts)\n"
    )
    result = launch_two("scripts/train_proxy.py", tiny_run(**shared, output_dir=tmp_path / "bad"), cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("returned nan instead of a finite number") == result.stderr.count("train_proxy: ") == 1
    assert (tmp_path / "bad" / "checkpoint-0" / "proxy_model.safetensors").is_file()
