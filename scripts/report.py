"""Draws the figures of a comparison again and writes it as one HTML page, from its records alone.

    python scripts/report.py outputs/compare
    python scripts/report.py outputs/compare_smollm2_cpu --trained outputs/smollm2_cpu
    python scripts/report.py outputs/compare --sweeps p_t=outputs/sweep-p_t temperature=outputs/sweep-temperature

The page, `<output_dir>/report.html`, needs nothing else: send it, open it, print it. Folders of trained proxies and
baselines add their hyperparameters and training curves; those inside the output folder are found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import argparse
import os
import re

from eval.harness import read_records, write_summaries
from eval.judgements import read_judgements
from eval.page import render_page
from eval.plots import draw_all
from eval.plots_training import (
    TrainingLog,
    draw_sweep,
    plot_over_optimisation,
    plot_training_curve,
    read_json,
    read_sweep,
    training_log,
)
from trl_proxy.config import CONFIG_NAME
from trl_proxy.files import write_text
from trl_proxy.runs import RESULTS_FILE, RUN_FILE, run_script


def make_parser() -> argparse.ArgumentParser:
    """What is reported, and what it was trained by."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output_dir", help="Output folder of scripts/compare.py.")
    parser.add_argument(
        "--trained",
        nargs="+",
        metavar="FOLDER",
        help="Output folders of the training scripts; by default those in the output folder.",
    )
    parser.add_argument(
        "--sweeps",
        nargs="+",
        default=[],
        metavar="KEY=FOLDER",
        help="What was swept, such as p_t, and a folder of trained proxies with their records.",
    )
    parser.add_argument(
        "--gold",
        metavar="NAME",
        help="Reward function that was logged in training with weight 0: draws its reward beside the training reward.",
    )
    parser.add_argument(
        "--summaries",
        metavar="FOLDER",
        help="Writes the records there as well, without prompts, responses and single rewards: numbers to publish.",
    )
    return parser


def read_run(folder: Path) -> dict:
    """Settings of a training: run.json, and the proxy's own configuration where it has one.

    Raises:
        ValueError: if the folder has no run.json, or a damaged one.
    """
    config = folder / CONFIG_NAME
    return {**read_json(folder / RUN_FILE), **(read_json(config) if config.is_file() else {})}


def main(args: argparse.Namespace) -> Path:
    """Reads everything, draws, and writes the page; returns its path."""
    output_dir = Path(args.output_dir)
    records = read_records(output_dir)
    folders = map(Path, args.trained) if args.trained else (p.parent for p in output_dir.glob(f"*/{RUN_FILE}"))
    folders = {os.path.relpath(folder, output_dir): folder for folder in sorted(folders)}
    runs = {name: read_run(folder) for name, folder in folders.items()}
    sweeps = []
    for sweep in args.sweeps:
        key, _, folder = sweep.partition("=")
        if not folder:
            raise ValueError(f"--sweeps must be KEY=FOLDER, such as p_t=outputs/sweep-p_t, got {sweep!r}.")
        sweeps.append((read_sweep(folder, key), key))
    curves = {
        name: training_log(folder)
        for name, folder in folders.items()
        if runs[name].get("method") != "dpo" and (folder / RESULTS_FILE).is_file()
    }  # of finished runs; DPO sees no reward while it trains
    if args.gold and not curves:
        raise ValueError(f"--gold {args.gold} needs a finished training: name its folder with --trained.")

    judgements = read_judgements(records, output_dir) if (output_dir / "judgements").is_dir() else []

    figures = draw_all(records, output_dir)
    if curves:
        seeds: dict[str, list[TrainingLog]] = {}
        for name, log in curves.items():
            seeds.setdefault(re.sub(r"-seed\d+$", "", name), []).append(log)
        figures.append(plot_training_curve(seeds, output_dir / "plots" / "training_curve"))
    if args.gold:
        figures.append(plot_over_optimisation(curves, args.gold, output_dir / "plots" / "over_optimisation"))
    for cells, key in sweeps:
        figures += draw_sweep(cells, key, output_dir)

    if args.summaries:
        write_summaries(output_dir, args.summaries)
    page = output_dir / "report.html"
    write_text(page, render_page(records, figures, runs, judgements))
    print(f"All figures and responses, one page for any browser: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return page


if __name__ == "__main__":
    run_script("report", lambda: main(make_parser().parse_args()))
