"""Checkpoints of TRL's trainers: written whole or not at all. A resumed run equals the uninterrupted run."""

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress, logging
from trl.trainer.utils import RepeatSampler

from ..files import WriteError, flush_to_disk, make_readable, write_checksums, write_text, writing

logger = logging.get_logger(__name__)
RUN_FILE = "run.json"  # in an output folder and in every checkpoint: the settings of the run that wrote it
REWARD_FAILED = "reward_failed"  # in a checkpoint's: a reward failed, and may be another one when the run resumes
PARTIAL_DIR = ".partial"  # a checkpoint that is being written
UPLOAD_DIR = ".hub"  # what is being uploaded
# What a checkpoint holds besides the model: it goes to the hub only if `hub_strategy` asks for checkpoints.
_STATE = (
    "*.tmp",
    "checksums.json",
    "global_step*",
    "latest",
    "optimizer*",
    "pytorch_model_fsdp*",
    "replay_*",
    "rng_state*",
    "scaler.pt",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_fp32.py",
    RUN_FILE,
)


class BetweenRollouts(TrainerCallback):
    """Delays checkpoints and evaluations to the end of a rollout's updates, both to the same step. A rollout in use is
    not saved, so a run that resumed in the middle of one would differ from the uninterrupted run.

    Args:
        trainer: with [`AtomicCheckpointMixin`]; it knows where its rollouts end.
    """

    def __init__(self, trainer: "AtomicCheckpointMixin"):
        self.trainer = trainer
        self.save = self.evaluate = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.save = self.evaluate = False
        state.compute_steps(args, state.max_steps)  # a checkpoint has those of the command that wrote it
        if state.best_global_step is None:
            return control
        # The folder may have been moved since.
        best = os.path.join(self.trainer._get_output_dir(None), f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if os.path.isdir(best):
            state.best_model_checkpoint = best
        elif state.best_model_checkpoint is None:
            logger.warning(f"The best checkpoint, {best}, is gone: the best of those to come is kept.")
            state.best_metric = state.best_global_step = None
        return control

    def on_step_end(self, args, state, control, **kwargs):
        self.save |= control.should_save
        self.evaluate |= control.should_evaluate
        now = self.trainer.between_rollouts or state.global_step >= state.max_steps
        control.should_save, control.should_evaluate = self.save and now, self.evaluate and now
        if now:
            self.save = self.evaluate = False
        return control


class EpochSampler(RepeatSampler):
    """TRL's sampler. Its order depends only on the epoch, so a resumed run sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class AtomicCheckpointMixin(Trainer):
    """A mixin to list before a trainer class.

    Attributes:
        run: the settings of the run, as JSON-ready values, written to every checkpoint; None for a trainer without a
            script.
    """

    _staging = False
    push_in_progress: PushInProgress | None
    run: dict[str, Any] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(BetweenRollouts(self))

    @property
    def between_rollouts(self) -> bool:
        """Whether the next update begins with a new rollout. A trainer without rollouts is always there."""
        updates = getattr(self.args, "steps_per_generation", 1) * getattr(self.args, "num_iterations", 1)
        return getattr(self, "_step", 0) % updates == 0

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, PARTIAL_DIR) if self._staging else run_dir

    def _determine_best_metric(self, metrics, trial):
        """The best model has a checkpoint, also if none is due. With `save_strategy="best"`, transformers saves if
        this returns True: a checkpoint that was asked for by something else is saved too."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best or self.control.should_save

    def _save(self, output_dir=None, state_dict=None):
        token, self.args.hub_token = self.args.hub_token, None  # transformers writes the arguments next to the model
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _save_checkpoint(self, model, trial):
        """Writes under a temporary name, then renames. If the run is killed here, or the disk is full, the last
        checkpoint stays whole. Raises [`WriteError`]."""
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final, partial = os.path.join(run_dir, name), os.path.join(run_dir, PARTIAL_DIR)
        staged = os.path.join(partial, name)
        earlier = self.state.best_model_checkpoint
        try:
            with writing(final):
                self._staging = True
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._staging = False
                # Transformers looked for it in the temporary folder.
                is_best = self.state.best_global_step == self.state.global_step
                self.state.best_model_checkpoint = final if is_best else earlier
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                    if self.run is not None:
                        write_text(os.path.join(staged, RUN_FILE), json.dumps(self.run, indent=2))
                    write_checksums(staged)
                    make_readable(staged)
                    for path in Path(staged).rglob("*"):
                        if path.is_file():
                            flush_to_disk(path)
                    shutil.rmtree(final, ignore_errors=True)
                    os.replace(staged, final)
        except WriteError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            if self.args.push_to_hub:
                self._push_from_checkpoint(final)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                self._finish_current_push()  # it may be reading a checkpoint that is deleted now
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    # Uploads while training, in the background, as transformers' `hub_strategy` says

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()  # it reads the folder that is filled now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = os.path.join(self.args.output_dir, UPLOAD_DIR)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            checkpoint_folder,
            folder,
            ignore=lambda _, names: [name for name in names if any(fnmatch(name, pattern) for pattern in _STATE)],
        )
        card = os.path.join(self.args.output_dir, "README.md")
        if os.path.isfile(card):
            shutil.copy(card, folder)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(folder, message)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=place))
        self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: str, message: str, **where):
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
            **where,
        )

    def push_to_hub(self, *args, **kwargs):
        """As [`~transformers.Trainer.push_to_hub`]."""
        self._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(os.path.join(self.args.output_dir, UPLOAD_DIR), ignore_errors=True)
        return super().push_to_hub(*args, **kwargs)
