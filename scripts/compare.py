"""Compares trained proxies and baselines with the LM itself and best-of-n on the same prompts, batches and rewards.

The embedded LM, reward and prompts, on two CPU cores:

    python scripts/compare.py --config scripts/recipes/compare_smollm2_cpu.yaml \\
        --proxies outputs/proxy-seed0 outputs/proxy-seed1 --output_dir outputs/compare

Any causal LM, reward model and dataset of the hub, on a GPU:

    python scripts/compare.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit --proxies outputs/qwen-proxy \\
        --dataset_name trl-lib/ultrafeedback-prompt --split test \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B --gold_reward_model_name_or_path none \\
        --best_of 2 4 8 16 32 --batch_size 64 --max_new_tokens 256 --output_dir outputs/compare-qwen

Everything from its recipe, trained if needed, three seeds each:

    python scripts/compare.py --config scripts/recipes/compare_all_smollm2_cpu.yaml

Writes one record per method and seed under `<output_dir>/records`. Draws the tables, `plots/`, `samples.md` and
`report.md` from all records there. The same command resumes an interrupted run: records with the same settings are
kept, so repeating a finished command only draws again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.runner import compare, make_parser
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("compare", lambda: compare(*make_parser().parse_args_and_config()), goes_on=True)
