"""`trl-proxy`, also as `python -m trl_proxy`: trains a proxy, asks a model, prints what a bug report needs.

trl-proxy train --config recipe.yaml
accelerate launch -m trl_proxy train --config recipe.yaml    # on several devices
trl-proxy generate --proxy outputs/proxy "How are you?"
trl-proxy env
"""

import platform
import sys

import torch

from . import __version__
from .devices import has_bfloat16
from .embedded.lm import LM_PACKAGE
from .rewards.preference import ENCODER_PACKAGE
from .runs.process import installed_version, run_script

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", LM_PACKAGE)


def describe_device() -> str:
    """The accelerator, or the CPU, that torch would use."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    bfloat16 = "with" if has_bfloat16("cpu") else "without"
    return f"CPU, {torch.get_num_threads()} threads, {bfloat16} bfloat16"


def env() -> None:
    """Prints versions and the device, one per line."""
    print(f"trl-proxy {__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in (*PACKAGES, ENCODER_PACKAGE):
        print(f"{name} {installed_version(name) or 'is not installed'}")
    print(f"device: {describe_device()}")


def main() -> None:
    """Runs the command that the first word names; without one, [`env`]."""
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("env", [])
    if command in ("-h", "--help") or command not in ("train", "generate", "env"):
        print(__doc__.strip() + "\n\n`--help` after a command lists its options.")
        if command in ("-h", "--help"):
            return
        raise SystemExit(f"trl-proxy: there is no command {command!r}: it must be train, generate or env.")
    sys.argv[0] = f"trl-proxy {command}"  # what `--help` shows
    if command == "train":
        from .runs.train import make_parser, train

        def run():
            return train(*make_parser().parse_args_and_config(arguments))

        run_script(command, run, goes_on=True)
    if command == "generate":
        from .runs.ask import ask
        from .runs.ask import make_parser as make_ask_parser

        run_script(command, lambda: ask(make_ask_parser().parse_args(arguments)))
    env()


if __name__ == "__main__":
    main()
