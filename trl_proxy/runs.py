"""What the training scripts share: where model, data and rewards come from, going on with an interrupted run, its
clock and its record."""

import dataclasses
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, ScriptArguments, get_quantization_config

from .defaults import EMBEDDED, load_lm, load_prompts, load_reward
from .devices import half_dtype, is_main_process
from .files import damaged_files, make_readable, write_text, writing
from .progress import ProgressLines, logged_seconds

RUN_FILE = "run.json"
RESULTS_FILE = "train_results.json"
LOCK_FILE = ".lock"
PATIENCE = 20.0  # seconds; torch's launcher kills what has not ended 30 s after its signal
# What may differ between an interrupted run and the command that goes on with it, and what no file may hold.
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


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments, where the reward comes from, and how long to train."""

    dataset_name: str | None = field(default=EMBEDDED, metadata={"help": "`embedded`, a JSON file or a hub dataset."})
    dataset_test_split: str = field(default="validation", metadata={"help": "Split for evaluation while training."})
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "`embedded`, `embedded:harmless`, `embedded:helpful`, or a model id. Default: `embedded`."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Dotted import paths of reward functions, beside the reward model."}
    )
    max_train_seconds: float | None = field(
        default=None,
        metadata={"help": "End training after so long, validation included, if not before."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train from the start in a folder that holds another run's checkpoints."}
    )
    verbose: bool = field(
        default=False,
        metadata={"help": "Print all that is logged, with a progress bar; it is in `log.jsonl` in any case."},
    )

    def __post_init__(self):
        if self.max_train_seconds is not None and self.max_train_seconds <= 0:
            raise ValueError(f"`max_train_seconds` must be above 0, got {self.max_train_seconds}.")


def installed_version(package: str) -> str | None:
    """Version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Where a run begins


def begin(method: str, run_args: RunArguments, training_args, *configs) -> tuple[dict, str | None]:
    """Takes the output folder for this process alone and seeds everything.

    Returns:
        what makes the run the run it is, and the checkpoint to go on from, None where there is none.

    Raises:
        ValueError: the folder cannot be written, another process trains in it, or it holds another run.
    """
    if is_main_process():
        hold(training_args.output_dir)
    use_one_cpu(training_args)
    run = {"method": method, **identity(run_args, training_args, *configs)}
    checkpoint = checkpoint_to_resume(run_args, training_args, run)
    set_seed(training_args.seed)
    return run, checkpoint


def use_one_cpu(training_args) -> None:
    """Where several processes train on a CPU, accelerate calls it `cpu:0`, and torch copies a tensor that is on `cpu`
    to get it there: the Trainer and accelerate would copy the whole LM, one after the other. All call it `cpu`."""
    if training_args.device.type == "cpu":
        training_args.distributed_state.device = torch.device("cpu")
        training_args.__dict__["_setup_devices"] = torch.device("cpu")  # what `training_args.device` has kept


_held: dict[str, FileLock] = {}


def hold(output_dir: str | os.PathLike) -> None:
    """Locks the folder until the process ends, however that comes about.

    Raises:
        ValueError: the folder cannot be written, or another process holds it.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        path = os.path.realpath(os.path.join(output_dir, LOCK_FILE))
        if path not in _held:
            lock = FileLock(path, timeout=0)
            lock.acquire()
            _held[path] = lock
    except Timeout:
        raise ValueError(
            f"Another process is at work in {output_dir}: let it end, or choose another --output_dir."
        ) from None
    except OSError as error:
        raise ValueError(
            f"The folder {output_dir} cannot be written ({error.strerror}): choose another --output_dir."
        ) from error


def wait_until_free(folder: str | os.PathLike, stopped: Callable[[], bool] = lambda: False) -> None:
    """Waits while another process is at work in the folder: a training that has outlived the command it was started
    by; `stopped` is asked whether to wait no longer."""
    path = os.path.join(folder, LOCK_FILE)
    lock = FileLock(path, timeout=0)
    while os.path.isfile(path) and not stopped():
        try:
            with lock:
                return
        except Timeout:
            time.sleep(0.2)


def launcher(command: str) -> list[str]:
    """The words of a command that launches a training, such as `accelerate launch`. That one is this environment's,
    whether or not it is activated.

    Raises:
        ValueError: if there is no such program.
    """
    program, *words = shlex.split(command) or [""]
    if program == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    if shutil.which(program) is None:
        raise ValueError(f"--launch names {program!r}, which is no program here: give its path.")
    return [program, *words]


def find_file(path: str) -> str:
    """A file as it is named, or in this checkout if the current folder has none of that name."""
    in_checkout = Path(__file__).parents[1] / path
    return str(in_checkout) if not os.path.exists(path) and in_checkout.is_file() else path


def run_command(command: list[str], stopped: Callable[[], bool] = lambda: False, **kwargs) -> int:
    """Runs a command in a session of its own. Where this process is interrupted, or `stopped` tells so, it gets
    SIGTERM: a training saves its checkpoint then. `kwargs` are those of `subprocess.Popen`.

    Returns:
        its exit status.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    if stopped():
        raise KeyboardInterrupt
    try:
        process = subprocess.Popen(command, start_new_session=True, **kwargs)
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{command[0]} cannot be run ({error.strerror}): name a program by --launch.") from error
    try:
        while not stopped():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.2)
        raise KeyboardInterrupt
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def one_sentence(error: BaseException) -> str:
    """What a script says of an error, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        sentence = f"{error.filename} could not be read or written ({error.strerror})"
        in_cache = os.path.abspath(str(error.filename)).startswith(os.path.abspath(HF_HOME))
        return f"{sentence}: set HF_HOME to a folder that can be written." if in_cache else f"{sentence}."
    return " ".join(str(error).split())


def interrupt_on_sigterm() -> None:
    """SIGTERM does what Ctrl-C does from now on, in the process of a script."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def load_datasets(run_args: RunArguments, training_args) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on, and to evaluate on where the training arguments ask for it."""
    name = run_args.dataset_name or EMBEDDED
    train = load_prompts(name, run_args.dataset_train_split)
    if training_args.eval_strategy == "no":
        return train, None
    return train, load_prompts(name, run_args.dataset_test_split)


def reward_names(run_args: RunArguments) -> list[str]:
    """The reward model's name and those of the reward functions; the embedded reward where there are none."""
    names = [run_args.reward_model_name_or_path] if run_args.reward_model_name_or_path else []
    return names + (run_args.reward_funcs or []) or [EMBEDDED]


def load_rewards(run_args: RunArguments) -> list:
    """The reward model and the reward functions, as TRL's trainers take them."""
    return [load_reward(name) for name in reward_names(run_args)]


def load_policy(model_args: ModelConfig, args, device: str | torch.device):
    """The LM that the model arguments name, in a dtype that suits the device, and its tokenizer. `args` tells whether
    to trust remote code."""
    # TRL's 4 bit computes in the dtype of the arguments and has no `auto`.
    auto = model_args.dtype == "auto"
    computed = dataclasses.replace(model_args, dtype=half_dtype(device)) if auto else model_args
    return load_lm(
        model_args.model_name_or_path or EMBEDDED,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(computed),
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=device,
        attn_implementation=model_args.attn_implementation,
    )


def to_device(lm, device):
    """The LM on that device; quantized weights stay where they were loaded, which is where they belong."""
    return lm if getattr(lm, "is_quantized", False) else lm.to(device)


def identity(*configs) -> dict:
    """What makes a run the run it is, as JSON-ready values."""
    values = {k: v for config in configs for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def checkpoint_to_resume(run_args: RunArguments, training_args, run: dict) -> str | None:
    """The checkpoint that is asked for, or the last one of this very run in its output folder; `ValueError` where that
    holds another run's, or the checkpoint is damaged."""
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
    changed = sorted(key for key in run.keys() | before.keys() if run.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"{output_dir} holds the checkpoint of another run (different: {', '.join(changed)}): choose another "
            "--output_dir, or start anew with --overwrite_output_dir."
        )
    check_checkpoint(last)
    return last


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file that a training script wrote; `ValueError` where it is damaged."""
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
    """`ValueError` where one of its files is damaged; it names the newest whole checkpoint before it."""
    if not os.path.isdir(checkpoint):
        raise ValueError(f"--resume_from_checkpoint is no folder of a checkpoint, got {checkpoint}.")
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
            f"go on from the one before it with --resume_from_checkpoint {whole}."
            if whole
            else "there is no whole one before it, start anew with --overwrite_output_dir true."
        )
    )


def flags(values: dict) -> list[str]:
    """Settings, names and values as in a recipe, as the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse_dicts(args, *names: str) -> None:
    """
    Fields of `args` that hold a dict in a recipe and JSON on the command line become dicts, as transformers' own do;
    None becomes an empty one.

    Raises:
        ValueError: the text of a flag is no JSON object.
    """
    for name in names:
        value = getattr(args, name)
        with suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) else value or {}
        if not isinstance(value, dict):
            raise ValueError(f"--{name} must be a JSON object, such as '{{\"seed\": 1}}', got {value}.")
        setattr(args, name, value)


def is_finished(folder: str | os.PathLike, settings: dict) -> bool:
    """Whether a finished run with these settings, names and values as in a recipe, is in the folder."""
    run_file = os.path.join(folder, RUN_FILE)
    if not os.path.isfile(run_file) or not os.path.isfile(os.path.join(folder, RESULTS_FILE)):
        return False
    run = read_json(run_file)
    return all(run[key] == value for key, value in settings.items() if key in run)


# The run itself


class Interrupted(Exception):
    """A signal ended the run; its checkpoint is saved."""

    def __init__(self, signum: int, output_dir: str):
        name = signal.Signals(signum).name
        super().__init__(f"{name} ended the run: its checkpoint is in {output_dir}, and the same command goes on.")
        self.signum = signum


class RunClock(TrainerCallback):
    """Logs how long a run has trained, the parts before an interruption included, and ends it with a checkpoint when
    its time is over, or when SIGTERM or Ctrl-C has reached one of its processes.

    It ends after the last update on a rollout, from where a resumed run equals the uninterrupted one to the last bit;
    where that takes longer than `PATIENCE` seconds after a signal, at the next step.

    Args:
        limit: seconds; None for no end.
        before: seconds that were spent on this run already, before its first step.
        cycle: optimizer steps between two rollouts.

    Attributes:
        ended_by: the signal that ended the run, 0 where none did.
    """

    def __init__(self, limit: float | None, before: float = 0.0, cycle: int = 1):
        self.limit, self.before, self.cycle = limit, before, max(cycle, 1)
        self.signum = self.ended_by = 0
        self.noted = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.spent = max(logged_seconds(state), self.before)
        self.started = time.monotonic()
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, args, state, control, **kwargs):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        # A launcher hands on the Ctrl-C that its processes have had already: the same one again.
        if self.signum and time.monotonic() - self.noted > 5:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self.noted = signum, time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def on_log(self, args, state, control, **kwargs):
        if state.log_history:
            state.log_history[-1]["train_seconds"] = self.seconds()

    def on_step_end(self, args, state, control, **kwargs):
        at_end = state.global_step % self.cycle == 0
        over = at_end and self.limit is not None and self.seconds() >= self.limit
        hurry = self.signum and time.monotonic() - self.noted > PATIENCE
        # All processes stop at the same step: when the first one's time is over, or any has had a signal.
        told = gather_object([(over, self.signum, hurry)])
        signum = max(signum for _, signum, _ in told)
        if told[0][0] or (signum and (at_end or any(hurry for *_, hurry in told))):
            self.ended_by = signum
            control.should_training_stop = control.should_log = control.should_save = True
        return control


def fit(trainer, run: dict, run_args: RunArguments, checkpoint: str | None, seconds_before: float = 0.0) -> None:
    """Trains, or goes on from `checkpoint`; saves the result, the trainer's state and the run's record to the output
    folder.

    Raises:
        Interrupted: a signal ended the training.
    """
    args = trainer.args
    if trainer.accelerator.is_main_process:
        write_text(os.path.join(args.output_dir, RUN_FILE), json.dumps(run, indent=2))
    rollout = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    cycle = rollout // args.gradient_accumulation_steps
    clock = RunClock(run_args.max_train_seconds, seconds_before, cycle)
    trainer.add_callback(clock)
    if not run_args.verbose:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines(run_args.max_train_seconds, quiet=run_args.verbose))
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
    over = state and logged_seconds(state) >= (run_args.max_train_seconds or float("inf"))
    if checkpoint and state and (over or state.global_step >= state.max_steps):
        # transformers would train one step more.
        trainer.accelerator.print(f"{checkpoint} is the end of this run: nothing left to train.")
        if args.load_best_model_at_end and state.best_global_step:
            checkpoint = os.path.join(os.path.dirname(checkpoint), f"checkpoint-{state.best_global_step}")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        if checkpoint:
            trainer.accelerator.print(f"Going on from {checkpoint}.")
        trainer.train(resume_from_checkpoint=checkpoint)
        if clock.ended_by:
            raise Interrupted(clock.ended_by, args.output_dir)
    with writing(args.output_dir):
        trainer.save_model(args.output_dir)
        trainer.save_state()
        if trainer.args.should_save:
            for path in Path(args.output_dir).glob("*.safetensors"):
                make_readable(path)
    results = measured(trainer)
    if trainer.accelerator.is_main_process:
        # The last file of a run: where it is, the run is finished.
        write_text(os.path.join(args.output_dir, RESULTS_FILE), json.dumps(results, indent=4, sort_keys=True))
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=run_args.dataset_name)
    trainer.end()


def measured(trainer) -> dict[str, float]:
    """What the whole run took, the parts before an interruption included: for the records of compare.py."""
    args = trainer.args
    peak = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024)  # KiB -> MiB
    if torch.cuda.is_available():
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**20)
    peak = trainer.accelerator.reduce(peak.to(trainer.accelerator.device), reduction="sum")
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "episodes": trainer.state.global_step * samples // getattr(args, "num_iterations", 1),
        "steps": trainer.state.global_step,
        "num_processes": args.world_size,
        "train_seconds": logged_seconds(trainer.state),
        "train_peak_memory_mb": peak.item(),
    }


def quieten() -> None:
    """Leaves out what other libraries print of their own work. Bars of downloads stay, and in a terminal those of data
    sets."""
    hub_bars = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of every LM's 272 weights, say
    if not hub_bars:
        enable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # what libraries say to each other
    if not (sys.stderr.isatty() and is_main_process()):
        datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):  # a console that has no such character shows `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_script(
    name: str, main: Callable[[], Any], errors: tuple[type[Exception], ...] = (), goes_on: bool = False
) -> NoReturn:
    """Runs `main` as the script `name` and ends the process: what went wrong is one sentence on stderr.

    Args:
        errors: what says in one sentence what is wrong, beside `ImportError`, `OSError` and `ValueError`.
        goes_on: whether the same command goes on with an interrupted run.
    """
    interrupt_on_sigterm()
    quieten()
    status = 0
    expected: tuple[type[BaseException], ...] = (ImportError, OSError, ValueError, *errors)
    try:
        kept = main()  # noqa: F841 - see `_leave`
    except expected as error:
        status, message = 1, one_sentence(error)
    except Interrupted as error:
        status, message = 128 + error.signum, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on." if goes_on else "interrupted."
    if status:
        print(f"{name}: {message}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """Ends the process. One of several ends without taking its objects apart: the last reference to a gloo process
    group is DDP's, its destructor waits for a thread, and now and then that thread waits for the interpreter. So keep
    the trainer until then."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
