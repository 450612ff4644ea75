"""Train a baseline on the prompts and rewards of the proxy: the language model itself, by LoRA unless told otherwise.

On a bare machine (embedded LM, reward and prompts, 2 CPU cores):

    accelerate launch scripts/train_baseline.py --method ppo --config scripts/recipes/ppo_smollm2_cpu.yaml

The flags are those of TRL's configurations: PPOConfig of this project (ppo), DPOConfig, RLOOConfig or GRPOConfig, and
its ModelConfig. `--help` after `--method` lists them. The same command resumes an interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import importlib

from baselines.training import BASELINES, make_parser, method_of
from trl_proxy.runs.process import run_script


def parse(arguments: list[str]):
    """The method's module and its configurations."""
    arguments = list(arguments)
    method = None
    if "--method" in arguments[:-1]:
        i = arguments.index("--method")
        method = method_of(arguments[i + 1])
        del arguments[i : i + 2]
    if method not in BASELINES:
        raise ValueError(f"--method must be one of {', '.join(BASELINES)}, got {method}.")
    return importlib.import_module(f"baselines.{method}"), make_parser(method).parse_args_and_config(arguments)


def main(arguments: list[str]):
    """Trains, and returns the trainer."""
    module, configs = parse(arguments)
    return module.train(*configs)


if __name__ == "__main__":
    run_script("train_baseline", lambda: main(sys.argv[1:]), goes_on=True)
