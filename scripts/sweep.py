"""Trains a grid of settings, evaluates every cell, and says what each setting gives.

    python scripts/sweep.py --config scripts/recipes/sweep_p_t.yaml

`grid` lists values of any fields of the training recipe. Every combination is trained with every seed in its own
folder (`<output_dir>/p_t=0.1-seed0`), and compared there with the LM itself as `evaluate` says. Several cells run at
once with `--jobs 2`, or one on each of `--devices 0 1 2 3` (CUDA_VISIBLE_DEVICES). Finished cells are skipped and
interrupted ones resume, so the same command after a kill loses and repeats nothing. The table
(`<output_dir>/sweep.md`) and, for one field of a proxy, the figures (`<output_dir>/plots`) come only from the
cells' records.

The learning rate of a baseline, on the validation prompts:

    python scripts/sweep.py --config scripts/recipes/sweep_lr.yaml --method ppo \\
        --recipe scripts/recipes/ppo_smollm2_cpu.yaml --output_dir outputs/tune_ppo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.grid import make_parser, sweep
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("sweep", lambda: sweep(*make_parser().parse_args_and_config()), goes_on=True)
