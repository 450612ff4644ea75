"""Which run a folder holds, and the checkpoint from which it resumes."""

import dataclasses
import json
import os
import re

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..files import damaged_files
from .arguments import (
    RunArguments,
)

RUN_FILE = "run.json"
RESULTS_FILE = "train_results.json"
ASKED = "asked"  # in run.json: what the command set, before any default
DECODING = "decoding"  # in run.json: the decoding settings in full, which follow from the LM and the arguments
# Settings that may differ between a run and the command that resumes it, or that must not be written to a file.
_NOT_IDENTITY = {
    "resume_from_checkpoint",
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "disable_tqdm",
    "log_level",
    "report_to",
    "reward_timeout",
    "hub_token",
    "verbose",
}


def identity(*configs) -> dict:
    """The settings that identify a run, as JSON-ready values."""
    values = {k: v for config in configs for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    if values.get(ASKED) is not None:
        values[ASKED] = {k: v for k, v in values[ASKED].items() if k not in _NOT_IDENTITY}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def checkpoint_to_resume(run_args: RunArguments, training_args, run: dict) -> str | None:
    """The requested checkpoint, or the last one of this run in its output folder. `ValueError` if the folder holds
    another run's, or the checkpoint is damaged."""
    if training_args.resume_from_checkpoint:
        check_checkpoint(training_args.resume_from_checkpoint)
        return training_args.resume_from_checkpoint
    output_dir = training_args.output_dir
    path = os.path.join(output_dir, RUN_FILE)
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is None or run_args.overwrite_output_dir:
        return None
    if not os.path.isfile(path):
        raise ValueError(f"{output_dir} holds a checkpoint of something else: choose another --output_dir.")
    before = read_json(path)
    # What was asked for may be written in another way.
    if changed := sorted(set(changed_keys(before, run)) - {ASKED, DECODING}):
        raise ValueError(
            f"{output_dir} holds the checkpoint of another run (different: {', '.join(changed)}): choose another "
            "--output_dir, or start anew with --overwrite_output_dir."
        )
    check_checkpoint(last)
    return last


def changed_keys(before: dict, now: dict) -> list[str]:
    """Keys of two sets of settings whose values differ, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file that a training script wrote; `ValueError` if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: take it from a copy, or train anew in another --output_dir.")
    return values


def _damaged(checkpoint: str) -> list[str]:
    """Names of the damaged files of a checkpoint."""
    if damaged := damaged_files(checkpoint):
        return damaged
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    except (OSError, TypeError, ValueError):
        return [TRAINER_STATE_NAME]
    return []


def check_checkpoint(checkpoint: str) -> None:
    """`ValueError` if one of its files is damaged; it names the newest whole checkpoint before it."""
    if not os.path.isdir(checkpoint):
        raise ValueError(f"--resume_from_checkpoint must be a checkpoint folder, got {checkpoint}.")
    if not (damaged := _damaged(checkpoint)):
        return
    step = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folder, name = os.path.split(os.path.normpath(checkpoint))
    number = int(match[1]) if (match := step.fullmatch(name)) else 0
    older = sorted((int(m[1]) for other in os.listdir(folder or ".") if (m := step.fullmatch(other))), reverse=True)
    paths = (os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{k}") for k in older if k < number)
    whole = next((path for path in paths if not _damaged(path)), None)
    raise ValueError(
        f"The checkpoint {checkpoint} is damaged ({', '.join(damaged)}): "
        + (
            f"resume from the one before it with --resume_from_checkpoint {whole}."
            if whole
            else "there is no whole one before it, start anew with --overwrite_output_dir true."
        )
    )


def is_finished(folder: str | os.PathLike, asked: dict, defaults: dict) -> bool:
    """Whether the folder holds a finished run of a command.

    Args:
        asked: what the command sets, as `RecipeParser.asked` tells it.
        defaults: of everything else, from the same parser.
    """
    run_file = os.path.join(folder, RUN_FILE)
    if not os.path.isfile(run_file) or not os.path.isfile(os.path.join(folder, RESULTS_FILE)):
        return False
    before = read_json(run_file).get(ASKED)
    return before is not None and _NOT_IDENTITY.issuperset(changed_keys(defaults | before, defaults | asked))
