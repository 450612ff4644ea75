"""Tests of `eval.plots`: the numbers that are drawn, and that every figure comes as PNG and SVG."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.container import BarContainer, ErrorbarContainer

from eval import plots
from eval.report import delta_over_seeds


@pytest.fixture
def records(make_record):
    sft = make_record("sft", [0.0, 1.0, 2.0, 3.0], lm_logprob_per_token=-0.5)
    return [
        sft,
        make_record("best_of_n", [0.5, 1.0, 2.0, 3.5], sft, variant="n=2", lm_logprob_per_token=-2.0),
        make_record("best_of_n", [1.0, 1.0, 2.0, 5.0], sft, variant="n=4", lm_logprob_per_token=-2.5),
        make_record("proxy", [1.0, 2.0, 2.0, 2.0], sft, variant="prefix", seed=0),
        make_record("proxy", [2.0, 3.0, 4.0, 4.0], sft, variant="prefix", seed=1),
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures instead of their files: drawing them to pixels is slow and tells a test nothing."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure) or Path(path))
    yield saved
    plt.close("all")


def test_gains_draws_deltas_intervals_and_seeds(records, figures):
    plots.plot_gains(records, "gains")
    (axis,) = figures[0].axes
    sft = records[0]
    expected = [
        delta_over_seeds(group, sft, kind)
        for group in ([records[1]], [records[2]], records[3:])
        for kind in (None, "everyday", "harm_adjacent")
    ]
    bars = [bar for container in axis.containers if isinstance(container, BarContainer) for bar in container.patches]
    assert [bar.get_height() for bar in bars] == pytest.approx([mean for mean, _ in expected])
    whiskers = [c.lines[2][0].get_segments()[0][:, 1] for c in axis.containers if isinstance(c, ErrorbarContainer)]
    np.testing.assert_allclose(whiskers, [interval for _, interval in expected], atol=1e-9)
    dots = [line.get_ydata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [[0.25, 1.75], [1.0, 2.0], [-0.5, 1.5]]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["all prompts", "everyday", "harm-adjacent"]
    assert len({bar.get_hatch() for bar in bars}) == 3  # told apart without colour


def test_gains_need_sft(records):
    with pytest.raises(ValueError, match="gains need an SFT record"):
        plots.plot_gains(records[1:], "gains")
    with pytest.raises(ValueError, match="gains need an SFT record and another"):
        plots.plot_gains(records[:1], "gains")


def test_distributions_have_a_row_per_method_with_mean_and_interval(records, figures):
    plots.plot_reward_distributions(records, "distributions")
    texts = [[text.get_text() for text in axis.texts] for axis in figures[0].axes]
    assert [row[1] for row in texts] == ["sft", "best_of_n (n=2)", "best_of_n (n=4)", "proxy (prefix)"]
    assert texts[0][0].startswith("1.50 [")
    assert texts[3][0].startswith("2.50 [")
    grid, density = figures[0].axes[0].lines[0].get_data()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.2)  # most of the mass lies in the picture
    for axis in figures[0].axes:  # nothing is cut off
        assert all(line.get_ydata().max() <= axis.get_ylim()[1] for line in axis.lines)


def test_distributions_of_constant_rewards(make_record, figures):
    plots.plot_reward_distributions([make_record("sft", [1.0] * 4)], "constant")
    (axis,) = figures[0].axes
    assert axis.texts[0].get_text() == "1.00 [1.00, 1.00]"
    assert not axis.lines  # no density can be estimated


def test_reward_against_logprob(records, figures):
    plots.plot_reward_against_logprob(records, "logprob")
    (axis,) = figures[0].axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata()) == 1}
    assert points == {(record["lm_logprob_per_token"], record["reward_mean"]) for record in records}
    (joined,) = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata()) == 2]
    assert joined == [[-2.0, 1.75], [-2.5, 2.25]]
    assert [text.get_text() for text in axis.texts] == ["n=2", "n=4"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft", "best_of_n", "proxy (prefix)"]


@pytest.fixture
def trainer_state(tmp_path):
    history = [{"step": step, "reward": float(step), "loss": 0.0} for step in range(1, 7)]
    history += [{"step": 3, "eval_reward": 9.0}, {"step": 6, "train_runtime": 1.0}]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}))
    return path


def test_training_curve(trainer_state, figures):
    plots.plot_training_curve({"a": (trainer_state, 4.0)}, "curve", smooth=3)
    raw, mean, evaluations = (line.get_xydata().tolist() for line in figures[0].axes[0].lines)
    assert raw == [[4.0 * step, step] for step in range(1, 7)]
    assert mean == pytest.approx(np.array([[12, 2], [16, 3], [20, 4], [24, 5]], dtype=float))
    assert evaluations == [[12.0, 9.0]]


def test_training_curve_without_rewards(tmp_path, figures):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": 1, "loss": 0.5}]}))
    with pytest.raises(ValueError, match="logs no 'reward'"):
        plots.plot_training_curve({"a": (path, 1.0)}, "curve")


def test_draw_all_writes_png_and_svg(records, tmp_path):
    paths = plots.draw_all(records, tmp_path)
    assert [path.name for path in paths] == ["reward_distributions.png", "gains.png", "reward_against_logprob.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in path.with_suffix(".svg").read_text()
    assert not plt.get_fignums()  # all closed


def test_draw_all_of_sft_alone(records, tmp_path, figures):
    assert [path.name for path in plots.draw_all(records[:1], tmp_path)] == [
        "reward_distributions",
        "reward_against_logprob",
    ]
