"""Runs a training from its first step to its record."""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed

from ..devices import is_main_process
from ..files import make_readable, write_text, writing
from ..ranks import watch
from .arguments import RunArguments
from .process import Interrupted, lock_folder
from .progress import ProgressLines, logged_seconds
from .resume import DECODING, RESULTS_FILE, RUN_FILE, checkpoint_to_resume, identity

PATIENCE = 20.0  # seconds; torch's launcher kills processes that have not ended 30 s after its signal
# The start of a run


def prepare_run(method: str, run_args: RunArguments, training_args, *configs) -> tuple[dict, str | None]:
    """Locks the output folder for this process and seeds everything. From here on, a process that fails ends all.

    Returns:
        the settings that identify the run, and the checkpoint to resume from, None if there is none.

    Raises:
        ValueError: the folder cannot be written, another process trains in it, or it holds another run.
    """
    share_cpu_device(training_args)
    watch()
    if is_main_process():
        lock_folder(training_args.output_dir)
    run = {"method": method, **identity(run_args, training_args, *configs)}
    checkpoint = checkpoint_to_resume(run_args, training_args, run)
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
        limit: seconds; None for no limit.
        before: seconds already spent on this run before its first step.
        cycle: optimizer steps between two rollouts.

    Attributes:
        ended_by: the signal that ended the run, 0 if none did.
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
        at_end = state.global_step % self.cycle == 0
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
    if trainer.accelerator.is_main_process:
        if hasattr(trainer, "decoding"):  # DPO decodes nothing while it trains
            run = {**run, DECODING: trainer.decoding.as_dict()}
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
    if trainer.accelerator.is_main_process:
        # The last file of a run: if it exists, the run is finished.
        write_text(os.path.join(args.output_dir, RESULTS_FILE), json.dumps(results, indent=4, sort_keys=True))
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=run_args.dataset_name)
    trainer.end()


def training_cost(trainer) -> dict[str, float]:
    """The cost of the whole run, including the parts before an interruption, for the records of compare.py."""
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
