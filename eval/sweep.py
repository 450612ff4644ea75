"""The cells of a sweep, read from their folders."""

import os
from pathlib import Path
from typing import NamedTuple

from eval.comparison import Comparison
from eval.records import read_records
from eval.training_logs import TrainingLog, read_training_file, training_log
from trl_proxy.core.config import CONFIG_NAME
from trl_proxy.trainer.checkpoints import RUN_FILE


class SweepRun(NamedTuple):
    """One run of a sweep: the value that was swept, the records of its comparison, and its training log."""

    value: float
    records: list[dict]
    log: TrainingLog


class Sweep(NamedTuple):
    """What was swept, the runs by value, and all of their records."""

    key: str
    cells: list[SweepRun]
    comparison: Comparison


def read_sweep(folder: str | os.PathLike, key: str) -> Sweep:
    """The runs of a sweep, by value and folder.

    Args:
        folder: every folder in it is the output folder of scripts/train_proxy.py, with the `records` of
            scripts/compare.py in it; folders with the same value are its seeds.
        key: what was swept, as proxy_config.json or run.json names it, e.g. `p_t`.

    Raises:
        ValueError: if there is no run, one is not finished or lacks the key, or the records are not comparable.
    """
    cells = []
    for config in sorted(Path(folder).glob(f"*/{CONFIG_NAME}")):
        run_file = config.with_name(RUN_FILE)
        settings = {**(read_training_file(run_file) if run_file.is_file() else {}), **read_training_file(config)}
        if not isinstance(settings.get(key), int | float):
            raise ValueError(f"{config} has no number for {key!r}: name what was swept, such as p_t or temperature.")
        records = read_records(config.parent)
        if sum(record["method"] == "proxy" for record in records) != 1:
            raise ValueError(
                f"{config.parent / 'records'} must hold one proxy's record: compare every run on its own."
            )
        cells.append(SweepRun(settings[key], records, training_log(config.parent)))
    if not cells:
        raise ValueError(f"no trained proxy in a folder of {folder}: give each run of the sweep its own folder.")
    comparison = Comparison([record for cell in cells for record in cell.records])  # refuses other prompts or LMs
    return Sweep(key, sorted(cells, key=lambda cell: cell.value), comparison)
