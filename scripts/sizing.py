"""Memory that training a proxy takes, computed before anything is run; PPO with LoRA on the LM for comparison.

    python scripts/sizing.py                                        # LMs of 1B, 7B and 70B: the table of the guide
    python scripts/sizing.py --config scripts/recipes/paper.yaml    # a recipe of scripts/train_proxy.py
    python scripts/sizing.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit --max_completion_length 256

The flags are those of scripts/train_proxy.py that matter here. Only the configuration of an LM is read. All is counted
for one device that holds the whole LM. tests/scripts/test_sizing.py compares the bytes with what small LMs need.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.sizing import make_parser, print_sizing
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    # A recipe has more settings than matter here.
    run_script("sizing", lambda: print_sizing(*make_parser().parse_args_and_config(fail_with_unknown_args=False)))
