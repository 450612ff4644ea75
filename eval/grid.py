"""A grid of settings: trains and evaluates every cell, and says what each setting gives."""

import itertools
import os
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from baselines.training import BASELINES, method_of
from baselines.training import make_parser as make_training_parser
from eval.comparison import Comparison, kind_title, mean_over_seeds
from eval.plots.sweep import draw_sweep
from eval.records import read_records
from eval.report.tables import markdown_table, number, print_table, with_interval
from eval.sweep import read_sweep
from eval.trainings import SCRIPTS, training_command
from trl_proxy.files import write_text
from trl_proxy.runs.arguments import parse_dicts
from trl_proxy.runs.parsing import RecipeParser
from trl_proxy.runs.process import find_file, lock_folder, run_command, wait_until_free


@dataclass
class SweepArguments:
    """What is trained with which settings, and how it is judged."""

    recipe: str = field(metadata={"help": "The training recipe that all cells share."})
    evaluate: str = field(metadata={"help": "A recipe of scripts/compare.py: prompts, reward, length of responses."})
    grid: dict | str | None = field(
        default=None,
        metadata={"help": "Field -> list of values, of any fields of the training recipe; JSON on the command line."},
    )
    method: str = field(default="proxy", metadata={"help": f"What is trained: proxy, {', '.join(BASELINES)}."})
    settings: dict | str | None = field(
        default=None, metadata={"help": "Field -> value, for all cells, over the recipe; JSON on the command line."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Prompts to evaluate on; as `evaluate` says by default."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Training seeds of every combination."})
    jobs: int = field(default=1, metadata={"help": "Cells at a time."})
    devices: list[str] = field(
        default_factory=list, metadata={"help": "Devices, one cell on each at a time, in place of --jobs."}
    )
    launch: str = field(
        default="accelerate launch", metadata={"help": "How to run a training script: a command line."}
    )
    output_dir: str = field(default="outputs/sweep", metadata={"help": "Where the cells' folders and the table go."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        parse_dicts(self, "grid", "settings")
        self.method = method_of(self.method)
        if self.method not in ("proxy", *BASELINES):
            raise ValueError(f"--method must be proxy or one of {', '.join(BASELINES)}, got {self.method}.")
        for name in ("recipe", "evaluate"):
            setattr(self, name, find_file(getattr(self, name)))
            if not Path(getattr(self, name)).is_file():
                raise ValueError(f"--{name} must be a file that exists, got {getattr(self, name)}.")
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"--grid must give a list of values for every field, got {values!r} for {name}.")
        parser = make_training_parser(self.method)
        self.grid = {k: [parser.coerce(k, value, "--grid") for value in values] for k, values in self.grid.items()}
        self.settings = {name: parser.coerce(name, value, "--settings") for name, value in self.settings.items()}
        if not self.grid:
            raise ValueError("--grid is empty: name a field and its values, {p_t: [0.1, 0.01]}.")
        if self.jobs < 1 or not self.seeds:
            raise ValueError(f"--jobs and --seeds must be at least one, got {self.jobs} and {self.seeds}.")


@dataclass(frozen=True)
class GridCell:
    """One combination of the grid with one seed."""

    values: dict
    seed: int
    folder: Path


def cells_of(args: SweepArguments) -> list[GridCell]:
    """Every combination of the grid with every seed, seed by seed: a sweep that is cut short has seen all values."""
    cells = []
    for seed, values in itertools.product(args.seeds, itertools.product(*args.grid.values())):
        named = dict(zip(args.grid, values, strict=True))
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{key}={value}" for key, value in named.items()))
        cells.append(GridCell(named, seed, Path(args.output_dir, f"{name}-seed{seed}")))
    return cells


def commands(args: SweepArguments, cell: GridCell) -> list[list[str]]:
    """The commands that a cell still needs: its training and its evaluation, or the evaluation alone."""
    settings, is_proxy = args.settings | cell.values | {"seed": cell.seed}, args.method == "proxy"
    train = training_command(args.method, args.recipe, settings, cell.folder, args.launch)
    compare = [sys.executable, str(SCRIPTS / "compare.py"), "--config", args.evaluate]
    compare += ["--output_dir", str(cell.folder), "--methods", "sft", *(["proxy"] if is_proxy else [])]
    compare += ["--proxies" if is_proxy else "--baselines", str(cell.folder)]
    compare += ["--split", args.split] if args.split else []
    return [compare] if train is None else [train, compare]


class Runner:
    """Runs the cells' commands until it is told to stop."""

    def __init__(self, args: SweepArguments):
        self.args, self.stopped = args, False
        self.places = queue.SimpleQueue()
        for place in args.devices or [None] * args.jobs:
            self.places.put(place)

    def run(self, cell: GridCell) -> None:
        """
        Trains and evaluates a cell; its output goes to `log.txt` in its folder.

        Raises:
            ValueError: a command failed.
        """
        cell.folder.mkdir(parents=True, exist_ok=True)
        place = self.places.get()
        try:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place is not None else {})
            wait_until_free(cell.folder, self.is_stopped)
            for command in commands(self.args, cell):
                if "compare.py" in command[1]:
                    share_sft_record(self.args, cell)
                with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
                    output = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
                    if run_command(command, self.is_stopped, **output):
                        raise ValueError(f"{cell.folder.name} failed, see {cell.folder / 'log.txt'}")
        finally:
            self.places.put(place)

    def is_stopped(self) -> bool:
        return self.stopped

    def stop(self) -> None:
        """Ends what is running, as Ctrl-C would: its checkpoints stay."""
        self.stopped = True


def share_sft_record(args: SweepArguments, cell: GridCell) -> None:
    """Gives a cell the LM's own record that another cell has written: it is the same for all."""
    for path in sorted(Path(args.output_dir).glob("*/records/sft-seed*.json")):
        if not (target := cell.folder / "records" / path.name).exists():
            write_text(target, path.read_text(encoding="utf-8"))


def table(args: SweepArguments) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, one row per combination, over the seeds that are finished."""
    groups: dict[tuple, list[dict]] = {}
    everything: list[dict] = []
    for cell in cells_of(args):
        if not any((cell.folder / "records").glob(f"{args.method}-*.json")):
            continue
        records = read_records(cell.folder)
        everything += records
        groups.setdefault(tuple(cell.values.values()), []).extend(r for r in records if r["method"] == args.method)
    comparison = Comparison(everything)
    kinds = comparison.kinds
    headers = [*args.grid, "seeds", "Δ vs SFT", *[f"Δ {kind_title(kind)}" for kind in kinds]]
    headers += [*[f"refusals {kind_title(kind)}" for kind in kinds], "LM log-prob", "training, s"]
    rows, nothing = [], (None, None)
    for values, group in groups.items():
        row = [*map(str, values), str(len(group)), with_interval(*(comparison.gain(group) or nothing), "+.2f")]
        row += [with_interval(*(comparison.gain(group, kind) or nothing), "+.2f") for kind in kinds]
        row += [number(mean_over_seeds(group, "by_kind", kind, "refusal_rate"), ".0%") for kind in kinds]
        row.append(number(mean_over_seeds(group, "lm_logprob_per_token"), ".2f"))
        row.append(number(mean_over_seeds(group, "train_seconds"), ".0f"))
        rows.append(row)
    return headers, rows


def sweep(args: SweepArguments) -> list[list[str]]:
    """Runs what is missing, writes and prints the table; returns its rows."""
    lock_folder(args.output_dir)
    cells, failed = cells_of(args), []
    runner = Runner(args)
    pool = ThreadPoolExecutor(len(args.devices) or args.jobs)
    try:
        futures = [pool.submit(runner.run, cell) for cell in cells]
        for future in tqdm(as_completed(futures), total=len(cells), desc="sweep", unit="cell"):
            if isinstance(error := future.exception(), ValueError):
                failed.append(str(error))
            elif error:
                raise error
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        raise
    sentence = f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}. The same command resumes."
    try:
        headers, rows = table(args)
    except ValueError as error:
        if not failed:
            raise
        raise ValueError(sentence) from error  # a table that lacks records follows from it
    print_table(headers, rows, left=0, width=140)
    write_text(Path(args.output_dir, "sweep.md"), markdown_table(headers, rows) + "\n")
    if args.method == "proxy" and len(args.grid) == 1 and not failed:
        key = next(iter(args.grid))
        if all(isinstance(value, int | float) for value in args.grid[key]):
            figures = draw_sweep(read_sweep(args.output_dir, key), args.output_dir)
            print(f"Figures: {', '.join(map(str, figures))}")
    if failed:
        raise ValueError(sentence)
    return rows


def make_parser() -> RecipeParser:
    return RecipeParser((SweepArguments,), description="Train a grid of settings, evaluate every cell, compare them.")
