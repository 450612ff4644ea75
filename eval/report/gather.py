"""Gathers records, judgements, trainings and sweeps, draws the figures, and writes the page of a report."""

import argparse
import os
import re
from pathlib import Path

from eval.comparison import Comparison
from eval.judges.judgements import read_judgements
from eval.judges.readers.results import read_results
from eval.plots.comparison import draw_all
from eval.plots.sweep import draw_sweep
from eval.plots.training import plot_over_optimisation, plot_training_curve
from eval.published import write_reader_lines, write_summaries
from eval.published_tables import print_tables
from eval.report.page import render_page
from eval.sweep import read_sweep
from eval.training_logs import TrainingLog, read_training_file, training_log
from trl_proxy.core.config import CONFIG_NAME
from trl_proxy.files import write_text
from trl_proxy.runs.resume import ASKED, CONTENTS, FORMAT, RESULTS_FILE, VERSIONS, is_checkpoint
from trl_proxy.trainer.checkpoints import RUN_FILE


def make_parser() -> argparse.ArgumentParser:
    """The parser of scripts/report.py."""
    parser = argparse.ArgumentParser(
        description="Draw the figures of a comparison again and write it as one HTML page."
    )
    parser.add_argument("output_dir", nargs="?", help="Output folder of scripts/compare.py.")
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
        help="Reward function that was logged in training with weight 0: draws it below the training reward.",
    )
    parser.add_argument(
        "--publish",
        nargs=2,
        metavar=("COLLECTION", "MACHINE"),
        help="Also writes the records to docs/results/records.jsonl, without the values of single prompts.",
    )
    parser.add_argument(
        "--tables",
        nargs="*",
        metavar="PAGE",
        help="Prints the documentation's tables from docs/results/records.jsonl, or writes them into these pages.",
    )
    return parser


def read_run(folder: Path) -> dict:
    """Settings of a training: run.json, and the proxy's own configuration if there is one.

    Raises:
        ValueError: if the folder has no run.json, or a damaged one.
    """
    config = folder / CONFIG_NAME
    run = read_training_file(folder / RUN_FILE)
    run = {name: value for name, value in run.items() if name not in (ASKED, CONTENTS, FORMAT, VERSIONS)}
    return {**run, **(read_training_file(config) if config.is_file() else {})}


def report(args: argparse.Namespace) -> Path | None:
    """Reads everything, draws, and writes the page; returns its path."""
    if args.tables is not None:
        print_tables(args.tables)
        return None
    if args.output_dir is None:
        raise ValueError("name the output folder of scripts/compare.py, or --tables.")
    output_dir = Path(args.output_dir)
    comparison = Comparison.read(output_dir)
    # If the output folder is a training's, it has checkpoints, which are not trainings.
    below = (path.parent for path in output_dir.glob(f"*/{RUN_FILE}") if not is_checkpoint(path.parent))
    folders = map(Path, args.trained) if args.trained else below
    folders = {os.path.relpath(folder, output_dir): folder for folder in sorted(folders)}
    runs = {name: read_run(folder) for name, folder in folders.items()}
    sweeps = []
    for named in args.sweeps:
        key, _, folder = named.partition("=")
        if not folder:
            raise ValueError(f"--sweeps must be KEY=FOLDER, such as p_t=outputs/sweep-p_t, got {named!r}.")
        sweeps.append(read_sweep(folder, key))
    curves = {
        name: training_log(folder)
        for name, folder in folders.items()
        if runs[name].get("method") != "dpo" and (folder / RESULTS_FILE).is_file()
    }  # of finished runs; DPO sees no reward while it trains
    if args.gold and not curves:
        raise ValueError(f"--gold {args.gold} needs a finished training: name its folder with --trained.")

    judgements = read_judgements(comparison, output_dir) if (output_dir / "judgements").is_dir() else []
    readers = read_results(comparison, output_dir)

    figures = draw_all(comparison, output_dir)
    if curves:
        seeds: dict[str, list[TrainingLog]] = {}
        for name, log in curves.items():
            seeds.setdefault(re.sub(r"-seed\d+$", "", name), []).append(log)
        figures.append(plot_training_curve(seeds, output_dir / "plots" / "training_curve"))
    if args.gold:
        figures.append(plot_over_optimisation(curves, args.gold, output_dir / "plots" / "over_optimisation"))
    for sweep in sweeps:
        figures += draw_sweep(sweep, output_dir)

    if args.publish:
        write_summaries(comparison, *args.publish)
        if readers:
            write_reader_lines(readers)
    page = output_dir / "report.html"
    write_text(page, render_page(comparison, figures, runs, judgements, readers))
    print(f"All figures and responses, one page for any browser: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return page
