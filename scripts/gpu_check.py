"""Checks and measures gated decoding and training on one GPU, in at most 8 minutes, without downloading anything.

    python scripts/gpu_check.py                # a CUDA device: all figures in outputs/gpu_check.json, and a table
    python scripts/gpu_check.py --tiny         # tiny LMs on any device: shows that the check itself works

Each part runs in a fresh process and is stopped when its time is over; what it has measured by then is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.gpu_check import gpu_check, make_parser
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("gpu_check", lambda: gpu_check(*make_parser().parse_args_into_dataclasses()))
