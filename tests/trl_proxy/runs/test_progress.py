"""What a training prints and what it writes to its log file."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from trl_proxy.runs import progress
from trl_proxy.runs.progress import LOG_FILE, ProgressLines


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as the lines see them; set `clock.now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def training(tmp_path, clock):
    """`training(limit=None, history=(), quiet=False)` -> (callback, its state, `log(step, seconds, **values)`)."""

    def start(limit=None, history=(), quiet=False):
        args, control = SimpleNamespace(output_dir=str(tmp_path)), TrainerControl()
        state = TrainerState(max_steps=200, global_step=history[-1]["step"] if history else 0)
        state.log_history = list(history)
        lines = ProgressLines(limit, quiet)
        lines.on_train_begin(args, state, control)

        def log(step, seconds, **values):
            state.global_step, clock.now = step, seconds
            state.log_history.append({**values, "step": step})
            lines.on_log(args, state, control, logs=values)

        return lines, state, log

    return start


def test_a_line_per_logging_step(training, capsys, tmp_path):
    _, _, log = training()
    log(50, 60.0, reward=-0.25, loss=0.1, accept_rate=0.714, kl=0.5)
    log(50, 60.0, eval_reward=0.125, eval_loss=0.2)
    log(100, 120.0, reward=0.5, accept_rate=0.69)
    log(200, 240.0, train_runtime=240.0)
    first, second, third = capsys.readouterr().out.splitlines()
    assert " ".join(first.split()) == "step 50/200 25% 3:00 left reward -0.250 accepted 71%"
    assert " ".join(second.split()) == "step 50/200 25% 3:00 left reward -0.250 validation +0.125 accepted 71%"
    assert " ".join(third.split()) == "step 100/200 50% 2:00 left reward +0.500 validation +0.125 accepted 69%"
    written = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert written[0] == {"reward": -0.25, "loss": 0.1, "accept_rate": 0.714, "kl": 0.5, "step": 50}
    assert len(written) == 4


def test_a_time_limit_counts_what_was_spent_before(training, capsys):
    _, _, log = training(limit=1000.0, history=[{"step": 20, "train_seconds": 400.0}])
    log(30, 100.0, reward=0.0)
    assert capsys.readouterr().out.startswith("step  30/200   50%   8:20 left")


def test_a_resumed_run_replaces_what_it_does_again(training, tmp_path):
    _, _, log = training()
    for step in (10, 20, 30):
        log(step, 1.0, reward=0.0)
    training(history=[{"step": 10, "reward": 0.0}])
    assert [json.loads(line)["step"] for line in (tmp_path / LOG_FILE).read_text().splitlines()] == [10]


def test_a_loss_without_reward_is_shown(training, capsys):
    _, _, log = training()
    log(50, 5400.0, loss=0.69314, **{"rewards/margins": 0.5})
    text = " ".join(capsys.readouterr().out.split())
    assert text == "step 50/200 25% 4:30:00 left margin +0.500 loss 0.6931"


def test_quiet_and_other_processes_print_nothing(training, capsys, tmp_path):
    _, _, log = training(quiet=True)
    log(50, 1.0, reward=0.0)
    _, state, log = training()
    state.is_world_process_zero = False
    log(60, 1.0, reward=0.0)
    assert capsys.readouterr().out == ""
