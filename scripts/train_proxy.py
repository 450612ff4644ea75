"""Train a proxy over a frozen language model by PPO on a reward.

On a bare machine (embedded LM, reward and prompts, 2 CPU cores):

    accelerate launch scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml

On a GPU, with any causal LM, dataset and reward model of the hub:

    accelerate launch scripts/train_proxy.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit \\
        --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --output_dir outputs/proxy

The same command resumes an interrupted run. `--proxy_name_or_path` trains a proxy further, for example on longer
responses or another reward. `--reward_funcs package.module.function` adds your own reward functions, weighted by
`--reward_weights`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from trl_proxy.runs.process import run_script
from trl_proxy.runs.train import make_parser, train

if __name__ == "__main__":
    run_script(
        "train_proxy",
        lambda: train(*make_parser().parse_args_and_config()),
        goes_on=True,
    )
