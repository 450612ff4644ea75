"""Which run a folder holds, from which checkpoint it resumes, and what a new run in its place removes."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.config import CONFIG_NAME
from ..core.values import type_flaw
from ..devices import is_main_process
from ..files import damaged_files
from ..trainer.checkpoints import PARTIAL_DIR, REWARD_FAILED, RUN_FILE, UPLOAD_DIR
from ..trainer.ppo import VALUE_HEAD_NAME
from .arguments import RunArguments
from .contents import contents_of, named
from .process import installed_version
from .progress import LOG_FILE

RESULTS_FILE = "train_results.json"
PAIRS_FILE = "pairs.json"
# Keys of run.json besides the settings
ASKED = "asked"  # what the command set, before any default
DECODING = "decoding"  # the decoding settings in full, which follow from the LM and the arguments
CONTENTS = "contents"  # what the names among the settings stand for
VERSIONS = "versions"  # of the packages that trained
FORMAT = "format"  # of checkpoints
_FORMAT = 1  # raise it when a run cannot resume from checkpoints that were written before
_NOT_COMPARED = {ASKED, DECODING, CONTENTS, VERSIONS, FORMAT, REWARD_FAILED}
_PACKAGES = ("trl-proxy", "trl", "transformers", "torch", "peft")
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
# What a checkpoint holds: a run that continues from it cannot have others.
_HELD = re.compile(
    r"(the content of )?model_name_or_path|num_processes|use_peft|lora_.*|features|feature_layers|pooled_features|"
    r"gate_hidden_sizes|learning_rate|weight_decay|optim(_.*)?|adam_.*|lr_scheduler_.*"
)
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_MODEL_FILES = (
    CONFIG_NAME,
    VALUE_HEAD_NAME,
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
    "*model*.safetensors",
    "*.safetensors.index.json",
    "README.md",
)
_RECORD_FILES = (RESULTS_FILE, TRAINER_STATE_NAME, LOG_FILE, "training_args.bin")


class _RunFile(TypedDict, total=False):
    """What is read of a run.json; the further settings are compared alone."""

    method: str
    seed: int
    num_processes: int
    use_peft: bool
    lora_r: int
    proxy_name_or_path: str | None
    generation_kwargs: dict | None
    chat_template_kwargs: dict | None
    repetition_penalty: float | None
    cache_implementation: str | None
    max_completion_length: int | None
    system_prompt: str | None
    asked: dict | None
    contents: dict[str, list[str]]
    versions: dict[str, str | None]


class _ResultsFile(TypedDict):
    episodes: float
    steps: int
    train_seconds: NotRequired[float | None]
    train_peak_memory_mb: NotRequired[float | None]


class _LogEntry(TypedDict):
    step: int
    train_seconds: NotRequired[float | None]


class _StateFile(TypedDict):
    log_history: list[_LogEntry]


_FILES: dict[str, Any] = {RUN_FILE: _RunFile, RESULTS_FILE: _ResultsFile, TRAINER_STATE_NAME: _StateFile}


def identity(*configs) -> dict:
    """The settings that identify a run, as JSON-ready values."""
    values = {k: v for config in configs for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    if values.get(ASKED) is not None:
        values[ASKED] = {k: v for k, v in values[ASKED].items() if k not in _NOT_IDENTITY}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def identify(method: str, num_processes: int, *configs) -> dict:
    """What run.json holds: the settings, what their names stand for, and who trains."""
    settings = identity(*configs)
    return {
        "method": method,
        "num_processes": num_processes,
        **settings,
        CONTENTS: contents_of(settings),
        VERSIONS: {name: installed_version(name) for name in _PACKAGES},
        FORMAT: _FORMAT,
    }


def differences(before: dict, now: dict) -> list[str]:
    """What distinguishes two runs: names of settings, and `the content of <setting>` if the same name stands for
    something else. Another name for the same content is no difference."""
    changed = set(changed_keys(before, now)) - _NOT_COMPARED
    was, found = before.get(CONTENTS, {}), now.get(CONTENTS, {})
    other = {key for key in was.keys() & found.keys() if was[key] != found[key]}
    if before.get(REWARD_FAILED):  # it was to be fixed
        other = {key for key in other if not key.startswith("reward_")}
    same = {key for key in was.keys() & found.keys() if was[key] == found[key]}
    return sorted(changed - same) + [f"the content of {key}" for key in sorted(other - changed)]


def read_run(folder: str | os.PathLike) -> dict | None:
    """The run.json of an output folder or a checkpoint; None if there is none. `ValueError` if it is damaged."""
    path = os.path.join(folder, RUN_FILE)
    return read_json(path) if os.path.isfile(path) else None


def _checkpoints(folder: str | os.PathLike) -> list[str]:
    """Paths of the checkpoints in an output folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted(int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)))
    return [os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}") for step in steps]


def _step(checkpoint: str) -> int:
    found = _CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(checkpoint)))
    return int(found[1]) if found else 0


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(folder))) is not None


def has_model(folder: str | os.PathLike) -> bool:
    """Whether there are the weights of a trained model in a folder."""
    return os.path.isdir(folder) and any(fnmatch(name, "*model*.safetensors") for name in os.listdir(folder))


def checkpoint_to_resume(run_args: RunArguments, training_args, run: dict) -> str | None:
    """Where this run resumes: the requested checkpoint; or its last one in the output folder; or the folder itself if
    the run is finished and the checkpoint of its end is gone. None if it starts anew.

    Raises:
        ValueError: the folder holds something else, or the checkpoint is damaged.
    """
    output_dir = training_args.output_dir
    if training_args.resume_from_checkpoint:
        _check_requested(training_args.resume_from_checkpoint, output_dir, run_args.overwrite_output_dir, run)
        return training_args.resume_from_checkpoint
    last = next(reversed(_checkpoints(output_dir)), None)
    if run_args.overwrite_output_dir:
        _check_named_elsewhere(output_dir, run)
        return None
    before = read_run(output_dir)
    if before is None:
        if last is not None or has_model(output_dir):
            what = "a checkpoint" if last else "a model"
            raise ValueError(f"{output_dir} holds {what} of something else: choose another --output_dir.")
        return None
    done = os.path.isfile(os.path.join(output_dir, RESULTS_FILE)) and has_model(output_dir)
    if last is None and not done:
        _check_named_elsewhere(output_dir, run)
        return None
    if last is not None and (owner := _owner(last)) is not None:
        before = owner
    elif last is not None:
        check_checkpoint(last)
        raise ValueError(
            f"{last} does not tell of which run it is: name it by --resume_from_checkpoint, choose another "
            "--output_dir, or start anew with --overwrite_output_dir."
        )
    if changed := differences(before, run):
        what = "the checkpoint of " if last else ""
        continuing = f", continue from it with --resume_from_checkpoint {last}" if last else ""
        raise ValueError(
            f"{output_dir} holds {what}another run (different: {', '.join(changed)}): choose another "
            f"--output_dir{continuing}, or start anew with --overwrite_output_dir."
        )
    if last is not None:
        check_checkpoint(last)
    _check_format(before, last or output_dir)
    # `save_total_limit` of 1 keeps the best checkpoint alone.
    best_alone = getattr(training_args, "load_best_model_at_end", False) and training_args.save_total_limit == 1
    return output_dir if last is None or (done and best_alone) else last


def _owner(checkpoint: str) -> dict | None:
    """The run that wrote a checkpoint; None if it is damaged or does not say so."""
    try:
        return read_run(checkpoint)
    except ValueError:
        return None


def _check_requested(checkpoint: str, output_dir: str, overwrite: bool, run: dict) -> None:
    """A checkpoint that was asked for may be of a run with other settings, such as more steps: a sentence names them.
    `ValueError` if it holds something that they contradict, if it is damaged, or if the output folder holds the
    checkpoints of yet another run."""
    check_checkpoint(checkpoint)
    is_here = os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(output_dir)
    if is_here and overwrite:
        raise ValueError(
            f"--overwrite_output_dir would delete {checkpoint}, which --resume_from_checkpoint names: leave one of "
            "them out."
        )
    before = read_run(checkpoint)
    if before is not None:
        if before.get("method") != run["method"]:
            raise ValueError(
                f"--resume_from_checkpoint names {checkpoint}, a checkpoint of {before.get('method')}: name one of "
                f"{run['method']}."
            )
        _check_format(before, checkpoint)
        if held := [name for name in differences(before, run) if _HELD.fullmatch(name)]:
            raise ValueError(
                f"--resume_from_checkpoint names {checkpoint}, which holds the model and the optimizer of another "
                f"{', '.join(held)}: leave that as it was, or start anew in another --output_dir."
            )
    if overwrite:
        _check_named_elsewhere(output_dir, run)
    # Those that would count as newer ones of this run
    for other in [] if overwrite else _checkpoints(output_dir):
        owner = _owner(other)
        if (not is_here or _step(other) > _step(checkpoint)) and owner and (changed := differences(owner, run)):
            raise ValueError(
                f"{output_dir} holds {os.path.basename(other)} of another run (different: {', '.join(changed)}): "
                "choose another --output_dir to continue in."
            )
    here = None if is_here or overwrite else read_run(output_dir)
    if here and os.path.isfile(os.path.join(output_dir, RESULTS_FILE)) and (changed := differences(here, run)):
        raise ValueError(
            f"{output_dir} holds another run (different: {', '.join(changed)}): choose another --output_dir to "
            "continue in."
        )
    if not is_main_process():
        return
    if before is None:
        print(f"{checkpoint} does not tell of which run it is: its settings are not compared.")
    elif changed := differences(before, run):
        print(f"{checkpoint} is of a run with other settings ({', '.join(changed)}): those of this command count.")


def _check_named_elsewhere(output_dir: str, run: dict) -> None:
    """`ValueError` if a run that starts anew in the folder would delete what it needs."""
    here = os.path.realpath(output_dir)
    for key, names in named(run):
        for path in map(os.path.realpath, names):
            inside = os.path.relpath(path, here).split(os.sep)[0]
            if path == here or _CHECKPOINT.fullmatch(inside):
                raise ValueError(
                    f"A run that starts anew deletes what an earlier one left in --output_dir {output_dir}, and "
                    f"--{key} names a part of that: choose another --output_dir."
                )


def _check_format(before: dict, checkpoint: str) -> None:
    """Says it if another version of the code wrote a checkpoint; `ValueError` if this one cannot resume from it."""
    was, now = before.get(VERSIONS) or {}, {name: installed_version(name) for name in _PACKAGES}
    if before.get(FORMAT) != _FORMAT:
        raise ValueError(
            f"{checkpoint} was written by trl-proxy {was.get('trl-proxy')} in another format: finish its run with "
            "that version, or start anew with --overwrite_output_dir."
        )
    if is_main_process() and (changed := changed_keys(was, now)):
        written = ", ".join(f"{name} {was.get(name)}, now {now.get(name)}" for name in changed)
        print(f"{checkpoint} was written by other versions ({written}): the resumed run may differ a little.")


def remove_run(output_dir: str | os.PathLike, with_pairs: bool = True) -> None:
    """Deletes what an earlier run left in an output folder, its settings last, and records of its evaluation. Nothing
    else is deleted: without a run.json, only checkpoints are a run's.

    Args:
        with_pairs: whether DPO's pairs go too.
    """
    folder = Path(output_dir)
    checkpoints = [Path(path) for path in _checkpoints(folder)]
    is_run = (folder / RUN_FILE).is_file()
    if is_run:
        weights = [path for place in (folder, *checkpoints) for path in place.glob("*model*.safetensors")]
        sums = {hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
        for record in folder.glob("records/*.json"):
            with suppress(OSError, ValueError, AttributeError):
                if sums & set(map(str, json.loads(record.read_text(encoding="utf-8"))["settings"].values())):
                    record.unlink()
        patterns = _MODEL_FILES + _RECORD_FILES + ((PAIRS_FILE,) if with_pairs else ())
        logs = [*folder.glob("runs/**/events.out.tfevents.*"), *folder.glob("completions/completions_*.parquet")]
        files = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns)]
        for path in files + logs:
            if path.is_file():
                path.unlink()
    for path in checkpoints:
        shutil.rmtree(path)
    with suppress(FileNotFoundError):
        (folder / RUN_FILE).unlink()


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Deletes what a killed run was about to write in an output folder."""
    for name in (PARTIAL_DIR, UPLOAD_DIR):
        shutil.rmtree(os.path.join(output_dir, name), ignore_errors=True)


def changed_keys(before: dict, now: dict) -> list[str]:
    """Keys of two sets of settings whose values differ, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def read_json(path: str | os.PathLike, remedy: str = "take it from a copy, or train anew in another --output_dir"):
    """The JSON object in a file that a training script wrote, with values of the types that belong there.

    Raises:
        ValueError: it is damaged; one sentence that names the file and, if it is JSON, the key.
        OSError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        flaw = type_flaw(values, _FILES.get(os.path.basename(path), dict), "")
    except (ValueError, RecursionError) as error:
        flaw = str(error)
    if flaw:
        raise ValueError(f"{path} is damaged ({flaw.strip()}): {remedy}.")
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
    folder = os.path.dirname(os.path.normpath(checkpoint))
    older = [path for path in _checkpoints(folder or ".") if _step(path) < _step(checkpoint)]
    whole = next((os.path.normpath(path) for path in reversed(older) if not _damaged(path)), None)
    raise ValueError(
        f"The checkpoint {checkpoint} is damaged ({', '.join(damaged)}): "
        + (
            f"resume from the one before it with --resume_from_checkpoint {whole}."
            if whole
            else "there is no whole one before it, start anew with --overwrite_output_dir true."
        )
    )


def is_finished(folder: str | os.PathLike, asked: dict, defaults: dict) -> bool:
    """Whether the folder holds a finished run of a command, with the same content behind the names of its models, data
    and rewards.

    Args:
        asked: what the command sets, as `RecipeParser.asked` tells it.
        defaults: of everything else, from the same parser.
    """
    run = read_run(folder)
    if run is None or not os.path.isfile(os.path.join(folder, RESULTS_FILE)) or run.get(ASKED) is None:
        return False
    before, now = ({k: v for k, v in (defaults | x).items() if k not in _NOT_IDENTITY} for x in (run[ASKED], asked))
    return not differences({**before, CONTENTS: run.get(CONTENTS, {})}, {**now, CONTENTS: contents_of(now)})


def newest_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint in the folder of a run that is not finished; None for any other folder."""
    if not os.path.isfile(os.path.join(folder, RUN_FILE)) or os.path.isfile(os.path.join(folder, RESULTS_FILE)):
        return None
    return next(reversed(_checkpoints(folder)), None)
