"""Checkpoints are written where a rollout's updates end, and at the end of training."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from trl_proxy.trainer.checkpoints import BetweenRollouts


@pytest.mark.parametrize(
    ("asked", "last", "expected"),
    [
        ({4}, 12, {4}),
        ({1}, 12, {4}),
        ({1, 2, 3, 6, 9, 10}, 12, {4, 8, 12}),
        ({3, 10}, 10, {4, 10}),  # the end, in the middle of a rollout's updates
        ({5}, 7, {7}),
        ({9}, 10, {10}),
        (set(), 8, set()),
    ],
)
def test_a_checkpoint_waits_for_the_end_of_its_rollout(asked, last, expected):
    """And an evaluation likewise, on the same step."""
    trainer, done = SimpleNamespace(), {"should_save": set(), "should_evaluate": set()}
    callback = BetweenRollouts(trainer)
    for step in range(1, last + 1):
        trainer.between_rollouts = step % 4 == 0
        control = TrainerControl(**dict.fromkeys(done, step in asked))
        callback.on_step_end(None, TrainerState(global_step=step, max_steps=last), control)
        for name, steps in done.items():
            if getattr(control, name):
                steps.add(step)
    assert done == dict.fromkeys(done, expected)
