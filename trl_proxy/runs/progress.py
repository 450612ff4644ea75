"""What a training prints: one line per logging step. The whole dictionary goes to a file and to the trackers."""

import json
import os
import time

from transformers import TrainerCallback, TrainerState

LOG_FILE = "log.jsonl"
# Printed if they are logged: name, title, format.
_SHOWN = (
    ("reward", "reward", "+.3f"),
    ("rewards/margins", "margin", "+.3f"),
    ("loss", "loss", ".4f"),
    ("eval_reward", "validation", "+.3f"),
    ("eval_loss", "validation loss", ".4f"),
    ("accept_rate", "accepted", ".0%"),
)


def logged_seconds(state: TrainerState) -> float:
    """How long a run has trained according to its log, including the parts before an interruption."""
    logged = (entry.get("train_seconds") for entry in reversed(state.log_history))
    return next((seconds for seconds in logged if seconds is not None), 0.0)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLines(TrainerCallback):
    """Prints a line at every logging step. Appends everything that is logged to `log.jsonl` in the output folder, one
    JSON object per line.

    Args:
        limit: seconds after which the training ends; None for no limit.
        quiet: writes only the file.
    """

    def __init__(self, limit: float | None = None, quiet: bool = False):
        self.limit, self.quiet = limit, quiet
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        self.spent = logged_seconds(state)
        if not state.is_world_process_zero:
            return
        os.makedirs(args.output_dir, exist_ok=True)
        # A resumed run repeats the steps after its checkpoint, and logs them again.
        with open(os.path.join(args.output_dir, LOG_FILE), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history:
            return
        entry = state.log_history[-1]
        with open(os.path.join(args.output_dir, LOG_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        values = {name: entry[name] for name, *_ in _SHOWN if isinstance(entry.get(name), int | float)}
        self.latest |= values
        if "reward" in self.latest:  # a policy's loss is not informative
            self.latest = {name: value for name, value in self.latest.items() if "loss" not in name}
        if values and not self.quiet:
            print(self.line(state), flush=True)

    def line(self, state) -> str:
        """Progress, time left, and the last known value of everything that is shown."""
        seconds, steps = time.monotonic() - self.started, state.global_step - self.first_step
        share = state.global_step / max(state.max_steps, 1)
        left = seconds / max(steps, 1) * (state.max_steps - state.global_step)
        if self.limit is not None:
            share = max(share, min((self.spent + seconds) / self.limit, 1.0))
            left = min(left, max(self.limit - self.spent - seconds, 0.0))
        width = len(str(state.max_steps))
        parts = [f"step {state.global_step:{width}}/{state.max_steps}  {share:4.0%}  {_duration(left):>5} left"]
        parts += [
            f"{title} {self.latest[name]:{form}}".ljust(len(title) + 1 + len(f"{-9.9999:{form}}"))
            for name, title, form in _SHOWN
            if name in self.latest
        ]
        return "  ".join(parts).rstrip()
