"""The figure of the benchmark."""

import os
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from eval.plots.comparison import style


def plot_benchmark(cells: list[dict], path: str | os.PathLike) -> Path:
    """Speed of every method of scripts/benchmark.py relative to plain sampling in the same round, along each axis of
    the grid: medians, and the range of the rounds. Methods that are not in every cell are left out."""
    axes_titles = {
        "batch_size": "rows in the batch",
        "prompt_tokens": "prompt length, tokens",
        "new_tokens": "new tokens",
        "reject_rate": "share of decisions that reject",
    }
    base = cells[0]
    names = [name for name in base["methods"] if all(name in cell["methods"] for cell in cells)]
    with plt.rc_context(style.RC):
        figure, axes = plt.subplots(1, len(axes_titles), figsize=(12, 3.6), sharey=True, layout="constrained")
        for axis, (key, title) in zip(axes, axes_titles.items(), strict=True):
            line = [cell for cell in cells if all(cell[k] == base[k] for k in axes_titles if k != key)]
            line.sort(key=lambda cell: cell[key])
            x = [cell[key] for cell in line]
            for i, name in enumerate(names):
                found = [cell["methods"][name] for cell in line]
                y = np.array([r["ratio"] for r in found])
                spread = [y - [r["ratio_min"] for r in found], [r["ratio_max"] for r in found] - y]
                look = {
                    "color": style.COLORS[i % len(style.COLORS)],
                    "marker": style.MARKERS[i % len(style.MARKERS)],
                    "markersize": 4,
                }
                axis.errorbar(
                    x, y, spread, label=name, capsize=2, linestyle=style.LINE_STYLES[i % 4], linewidth=1.2, **look
                )
            if key != "reject_rate":
                axis.set_xscale("log", base=2)
                axis.set_xticks(x, [str(value) for value in x])
                axis.minorticks_off()
            axis.set_xlabel(title)
        axes[0].set_ylabel("tokens/s, x generate, sampled")
        axes[0].set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return style.save(figure, path)
