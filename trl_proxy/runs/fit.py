"""Runs a training from its first step to its record."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..devices import is_main_process, peak_memory_mb
from ..files import WriteError, make_readable, write_text, writing
from ..ranks import watch
from ..rewards.checks import RewardError
from ..trainer.checkpoints import RUN_FILE
from .arguments import RunArguments
from .process import Interrupted, lock_folder
from .progress import ProgressLines, logged_seconds
from .resume import DECODING, RESULTS_FILE, checkpoint_to_resume, identify, remove_run, remove_unfinished

PATIENCE = 20.0  # seconds; torch's launcher kills processes that have not ended 30 s after its signal
# The start of a run


def prepare_run(method: str, run_args: RunArguments, training_args, *configs) -> tuple[dict, str | None]:
    """Locks the output folder for this process, removes what no run needs any more, and seeds everything.
    From here on, a process that fails ends all.

    Returns:
        the settings that identify the run, and where it resumes: a checkpoint, the output folder itself if the run is
        finished, or None if it starts anew.

    Raises:
        ValueError: the folder cannot be written, another process trains in it, or it holds another run.
    """
    output_dir = training_args.output_dir
    share_cpu_device(training_args)
    watch()
    if is_main_process():
        lock_folder(output_dir)
    run = identify(method, training_args.world_size, run_args, training_args, *configs)
    checkpoint = checkpoint_to_resume(run_args, training_args, run)
    state = PartialState()
    state.wait_for_everyone()  # all have seen the same folder
    if is_main_process():
        with writing(output_dir):
            remove_unfinished(output_dir)
            if checkpoint is None or run_args.overwrite_output_dir:
                # Pairs that were sampled before a kill are not sampled again.
                remove_run(output_dir, with_pairs=run_args.overwrite_output_dir)
    state.wait_for_everyone()
    set_seed(training_args.seed)
    return run, checkpoint


def share_cpu_device(training_args) -> None:
    """Uses the device `cpu` in every process. Accelerate's `cpu:0` would make Trainer and accelerate copy the whole LM
    twice."""
    if training_args.device.type == "cpu":
        training_args.distributed_state.device = torch.device("cpu")
        training_args.__dict__["_setup_devices"] = torch.device("cpu")  # the cached `training_args.device`


class RunClock(TrainerCallback):
    """Logs how long a run has trained, including the parts before an interruption. Ends it with a checkpoint when its
    time is over, or when SIGTERM or Ctrl-C has reached one of its processes.

    It ends after the last update on a rollout, so that a resumed run equals the uninterrupted one to the last bit. If
    that takes longer than `PATIENCE` seconds after a signal, it ends at the next step.

    Args:
        trainer: with [`AtomicCheckpointMixin`].
        limit: seconds; None for no limit.
        before: seconds already spent on this run before its first step.

    Attributes:
        ended_by: the signal that ended the run, 0 if none did.
    """

    def __init__(self, trainer, limit: float | None, before: float = 0.0):
        self.trainer, self.limit, self.before = trainer, limit, before
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
        # A launcher forwards a Ctrl-C that its processes already have: that is the same one again.
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
        at_end = self.trainer.between_rollouts
        over = at_end and self.limit is not None and self.seconds() >= self.limit
        hurry = self.signum and time.monotonic() - self.noted > PATIENCE
        # All processes stop at the same step: when the first one's time is over, or any has a signal.
        told = gather_object([(over, self.signum, hurry)])
        signum = max(signum for _, signum, _ in told)
        if told[0][0] or (signum and (at_end or any(hurry for *_, hurry in told))):
            self.ended_by = signum
            control.should_training_stop = control.should_log = control.should_save = True
        return control


def fit(trainer, run: dict, run_args: RunArguments, checkpoint: str | None, seconds_before: float = 0.0) -> None:
    """Trains, or resumes from `checkpoint`; saves the result, the trainer's state and the run's record to the output
    folder.

    Raises:
        Interrupted: a signal ended the training.
    """
    args = trainer.args
    is_main = trainer.accelerator.is_main_process
    if checkpoint is not None and checkpoint == args.output_dir:
        trainer.accelerator.print(f"{checkpoint} holds this run, finished: nothing left to train.")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        return _publish(trainer, run_args)
    trainer.run = run
    if is_main:
        if hasattr(trainer, "decoding"):  # DPO decodes nothing while it trains
            run = {**run, DECODING: trainer.decoding.as_dict()}
        # It is not finished from here on.
        Path(args.output_dir, RESULTS_FILE).unlink(missing_ok=True)
        write_text(os.path.join(args.output_dir, RUN_FILE), json.dumps(run, indent=2))
    clock = RunClock(trainer, run_args.max_train_seconds, seconds_before)
    trainer.add_callback(clock)
    if not run_args.verbose:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines(run_args.max_train_seconds, quiet=run_args.verbose))
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)) if checkpoint else None
    over = state and logged_seconds(state) >= (run_args.max_train_seconds or float("inf"))
    with truthful(run_args, args):
        if checkpoint and state and (over or _is_at_end(state, args)):
            # transformers would train one step more.
            trainer.accelerator.print(f"{checkpoint} is the end of this run: nothing left to train.")
            trainer._load_from_checkpoint(_best(checkpoint, state) if args.load_best_model_at_end else checkpoint)
            trainer.state = state
        else:
            if checkpoint:
                trainer.accelerator.print(f"Resuming from {checkpoint}.")
            trainer.train(resume_from_checkpoint=checkpoint)
            if clock.ended_by:
                raise Interrupted(clock.ended_by, args.output_dir)
        with writing(args.output_dir):
            trainer.save_model(args.output_dir)
            trainer.save_state()
            if trainer.args.should_save:
                for path in Path(args.output_dir).glob("*.safetensors"):
                    make_readable(path)
        results = training_cost(trainer)
        if is_main:
            # The last file of a run: if it exists, the run is finished.
            write_text(os.path.join(args.output_dir, RESULTS_FILE), json.dumps(results, indent=4, sort_keys=True))
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    _publish(trainer, run_args)


def _is_at_end(state: TrainerState, args) -> bool:
    """Whether a run has no step left; `state.max_steps` is that of the command that wrote the checkpoint."""
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0.0) >= args.num_train_epochs


def _best(checkpoint: str, state: TrainerState) -> str:
    """The best checkpoint of the run whose last one is given; that one if the best is gone."""
    if state.best_global_step is None:
        return checkpoint
    best = os.path.join(os.path.dirname(checkpoint), f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
    if not os.path.isdir(best):
        if is_main_process():
            print(f"The best checkpoint, {best}, is gone: the last one is taken.")
        return checkpoint
    state.best_model_checkpoint = best
    return best


def _publish(trainer, run_args: RunArguments) -> None:
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=run_args.dataset_name)
    trainer.end()


@contextmanager
def truthful(run_args: RunArguments, args) -> Iterator[None]:
    """Errors that say that the same command resumes name the flags that it must do without."""
    anew = ["--overwrite_output_dir"] if run_args.overwrite_output_dir else []
    again = [*anew, *(["--resume_from_checkpoint"] if args.resume_from_checkpoint else [])]
    try:
        yield
    except (WriteError, RewardError, Interrupted) as error:
        # A file that could not be written may have been the first checkpoint.
        if flags := anew if isinstance(error, WriteError) else again:
            resumes = f"the same command without {' and '.join(flags)} resumes"
            error.args = (str(error).replace("the same command resumes", resumes),)
        raise
    except KeyboardInterrupt:
        if anew:
            raise KeyboardInterrupt(f"interrupted; the same command without {anew[0]} resumes.") from None
        raise


def training_cost(trainer) -> dict[str, float]:
    """The cost of the whole run, including the parts before an interruption, for the records of compare.py."""
    args = trainer.args
    device = trainer.accelerator.device
    peak = trainer.accelerator.reduce(torch.tensor(peak_memory_mb(device), device=device), reduction="sum")
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "episodes": trainer.state.global_step * samples // getattr(args, "num_iterations", 1),
        "steps": trainer.state.global_step,
        "num_processes": args.world_size,
        "train_seconds": logged_seconds(trainer.state),
        "train_peak_memory_mb": peak.item(),
    }
