"""Draws the figures of a comparison again and writes it as one HTML page, from its records alone.

    python scripts/report.py outputs/compare
    python scripts/report.py outputs/compare_smollm2_cpu --trained outputs/smollm2_cpu
    python scripts/report.py outputs/compare --sweeps p_t=outputs/sweep-p_t temperature=outputs/sweep-temperature
    python scripts/report.py --tables README.md docs/results.md    # the documentation's tables, from its records

The page, `<output_dir>/report.html`, needs nothing else: send it, open it, print it. Folders of trained proxies and
baselines add their hyperparameters and training curves; those inside the output folder are found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.report.gather import make_parser, report
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("report", lambda: report(make_parser().parse_args()))
