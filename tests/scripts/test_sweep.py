"""scripts/sweep.py: a small grid trained and evaluated for real, going on after a kill, and its error messages."""

import importlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from eval.records import read_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep():
    return importlib.import_module("eval.grid")


@pytest.fixture
def arguments(tmp_path, tiny_lm, tiny_tokenizer, monkeypatch):
    """A sweep of seconds over a tiny LM."""
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    rows = [{"prompt": f"{a}{b}", "kind": "everyday"} for a in "abcdef" for b in "wxyz"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep_rewards.py").write_text(
        "def upper(prompts, completions, **kwargs):\n"
        "    return [float(sum(c.isupper() for c in x)) for x in completions]\n"
    )
    train = {
        "model_name_or_path": str(tmp_path / "lm"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "reward_funcs": ["sweep_rewards.upper"],
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 5,
        "num_iterations": 1,
        "learning_rate": 0.03,
        "max_steps": 8,
        "save_steps": 2,
        "report_to": "none",
    }
    compare = {
        "model_name_or_path": str(tmp_path / "lm"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "split": "train",
        "reward_model_name_or_path": "sweep_rewards.upper",
        "gold_reward_model_name_or_path": "none",
        "max_new_tokens": 5,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(compare))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    return {
        "recipe": "train.yaml",
        "evaluate": "compare.yaml",
        "grid": {"p_t": [0.1, 0.02]},
        "launch": shlex.quote(sys.executable),
        "jobs": 2,
        "output_dir": "cells",
    }


@pytest.mark.fault
def test_a_sweep_goes_on_after_an_interrupt(sweep, arguments, fork_server, monkeypatch, tmp_path):
    """And a cell that fails keeps no other from finishing."""
    arguments |= {"grid": {"max_candidates": [4, 0]}, "launch": fork_server.python}
    monkeypatch.setattr(sys, "executable", fork_server.python)
    recipe, log = tmp_path / "sweep.yaml", tmp_path / "log.txt"
    recipe.write_text(yaml.safe_dump(arguments))
    script = fork_server([ROOT / "scripts" / "sweep.py", "--config", recipe], tmp_path, log)
    good, bad = (tmp_path / "cells" / f"max_candidates={n}-seed0" for n in (4, 0))
    end = time.monotonic() + 120
    while not list(good.glob("checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(script.pid, signal.SIGINT)
    assert script.wait() == 130
    assert "interrupted; the same command resumes" in log.read_text()
    assert not (tmp_path / "cells" / "sweep.md").exists()

    args = sweep.SweepArguments(**arguments)
    with pytest.raises(ValueError, match=r"1 of 2 cells failed: max_candidates=0-seed0 failed, see .*log.txt"):
        sweep.sweep(args)
    assert "`max_candidates` must be" in (bad / "log.txt").read_text()
    sft, proxy = sorted(read_records(good), key=lambda record: record["method"] != "sft")
    assert (proxy["variant"], proxy["episodes"]) == ("prefix, max_candidates=4", 32)
    gain = sum(proxy["rewards"]) / 24 - sum(sft["rewards"]) / 24
    assert gain > 0
    _, rows = sweep.table(args)
    assert len(rows) == 1
    assert rows[0][:2] == ["4", "1"]
    assert rows[0][2].startswith(f"{gain:+.2f} [")
    table = (tmp_path / "cells" / "sweep.md").read_text()
    assert table.startswith("| max_candidates | seeds | Δ vs SFT | Δ everyday | refusals everyday | LM log-prob |")

    # without the cell that fails there is nothing to do but to draw
    (bad / "log.txt").unlink()
    bad.rmdir()
    sweep.sweep(sweep.SweepArguments(**arguments | {"grid": {"max_candidates": [4]}}))
    assert {path.name for path in (tmp_path / "cells" / "plots").glob("*.png")} == {
        f"sweep_max_candidates_{name}.png" for name in ("scores", "curves", "distributions")
    }

    # what is finished is not trained again, but by other settings; the other cell is, and takes over the LM's record
    cells = sweep.cells_of(args)
    assert [len(sweep.commands(args, cell)) for cell in cells] == [1, 2]
    other = sweep.SweepArguments(**arguments | {"settings": {"max_steps": 6}})
    assert len(sweep.commands(other, cells[0])) == 2
    bad.mkdir()
    sweep.share_sft_record(args, cells[1])
    assert (bad / "records" / "sft-seed0.json").read_bytes() == (good / "records" / "sft-seed0.json").read_bytes()


@pytest.mark.fault
@pytest.mark.parametrize("left", [None, "{}"])
def test_a_sweep_without_a_whole_cell_says_what_failed(sweep, arguments, monkeypatch, tmp_path, left):
    """Not that a table cannot be drawn, which follows from it."""

    def fail(runner, cell):
        if left:
            records = cell.folder / "records"
            records.mkdir(parents=True)
            (records / "proxy-seed0.json").write_text(left)
        raise ValueError(f"{cell.folder.name} failed, see log.txt")

    monkeypatch.setattr(sweep.Runner, "run", fail)
    with pytest.raises(ValueError, match=r"^2 of 2 cells failed: p_t=.* failed, see log.txt; .*command resumes\.$"):
        sweep.sweep(sweep.SweepArguments(**arguments))


def test_cells_and_commands(sweep, arguments):
    arguments |= {"grid": {"p_t": [0.1, 0.5], "gate_hidden_sizes": [[64, 64]]}, "seeds": [0, 1], "split": "test"}
    args = sweep.SweepArguments(**arguments | {"settings": {"max_steps": 8}})
    cells = sweep.cells_of(args)
    assert [cell.folder.name for cell in cells] == [
        "p_t=0.1,gate_hidden_sizes=_64,_64_-seed0",
        "p_t=0.5,gate_hidden_sizes=_64,_64_-seed0",
        "p_t=0.1,gate_hidden_sizes=_64,_64_-seed1",
        "p_t=0.5,gate_hidden_sizes=_64,_64_-seed1",
    ]
    train, compare = sweep.commands(args, cells[1])
    assert train[1].endswith("train_proxy.py")
    expected = "--config train.yaml --max_steps 8 --p_t 0.5 --gate_hidden_sizes 64 64 --seed 0 --output_dir"
    assert " ".join(train[2:-1]) == expected
    assert " ".join(compare[-4:]) == f"--proxies {cells[1].folder} --split test"
    baseline = sweep.SweepArguments(**arguments | {"method": "ppo", "grid": {"learning_rate": [1e-4]}})
    train, compare = sweep.commands(baseline, sweep.cells_of(baseline)[0])
    assert train[2:4] == ["--method", "ppo"]
    assert "--baselines" in compare
    assert "proxy" not in compare


def test_grid_and_settings_on_the_command_line(sweep, arguments):
    words = ["--recipe", arguments["recipe"], "--evaluate", arguments["evaluate"]]
    words += ["--grid", '{"p_t": [0.1, 0.5]}', "--settings", '{"max_steps": 8}']
    (args,) = TrlParser([sweep.SweepArguments]).parse_args_and_config(words)
    assert args.grid == {"p_t": [0.1, 0.5]}
    assert args.settings == {"max_steps": 8}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "a2c"}, "--method must be proxy or one of ppo, rloo, grpo, dpo, got a2c"),
        ({"recipe": "none.yaml"}, "--recipe must be a file that exists, got none.yaml"),
        ({"evaluate": "none.yaml"}, "--evaluate must be a file that exists, got none.yaml"),
        ({"grid": {}}, "--grid is empty"),
        ({"grid": "p_t=0.1"}, "--grid must be a JSON object, such as .*, got p_t=0.1"),
        ({"settings": "[8]"}, r"--settings must be a JSON object, such as .*, got \[8\]"),
        ({"grid": {"p_t": 0.1}}, "--grid must give a list of values for every field, got 0.1 for p_t"),
        ({"grid": {"p_t": []}}, r"--grid must give a list of values for every field, got \[\] for p_t"),
        ({"jobs": 0}, "--jobs and --seeds must be at least one"),
        ({"seeds": []}, "--jobs and --seeds must be at least one"),
    ],
)
def test_bad_arguments(sweep, arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep.SweepArguments(**arguments | changes)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "recipes").glob("sweep_*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_understood(sweep, load_script, path, monkeypatch):
    """By the sweep, and every cell by the training script."""
    monkeypatch.chdir(ROOT)
    args = sweep.SweepArguments(**yaml.safe_load(path.read_text()))
    for cell in sweep.cells_of(args):
        train, compare = sweep.commands(args, cell)
        if args.method == "proxy":
            start = next(i for i, word in enumerate(train) if word.endswith("train_proxy.py"))
            _, training_args, *_ = load_script("train_proxy").make_parser().parse_args_and_config(train[start + 1 :])
        else:
            start = train.index("--method")
            _, (_, training_args, _) = load_script("train_baseline").parse(train[start:])
        assert (training_args.seed, training_args.output_dir) == (cell.seed, str(cell.folder))
        load_script("compare").make_parser().parse_args_and_config(compare[2:])
