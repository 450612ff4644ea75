"""Checkpoints of TRL's trainers: written whole or not at all. A resumed run equals the uninterrupted run."""

import os
import shutil

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..files import WriteError, make_readable, write_checksums, writing


class SaveBetweenRollouts(TrainerCallback):
    """Delays checkpoints to the end of a rollout's updates. A rollout in use is not saved, so a run that resumed in
    the middle of one would differ from the uninterrupted run."""

    def __init__(self, cycle: int):
        self.cycle, self.pending = cycle, False

    def on_step_end(self, args, state, control, **kwargs):
        self.pending |= control.should_save
        at_boundary = state.global_step % self.cycle == 0 or state.global_step >= state.max_steps
        control.should_save = self.pending and at_boundary
        self.pending &= not at_boundary
        return control


class AtomicCheckpointMixin(Trainer):
    """A mixin to list before a trainer class."""

    _staging = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Online trainers make several updates per rollout.
        cycle = getattr(self.args, "steps_per_generation", 1) * getattr(self.args, "num_iterations", 1)
        self.add_callback(SaveBetweenRollouts(max(cycle // self.args.gradient_accumulation_steps, 1)))

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, ".partial") if self._staging else run_dir

    def _save_checkpoint(self, model, trial):
        """Writes under a temporary name, then renames. If the run is killed here, or the disk is full, the last
        checkpoint stays whole. Raises [`WriteError`]."""
        run_dir = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        final, partial = os.path.join(run_dir, name), os.path.join(run_dir, ".partial")
        staged = os.path.join(partial, name)
        try:
            with writing(final):
                self._staging = True
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._staging = False
                if self.state.best_global_step:
                    # Transformers looked for it in the temporary folder.
                    best = os.path.join(run_dir, f"checkpoint-{self.state.best_global_step}")
                    self.state.best_model_checkpoint = best
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                    write_checksums(staged)
                    make_readable(staged)
                    shutil.rmtree(final, ignore_errors=True)
                    os.replace(staged, final)
        except WriteError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
