"""Tests of the figures of trainings and sweeps: the numbers that are drawn, from logs and records that are known."""

import json

import numpy as np
import pytest

from eval.plots import sweep as sweep_plots
from eval.plots.training import plot_over_optimisation, plot_training_curve
from eval.stats import mean_ci, seeds_mean_ci
from eval.sweep import read_sweep
from eval.training_logs import TrainingLog, comparable_keys, running_mean


@pytest.fixture
def trainer_state(tmp_path):
    history = [{"step": step, "reward": float(step), "loss": 0.0} for step in range(1, 7)]
    history += [{"step": 3, "eval_reward": 9.0}, {"step": 6, "train_runtime": 1.0}]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}))
    return path


def test_training_curve(trainer_state, figures):
    log = TrainingLog(trainer_state, 4.0)
    plot_training_curve({"a": [log, log]}, "curve", smooth=0.5)
    (axis,) = figures[0].axes  # no seconds in this log
    mean, evaluations, *second_seed = (line.get_xydata().tolist() for line in axis.lines)
    assert mean == pytest.approx(np.array([[12, 2], [16, 3], [20, 4], [24, 5]], dtype=float))
    assert evaluations == [[12.0, 9.0]]
    assert second_seed == [mean, evaluations]
    assert axis.get_legend_handles_labels()[1] == ["a", "a, held-out prompts"]


def test_training_curve_against_seconds(tmp_path, figures):
    path = tmp_path / "trainer_state.json"
    history = [{"step": step, "reward": float(step), "train_seconds": 7.0 * step} for step in range(1, 5)]
    path.write_text(json.dumps({"log_history": history}))
    plot_training_curve({"a": [TrainingLog(path, 2.0)]}, "curve", smooth=0.5)
    episodes, seconds = figures[0].axes
    assert episodes.lines[0].get_xydata().tolist() == [[4.0, 1.5], [6.0, 2.5], [8.0, 3.5]]
    assert seconds.lines[0].get_xydata().tolist() == [[14.0, 1.5], [21.0, 2.5], [28.0, 3.5]]
    assert (episodes.get_xscale(), seconds.get_xscale()) == ("log", "linear")


def test_training_curve_of_several_rewards(tmp_path, figures):
    path = tmp_path / "trainer_state.json"
    history = [{"step": step, "rewards/a/mean": 1.0 * step, "rewards/b/mean": 2.0 * step} for step in (1, 2)]
    path.write_text(json.dumps({"log_history": [*history, {"step": 2, "eval_rewards/b/mean": 9.0}]}))
    log = TrainingLog(path, 1.0)
    keys = {"rewards/a/mean": "first", "rewards/b/mean": "second"}
    plot_training_curve({"x": [log]}, "curve", keys=keys)
    above, below = figures[0].axes
    assert [axis.get_ylabel() for axis in (above, below)] == ["first", "second"]
    assert above.lines[0].get_xydata().tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert [line.get_xydata().tolist() for line in below.lines] == [[[1.0, 2.0], [2.0, 4.0]], [[2.0, 9.0]]]


@pytest.mark.parametrize("nothing", [float("nan"), None])
def test_methods_are_compared_by_the_rewards_they_share(tmp_path, figures, nothing):
    """What each weighs, and draws, differently has no axis in common; a batch without such prompts has no mean."""
    logs = {}
    for name, extra in (("x", "c"), ("y", "d")):
        path = tmp_path / f"{name}.json"
        entry = {"reward": 1.0, "rewards/b/mean": 2.0, "rewards/a/mean": 3.0, f"rewards/{extra}/mean": 4.0}
        history = [{"step": 1, **entry}, {"step": 2, **entry, "rewards/a/mean": nothing}]
        path.write_text(json.dumps({"log_history": history}))
        logs[name] = [TrainingLog(path, 1.0)]
    plot_training_curve(logs, "curve")
    above, below = figures[0].axes
    assert [axis.get_ylabel() for axis in (above, below)] == ["mean a", "mean b"]
    assert [line.get_xydata().tolist() for line in above.lines] == [[[1.0, 3.0]]] * 2
    assert comparable_keys({"x": logs["x"]}) == {"reward": "mean reward of the rollouts"}


def test_training_curve_of_evaluations_alone(tmp_path, figures):
    """DPO sees no reward while it trains, but may be evaluated."""
    path = tmp_path / "trainer_state.json"
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_reward": 3.0, "train_seconds": 7.0}]
    path.write_text(json.dumps({"log_history": history}))
    plot_training_curve({"a": [TrainingLog(path, 4.0)]}, "curve")
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figures[0].axes]
    assert lines == [[[[8.0, 3.0]]], [[[7.0, 3.0]]]]


@pytest.mark.fault
def test_training_curve_without_rewards(tmp_path, figures):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": 1, "loss": 0.5}]}))
    with pytest.raises(ValueError, match="logs no 'reward'"):
        plot_training_curve({"a": [TrainingLog(path, 1.0)]}, "curve")


def test_running_mean():
    points = np.array([[1, 1.0], [2, 3.0], [3, 8.0]])
    episodes, mean, half = running_mean(points, 2).T
    assert episodes.tolist() == [2, 3]
    assert mean.tolist() == [2.0, 5.5]
    np.testing.assert_allclose(half, 1.96 * np.array([np.std([1, 3], ddof=1), np.std([3, 8], ddof=1)]) / np.sqrt(2))
    assert running_mean(points, 9)[:, 1].tolist() == [4.0]  # no more entries than there are
    assert np.isnan(running_mean(points, 1)[:, 2]).all()


def test_over_optimisation(tmp_path, figures):
    gold = [0.0, 1.0, 3.0, 2.0, 1.0, 0.0]
    history = [{"step": i + 1, "reward": float(i), "rewards/gold/mean": gold[i]} for i in range(6)]
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": history}))
    plot_over_optimisation({"a": TrainingLog(state, 10.0)}, "gold", "over", smooth=2)
    above, below = figures[0].axes
    assert above.lines[0].get_xydata().tolist() == [[20, 0.5], [30, 1.5], [40, 2.5], [50, 3.5], [60, 4.5]]
    assert below.lines[0].get_ydata().tolist() == [0.5, 2.0, 2.5, 1.5, 0.5]
    assert [axis.lines[1].get_xdata() for axis in (above, below)] == [[40, 40]] * 2  # the highest gold reward
    band = below.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(2.0 + 1.96 * np.std([1, 3], ddof=1) / np.sqrt(2))
    assert (above.get_ylabel(), below.get_ylabel()) == ("training reward", "gold reward: gold")


@pytest.mark.fault
def test_over_optimisation_names_the_rewards_there_are(tmp_path, figures):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"step": 1, "reward": 1.0, "rewards/preference_gold/mean": 0.5}]}))
    with pytest.raises(ValueError, match=r"logs no 'rewards/gold/mean' but \['rewards/preference_gold/mean'\]: train"):
        plot_over_optimisation({"a": TrainingLog(state, 1.0)}, "gold", "over")


@pytest.mark.fault
def test_over_optimisation_needs_the_gold_reward(trainer_state, figures):
    with pytest.raises(ValueError, match=r"logs no 'rewards/gold/mean'"):
        plot_over_optimisation({"a": TrainingLog(trainer_state, 1.0)}, "gold", "over")


@pytest.fixture
def sweep(tmp_path, make_record):
    """Two values, the larger one with two seeds; each run with its records and its log."""
    sft = make_record("sft", [0.0, 1.0, 2.0, 3.0])
    for name, p_t, seed, rewards in (
        ("a", 0.1, 0, [1.0, 2.0, 2.0, 3.0]),
        ("b", 0.1, 1, [3.0, 4.0, 4.0, 5.0]),
        ("c", 0.01, 0, [1.0, 1.0, 1.0, 2.0]),
    ):
        folder = tmp_path / name
        (folder / "records").mkdir(parents=True)
        proxy = make_record("proxy", rewards, sft, variant=f"prefix, p_t={p_t}", seed=seed)
        (folder / "records" / "proxy.json").write_text(json.dumps(proxy))
        (folder / "records" / "sft.json").write_text(json.dumps(sft))
        (folder / "proxy_config.json").write_text(json.dumps({"p_t": p_t}))
        (folder / "train_results.json").write_text(json.dumps({"episodes": 16, "steps": 4}))
        history = [{"step": step, "reward": 10 * p_t * step + seed} for step in (1, 2, 3, 4)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return tmp_path


def test_sweep_cells(sweep):
    cells = read_sweep(sweep, "p_t").cells
    assert [cell.value for cell in cells] == [0.01, 0.1, 0.1]
    assert cells[0].log == (sweep / "c" / "trainer_state.json", 4.0)
    assert [len(cell.records) for cell in cells] == [2, 2, 2]


def test_sweep_scores(sweep, figures):
    sweep_plots.plot_sweep_scores(read_sweep(sweep, "p_t"), "scores")
    (axis,) = figures[0].axes
    (container,) = axis.containers
    assert container.lines[0].get_xydata().tolist() == [[0, 1.25], [1, 3.0]]
    ends = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    expected = [mean_ci([1, 1, 1, 2]), seeds_mean_ci([[1, 2, 2, 3], [3, 4, 4, 5]])]
    np.testing.assert_allclose(ends, expected, atol=1e-9)
    dots = [line.get_ydata().tolist() for line in axis.lines if line.get_color() == "white"]
    assert dots == [[2.0, 4.0]]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_label() == "sft"] == [1.5]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.01", "0.1"]


def test_sweep_curves(sweep, figures):
    sweep_plots.plot_sweep_curves(read_sweep(sweep, "p_t"), "curves", smooth=2)
    first, second = figures[0].axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["p_t = 0.01", "p_t = 0.1"]
    own, others = ([line for line in first.lines if (line.get_color() == "0.75") == grey] for grey in (False, True))
    np.testing.assert_allclose(own[0].get_xydata(), [[8, 0.15], [12, 0.25], [16, 0.35]])
    assert (len(own), len(others), len(first.collections)) == (1, 2, 1)
    own = [line for line in second.lines if line.get_color() != "0.75"]
    np.testing.assert_allclose(own[1].get_xydata(), [[8, 2.5], [12, 3.5], [16, 4.5]])
    assert len({line.get_linestyle() for line in own}) == len(second.collections) == 2  # a seed each


def test_sweep_distributions(sweep, figures):
    sweep_plots.plot_sweep_distributions(read_sweep(sweep, "p_t"), "distributions")
    texts = [[text.get_text() for text in axis.texts] for axis in figures[0].axes]
    assert [row[1] for row in texts] == ["sft", "p_t = 0.01", "p_t = 0.1"]
    assert [row[0].split(" ")[0] for row in texts] == ["1.50", "1.25", "3.00"]


def _write(path, content):
    path.write_text(content)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a" / "train_results.json").unlink(), "train_results.json cannot be read .*let the training"),
        (lambda f: _write(f / "a" / "proxy_config.json", '{"p_t": 0.'), r"proxy_config.json is damaged \(Expecting"),
        (
            lambda f: _write(f / "a" / "proxy_config.json", "[]"),
            r"proxy_config.json is damaged \(must be a dict, got \[\]\)",
        ),
        (lambda f: _write(f / "a" / "proxy_config.json", '{"p_t": "x"}'), "has no number for 'p_t'"),
        (lambda f: (f / "a" / "records" / "proxy.json").unlink(), "must hold one proxy's record"),
        (lambda f: _write(f / "a" / "records" / "sft.json", '{"method": "s'), "sft.json is no whole JSON file"),
    ],
)
def test_a_damaged_sweep_is_refused(sweep, damage, message):
    damage(sweep)
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep, "p_t")


@pytest.mark.fault
def test_a_folder_without_runs_is_no_sweep(tmp_path):
    with pytest.raises(ValueError, match="no trained proxy in a folder of"):
        read_sweep(tmp_path, "p_t")


@pytest.mark.fault
def test_a_sweep_over_other_prompts_is_refused(sweep):
    path = sweep / "b" / "records" / "proxy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts_sha256": "f" * 64}))
    with pytest.raises(ValueError, match="the records differ in prompts_sha256"):
        read_sweep(sweep, "p_t")
