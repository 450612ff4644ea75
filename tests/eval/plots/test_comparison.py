"""Tests of `eval.plots`: the numbers that are drawn, and that every figure comes as PNG and SVG."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.container import BarContainer, ErrorbarContainer

from eval.comparison import Comparison
from eval.plots import comparison as plots
from eval.stats import mean_ci, rate_ci, seeds_mean_ci


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


def test_gains_draws_deltas_intervals_and_seeds(records, figures):
    plots.plot_gains(Comparison(records), "gains")
    (axis,) = figures[0].axes
    expected = [
        Comparison(records).gain(group, kind)
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


@pytest.mark.fault
def test_gains_need_sft(records):
    with pytest.raises(ValueError, match="gains need an SFT record"):
        plots.plot_gains(Comparison(records[1:]), "gains")
    with pytest.raises(ValueError, match="gains need an SFT record and another"):
        plots.plot_gains(Comparison(records[:1]), "gains")


def test_distributions_have_a_row_per_method_with_mean_and_interval(records, figures):
    plots.plot_reward_distributions(Comparison(records), "distributions")
    texts = [[text.get_text() for text in axis.texts] for axis in figures[0].axes]
    assert [row[1] for row in texts] == ["sft", "best_of_n (n=2)", "best_of_n (n=4)", "proxy (prefix)"]
    assert texts[0][0].startswith("1.50 [")
    assert texts[3][0].startswith("2.50 [")
    grid, density = figures[0].axes[0].lines[0].get_data()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.2)  # most of the mass lies in the picture
    for axis in figures[0].axes:  # nothing is cut off
        assert all(line.get_ydata().max() <= axis.get_ylim()[1] for line in axis.lines)


def test_distributions_of_constant_rewards(make_record, figures):
    plots.plot_reward_distributions(Comparison([make_record("sft", [1.0] * 4)]), "constant")
    (axis,) = figures[0].axes
    assert axis.texts[0].get_text() == "1.00 [1.00, 1.00]"
    assert not axis.lines  # no density can be estimated


def test_reward_against_logprob(records, figures):
    plots.plot_reward_against_logprob(Comparison(records), "logprob")
    (axis,) = figures[0].axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata()) == 1}
    assert points == {(record["lm_logprob_per_token"], record["reward_mean"]) for record in records}
    (joined,) = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata()) == 2]
    assert joined == [[-2.0, 1.75], [-2.5, 2.25]]
    assert [text.get_text() for text in axis.texts] == ["n=2", "n=4"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft", "best_of_n", "proxy (prefix)"]


def whiskers(axis) -> list[list[float]]:
    """Ends of the error bars, vertical or horizontal, in their order."""
    segments = [
        segment
        for container in axis.containers
        if isinstance(container, ErrorbarContainer)
        for segment in container.lines[2][0].get_segments()
    ]
    return [
        segment[:, 0].tolist() if segment[0, 1] == segment[1, 1] else segment[:, 1].tolist() for segment in segments
    ]


def test_win_rates_show_ties_and_intervals(records, figures):
    plots.plot_win_rates(Comparison(records), "wins")
    (axis,) = figures[0].axes
    bars = [bar for container in axis.containers if isinstance(container, BarContainer) for bar in container.patches]
    shares = np.array([bar.get_width() for bar in bars]).reshape(3, 3)  # method; won, tied, lost
    np.testing.assert_allclose(shares, [[2, 2, 0], [2, 2, 0], [6 / 2, 1 / 2, 1 / 2]] / np.array(4.0))
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.5, 1, 0, 0.5, 1, 0, 0.75, 0.875])
    dots = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert dots == [0.75, 0.75, 0.8125]
    expected = [rate_ci(3, 4), rate_ci(3, 4), Comparison(records).win_rate(records[3:])[1]]
    np.testing.assert_allclose(whiskers(axis), expected, atol=1e-9)
    assert [text.get_text() for text in axis.texts] == ["0.75", "0.75", "0.81"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "best_of_n (n=2)",
        "best_of_n (n=4)",
        "proxy (prefix)",
    ]


@pytest.mark.fault
@pytest.mark.parametrize("plot", [plots.plot_win_rates, plots.plot_cost_against_gain])
def test_what_is_measured_against_sft_needs_it(records, plot):
    with pytest.raises(ValueError, match="need an SFT record and another method's"):
        plot(Comparison(records[1:]), "figure")


def test_cost_against_gain(records, figures):
    costs = {"sft": (1.0, None), "best_of_n": (2.0, None), "proxy": (1.5, 120.0)}
    for record in records:
        record["lm_forwards_per_token"], record["train_seconds"] = costs[record["method"]]
    records[2]["lm_forwards_per_token"] = 4.0
    plots.plot_cost_against_gain(Comparison(records), "cost")
    points = [[c.lines[0].get_xydata()[0].tolist() for c in axis.containers] for axis in figures[0].axes]
    assert points[0] == [[2.0, 0.25], [4.0, 0.75], [1.5, 1.0]]
    assert points[1] == [[0.0, 0.25], [0.0, 0.75], [2.0, 1.0]]  # minutes; best-of-n is not trained
    intervals = [Comparison(records).gain(group)[1] for group in ([records[1]], [records[2]], records[3:])]
    np.testing.assert_allclose(whiskers(figures[0].axes[0]), intervals, atol=1e-9)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["best_of_n", "proxy (prefix)"]


def test_a_cost_that_was_not_measured_is_left_out(records, figures):
    plots.plot_cost_against_gain(Comparison(records), "cost")  # no proxy's record has train_seconds
    assert [len(axis.containers) for axis in figures[0].axes] == [3, 2]


def test_reward_against_threshold(make_record, records, figures):
    sft = records[0]
    others = [
        make_record("proxy", [2.0, 2.0, 3.0, 4.0], sft, variant="prefix, threshold=-1.5", seed=0),
        make_record("proxy", [5.0, 6.0, 6.0, 8.0], sft, variant="prefix", seed=2, settings={"threshold": 2.0}),
        make_record("proxy", [0.0, 0.0, 1.0, 2.0], sft, variant="candidate, threshold=1", seed=0),
    ]
    plots.plot_reward_against_threshold(Comparison([*records, *others]), "threshold")
    (axis,) = figures[0].axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axis.containers}
    assert lines == {
        "proxy (prefix)": [[-1.5, 2.75], [0.0, 2.5], [2.0, 6.25]],
        "proxy (candidate)": [[1.0, 0.75]],
    }
    # the candidate's line, by name, comes first
    middle = seeds_mean_ci([record["rewards"] for record in records[3:]])
    expected = [mean_ci([0, 0, 1, 2]), mean_ci([2, 2, 3, 4]), middle, mean_ci([5, 6, 6, 8])]
    np.testing.assert_allclose(whiskers(axis), expected, atol=1e-9)
    assert [line.get_ydata()[0] for line in axis.lines if line.get_label() == "sft"] == [1.5]


@pytest.mark.fault
def test_one_threshold_is_no_line(records):
    with pytest.raises(ValueError, match="one threshold only"):
        plots.plot_reward_against_threshold(Comparison(records), "threshold")


def test_draw_all_writes_png_and_svg(records, tmp_path):
    paths = plots.draw_all(Comparison(records), tmp_path)
    names = ["reward_distributions", "gains", "win_rates", "cost_against_gain", "reward_against_logprob"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in path.with_suffix(".svg").read_text()
    assert not plt.get_fignums()  # all closed


def test_draw_all_finds_thresholds(records, make_record, tmp_path, figures):
    other = make_record("proxy", [0.0] * 4, records[0], variant="prefix, threshold=1.0")
    assert plots.draw_all(Comparison([*records, other]), tmp_path)[-1].name == "reward_against_threshold"
    # One that was trained at 0 and moved is in that figure alone.
    moved = make_record("proxy", [0.0] * 4, records[0], variant="prefix, threshold=2.0", settings={"threshold": 2.0})
    plots.draw_all(Comparison([*records, other, moved]), tmp_path)
    texts = [
        [text.get_text() for axis in figure.axes for text in axis.texts] for figure in figures[len(figures) // 2 :]
    ]
    assert any("threshold=1.0" in text for text in texts[0])
    assert not any("threshold=2.0" in text for text in texts[0])


def test_draw_all_of_sft_alone(records, tmp_path, figures):
    assert [path.name for path in plots.draw_all(Comparison(records[:1]), tmp_path)] == [
        "reward_distributions",
        "reward_against_logprob",
    ]
