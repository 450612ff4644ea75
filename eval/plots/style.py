"""What the figures share: colours, line styles, densities and means with intervals, and how a figure is written.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Rows, hatches, markers and line styles tell the
methods apart in grey too. Every figure is written as PNG and SVG.
"""

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from scipy.stats import gaussian_kde

from eval.comparison import Comparison
from eval.stats import seeds_mean_ci
from trl_proxy.files import writing

matplotlib.use("Agg")  # files only, no display
# Okabe & Ito 2008, 'Color Universal Design'; without yellow, which is too light for a line on white
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RC = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "trl-proxy",  # equal records give equal files
}


def save(figure, path: str | os.PathLike) -> Path:
    """Writes `path` as PNG and its twin as SVG; returns the PNG's path."""
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        figure.savefig(path)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path


def title(comparison: Comparison) -> str:
    """What the rewards are, and over how many prompts."""
    record = comparison.records[0]
    return f"reward: {record['reward_model']}; {record['n_prompts']} prompts"


def styles_by_method(groups: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    """Colour, marker and hatch of every method, the same in all figures; best-of-n has one colour for all n."""
    families = {name: "best_of_n" if group[0]["method"] == "best_of_n" else name for name, group in groups.items()}
    order = list(dict.fromkeys(families.values()))
    return {
        name: {
            "color": COLORS[order.index(families[name]) % len(COLORS)],
            "marker": MARKERS[order.index(families[name]) % len(MARKERS)],
            "hatch": HATCHES[i % len(HATCHES)],
        }
        for i, name in enumerate(groups)
    }


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Gaussian kernel density on the grid; None if the values have no spread to estimate it from."""
    return gaussian_kde(values.ravel())(grid) if values.size > 1 and np.ptp(values) > 0 else None


def draw_distributions(
    rewards: dict[str, np.ndarray],
    colors: dict[str, str],
    path: str | os.PathLike,
    *,
    title: str,
    dashed: str | None = None,
) -> Path:
    """A row per name: density of its rewards, their mean and its 95 % interval.

    Args:
        rewards: name -> one reward per seed and prompt, shape (seeds, n).
        colors: name -> colour.
        title: above the figure.
        dashed: name of the row whose density the others show as a dashed line.
    """
    everything = np.concatenate([values.ravel() for values in rewards.values()])
    margin = 0.25 * np.ptp(everything) or 1.0
    grid = np.linspace(everything.min() - margin, everything.max() + margin, 400)
    densities = {name: _density(values, grid) for name, values in rewards.items()}
    peak = max((density.max() for density in densities.values() if density is not None), default=1.0)
    with plt.rc_context(RC):
        size = (7, 1.0 + 0.85 * len(rewards))
        figure, axes = plt.subplots(len(rewards), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
        for axis, (name, values) in zip(axes[:, 0], rewards.items(), strict=True):
            color, density = colors[name], densities[name]
            mean, interval = values.mean(), seeds_mean_ci(values)
            if density is not None:
                axis.fill_between(grid, density, color=color, alpha=0.25, linewidth=0)
                axis.plot(grid, density, color=color, linewidth=1.5)
            if dashed not in (None, name) and densities[dashed] is not None:
                axis.plot(grid, densities[dashed], color="black", linestyle="--", linewidth=0.9)
            axis.vlines(mean, 0, peak, color=color, linewidth=1.2)
            if interval is not None:
                axis.fill_betweenx([0, peak], *interval, color=color, alpha=0.35, linewidth=0)
            text = f"{mean:.2f}" if interval is None else f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
            axis.text(1, 0.98, text, transform=axis.transAxes, ha="right", va="top")
            axis.text(0, 0.98, name, transform=axis.transAxes, ha="left", va="top", weight="bold")
            axis.set_yticks([])
            axis.set_ylim(0, 1.4 * peak)  # room for the text
            axis.spines["left"].set_visible(False)
        note = "reward over the prompts; line and band: mean and its 95 % interval"
        axes[-1, 0].set_xlabel(note if dashed is None else f"{note}; dashed: {dashed}")
        figure.suptitle(title, size=9)
        return save(figure, path)


def draw_means(axis, x: list[float], rewards: list[np.ndarray], **look) -> None:
    """A line through the mean rewards at `x` with their 95 % intervals.

    Args:
        axis: matplotlib axes.
        x: one position per entry of `rewards`.
        rewards: one reward per seed and prompt, each of shape (seeds, n).
        look: passed on to `errorbar`.
    """
    means = [float(values.mean()) for values in rewards]
    # No interval, no whisker: NaN draws nothing.
    bounds = np.array([seeds_mean_ci(values) or [np.nan, np.nan] for values in rewards])
    error = [means - bounds[:, 0], bounds[:, 1] - means]
    axis.errorbar(x, means, yerr=error, capsize=3, linewidth=1.4, markersize=7, **look)
