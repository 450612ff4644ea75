"""Trains a grid of settings, evaluates every cell, and says what each setting gives.

    python scripts/sweep.py --config scripts/recipes/sweep_p_t.yaml

`grid` lists values of any fields of the training recipe; every combination is trained with every seed, in a folder of
its own (`<output_dir>/p_t=0.1-seed0`), and compared there with the LM itself as `evaluate` says. Several cells run at
once with `--jobs 2`, or one on each of `--devices 0 1 2 3` (CUDA_VISIBLE_DEVICES). A cell that is finished is not done
again and one that was interrupted goes on, so the same command after a kill loses and repeats nothing. The table at
the end, `<output_dir>/sweep.md` and, of one field of a proxy, the figures in `<output_dir>/plots` are drawn from the
cells' records alone.

The learning rate of a baseline, on the validation prompts:

    python scripts/sweep.py --config scripts/recipes/sweep_lr_rlhf.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import itertools
import os
import queue
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import yaml
from tqdm import tqdm
from trl import TrlParser

from baselines.training import BASELINES
from eval.harness import read_records
from eval.plots_training import draw_sweep, read_sweep
from eval.report import (
    all_kinds,
    delta_over_seeds,
    find_sft,
    kind_title,
    markdown_table,
    mean_over_seeds,
    print_table,
    with_interval,
)
from trl_proxy.files import write_text
from trl_proxy.runs import (
    find_file,
    flags,
    hold,
    is_finished,
    launcher,
    parse_dicts,
    run_command,
    run_script,
    wait_until_free,
)

HERE = Path(__file__).parent


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
        if self.method not in ("proxy", *BASELINES):
            raise ValueError(f"--method must be proxy or one of {', '.join(BASELINES)}, got {self.method}.")
        for name in ("recipe", "evaluate"):
            self.__dict__[name] = find_file(self.__dict__[name])
            if not Path(self.__dict__[name]).is_file():
                raise ValueError(f"--{name} must be a file that exists, got {self.__dict__[name]}.")
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"--grid must give a list of values for every field, got {values!r} for {name}.")
        if not self.grid:
            raise ValueError("--grid is empty: name a field and its values, {p_t: [0.1, 0.01]}.")
        if self.jobs < 1 or not self.seeds:
            raise ValueError(f"--jobs and --seeds must be at least one, got {self.jobs} and {self.seeds}.")


@dataclass(frozen=True)
class Cell:
    """One combination of the grid with one seed."""

    values: dict
    seed: int
    folder: Path


def cells_of(args: SweepArguments) -> list[Cell]:
    """Every combination of the grid with every seed, seed by seed: a sweep that is cut short has seen all values."""
    cells = []
    for seed, values in itertools.product(args.seeds, itertools.product(*args.grid.values())):
        named = dict(zip(args.grid, values, strict=True))
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{key}={value}" for key, value in named.items()))
        cells.append(Cell(named, seed, Path(args.output_dir, f"{name}-seed{seed}")))
    return cells


def commands(args: SweepArguments, cell: Cell) -> list[list[str]]:
    """What is still to be run for a cell: its training and its evaluation, or the second alone."""
    settings = args.settings | cell.values | {"seed": cell.seed}
    is_proxy = args.method == "proxy"
    script = [str(HERE / "train_proxy.py")] if is_proxy else [str(HERE / "train_baseline.py"), "--method", args.method]
    train = [*launcher(args.launch), *script, "--config", args.recipe, *flags(settings)]
    compare = [sys.executable, str(HERE / "compare.py"), "--config", args.evaluate, "--output_dir", str(cell.folder)]
    compare += ["--methods", "sft", *(["proxy"] if is_proxy else []), "--proxies" if is_proxy else "--baselines"]
    compare += [str(cell.folder), *(["--split", args.split] if args.split else [])]
    recipe = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))
    trained = is_finished(cell.folder, recipe | settings)
    return [*([] if trained else [[*train, "--output_dir", str(cell.folder)]]), compare]


class Runner:
    """Runs the cells' commands, and ends those that run when it is told to."""

    def __init__(self, args: SweepArguments):
        self.args, self.stopped = args, False
        self.places = queue.SimpleQueue()
        for place in args.devices or [None] * args.jobs:
            self.places.put(place)

    def run(self, cell: Cell) -> None:
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
        """Ends what runs, as Ctrl-C would: its checkpoints stay."""
        self.stopped = True


def share_sft_record(args: SweepArguments, cell: Cell) -> None:
    """Gives a cell the LM's own record that another cell has written: it is the same for all."""
    for path in sorted(Path(args.output_dir).glob("*/records/sft-seed*.json")):
        if not (target := cell.folder / "records" / path.name).exists():
            write_text(target, path.read_text(encoding="utf-8"))


def table(args: SweepArguments) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, one row per combination, over the seeds that are finished."""
    groups: dict[tuple, list[dict]] = {}
    sft = None
    for cell in cells_of(args):
        if not any((cell.folder / "records").glob(f"{args.method}-*.json")):
            continue
        records = read_records(cell.folder)
        sft = sft or find_sft(records)
        groups.setdefault(tuple(cell.values.values()), []).extend(r for r in records if r["method"] == args.method)
    kinds = all_kinds([record for group in groups.values() for record in group])
    headers = [*args.grid, "seeds", "Δ vs SFT", *[f"Δ {kind_title(kind)}" for kind in kinds]]
    headers += [*[f"refusals {kind_title(kind)}" for kind in kinds], "LM log-prob", "training, s"]
    rows = []
    for values, group in groups.items():
        row = [*map(str, values), str(len(group)), with_interval(*delta_over_seeds(group, sft), "+.2f")]
        row += [with_interval(*delta_over_seeds(group, sft, kind), "+.2f") for kind in kinds]
        row += [f"{mean_over_seeds(group, 'by_kind', kind, 'refusal_rate'):.0%}" for kind in kinds]
        row.append(f"{mean_over_seeds(group, 'lm_logprob_per_token'):.2f}")
        seconds = mean_over_seeds(group, "train_seconds")
        row.append("n/a" if seconds is None else f"{seconds:.0f}")
        rows.append(row)
    return headers, rows


def main(args: SweepArguments) -> list[list[str]]:
    """Runs what is missing, writes and prints the table; its rows."""
    hold(args.output_dir)
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
    headers, rows = table(args)
    print_table(headers, rows, left=0, width=140)
    write_text(Path(args.output_dir, "sweep.md"), markdown_table(headers, rows) + "\n")
    if args.method == "proxy" and len(args.grid) == 1 and not failed:
        key = next(iter(args.grid))
        if all(isinstance(value, int | float) for value in args.grid[key]):
            figures = draw_sweep(read_sweep(args.output_dir, key), key, args.output_dir)
            print(f"Figures: {', '.join(map(str, figures))}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}. The same command goes on.")
    return rows


if __name__ == "__main__":
    parser = TrlParser((SweepArguments,), description=__doc__.partition("\n")[0])
    run_script("sweep", lambda: main(*parser.parse_args_and_config()), goes_on=True)
