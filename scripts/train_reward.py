"""
Trains a preference reward: one LoRA adapter per source of preferences, and a router that tells the sources apart by
the prompt alone. `trl_proxy.rewards.preference.PreferenceReward.from_pretrained` loads what this writes.

The embedded reward, on a CPU (about 20 minutes on one core that multiplies bfloat16 natively; leave out --bf16 on
another):

    python scripts/train_reward.py \
        --sources harmless=hh_harmless.jsonl helpful=hh_helpful.jsonl \
        --router_prompts harmless=trl_proxy/data/prompts.jsonl:harm_adjacent \
            helpful=trl_proxy/data/prompts.jsonl:everyday \
        --output_dir trl_proxy/data/reward --use_cpu --bf16 --seed 0

The same from the hub, with another base model, on a GPU:

    python scripts/train_reward.py \
        --sources harmless=Anthropic/hh-rlhf:harmless-base helpful=Anthropic/hh-rlhf:helpful-base \
        --model_name_or_path Qwen/Qwen3-0.6B --max_length 1024 --learning_rate 1e-4 --bf16 --output_dir reward-qwen

A source is `name=path` or `name=hub-id[:data_dir]`, with the columns `prompt`, `chosen`, `rejected` (plain or
conversational), or with `chosen` and `rejected` alone as dialogues in the format of HH-RLHF.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.preference_accuracy import train_reward
from trl_proxy.rewards.training import RewardTrainingArguments, ScriptArguments
from trl_proxy.runs.parsing import RecipeParser
from trl_proxy.runs.process import run_script


def parser() -> RecipeParser:
    return RecipeParser((ScriptArguments, RewardTrainingArguments))


if __name__ == "__main__":
    run_script("train_reward", lambda: train_reward(*parser().parse_args_and_config()))
