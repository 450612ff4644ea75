"""Measures speed and memory of gated decoding against the LM's own `generate`, interleaved in one run.

    python scripts/benchmark.py --output_dir outputs/benchmark          # over an hour on two CPU cores with bfloat16
    python scripts/benchmark.py --quick --output_dir outputs/benchmark  # under five minutes

In every cell of a grid (rows of the batch, prompt length, new tokens, share of decisions that reject) all methods
decode the same prompts in turn, several times. A ratio divides a method's tokens per second by plain sampling's in the
same round; the tables show its median over the rounds. Compare ratios: absolute figures depend on the machine and its
load. Peak memory is that of fresh processes for each way of running, without the interpreter and its libraries. The
same command resumes an interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.benchmark import benchmark, make_parser
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("benchmark", lambda: benchmark(*make_parser().parse_args_into_dataclasses()), goes_on=True)
