"""One of several processes fails: all end soon, and what is printed is one sentence."""

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module of rewards, which makes one process fail at some point.
REWARDS = """
import os
import signal
import time

import torch

import trl_proxy.ranks
from trl_proxy import ProxyPPOTrainer

trl_proxy.ranks.GRACE = 3.0
generate = ProxyPPOTrainer._generate_single_turn


def run_out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 2 GiB.")


def damage_the_lm(self, *args):
    self.model.lm.get_output_embeddings().weight.data.fill_(torch.nan)
    return generate(self, *args)


def upper(prompts, completions, **kwargs):
    {reward}
    return [float(sum(c.isupper() for c in x)) for x in completions]


if os.environ["RANK"] == "1":
    {patch}
"""
# A user's script: nothing but the trainer.
SCRIPT = """
import sys

import datasets
import transformers

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer

lm = transformers.AutoModelForCausalLM.from_pretrained("lm")
trainer = ProxyPPOTrainer(
    model=ProxyModelForCausalLM(lm, ProxyConfig(gate_hidden_sizes=[8])),
    reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    args=ProxyPPOConfig("out", max_completion_length=4, report_to=[], disable_tqdm=True),
    train_dataset=datasets.Dataset.from_dict({"prompt": list("abcdefgh")}),
    eval_dataset=datasets.Dataset.from_dict({"prompt": list("abcdefgh")}),
    processing_class=transformers.AutoTokenizer.from_pretrained("lm", padding_side="left"),
)
if trainer.args.process_index == 1:
    trainer._collect = None
trainer.evaluate()
"""


@pytest.fixture
def run_two(start_ranks, tiny_run, tmp_path):
    """`run_two(patch="pass", reward="pass")` -> exit statuses, and what was printed."""

    def run(patch="pass", reward="pass"):
        (tmp_path / "my_rewards.py").write_text(REWARDS.format(patch=patch, reward=reward))
        argv = [ROOT / "scripts" / "train_proxy.py", *tiny_run(num_generations=2, max_steps=4)]
        started = time.monotonic()
        statuses = start_ranks(2, argv, tmp_path, tmp_path / "log")
        assert time.monotonic() - started < 60, "they were waited for"
        return statuses, (tmp_path / "log").read_text()

    return run


@pytest.mark.fault
@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (
            "ProxyPPOTrainer._evaluate_actions = run_out_of_memory",
            "CUDA out of memory. Tried to allocate 2.00 GiB: lower --per_device_train_batch_size or "
            "--rollout_batch_size, or load the LM in 4 bit.",
        ),
        (
            "ProxyPPOTrainer._generate_single_turn = damage_the_lm",
            "The LM's logits are NaN or infinite in the batch whose first prompt is",
        ),
    ],
)
def test_an_error_of_one_process(run_two, patch, sentence):
    statuses, printed = run_two(patch)
    assert statuses == [1, 1]
    assert printed.count("train_proxy: ") == printed.count(f"train_proxy: {sentence}") == 1, printed
    assert "Traceback" not in printed


@pytest.mark.fault
def test_a_process_that_is_killed(run_two):
    """The other one is in no collective, which would fail by itself."""
    statuses, printed = run_two(
        reward="os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else time.sleep(600)"
    )
    assert statuses == [-9, 1]
    assert printed.count("train_proxy: ") == printed.count("train_proxy: process 0 of 2 was killed or crashed") == 1
    assert "Traceback" not in printed


@pytest.mark.fault
def test_an_error_in_a_users_script(start_ranks, tiny_files):
    (tiny_files / "script.py").write_text(SCRIPT)
    statuses = start_ranks(2, [tiny_files / "script.py"], tiny_files, tiny_files / "log")
    printed = (tiny_files / "log").read_text()
    assert statuses == [1, 1]
    assert printed.count("Traceback") == 1
    assert printed.splitlines()[-1] == "[rank1]: TypeError: 'NoneType' object is not callable"
