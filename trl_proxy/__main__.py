"""`python -m trl_proxy`: what a bug report needs to say of this environment."""

import platform

import torch

from . import __version__
from .devices import has_bfloat16
from .embedded.lm import LM_PACKAGE
from .rewards import ENCODER_PACKAGE
from .runs import installed_version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", LM_PACKAGE)


def describe_device() -> str:
    """The accelerator, or the CPU, that torch would use."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    bfloat16 = "with" if has_bfloat16("cpu") else "without"
    return f"CPU, {torch.get_num_threads()} threads, {bfloat16} bfloat16"


def main() -> None:
    """Prints versions and the device, a line each."""
    print(f"trl-proxy {__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in (*PACKAGES, ENCODER_PACKAGE):
        print(f"{name} {installed_version(name) or 'is not installed'}")
    print(f"device: {describe_device()}")


if __name__ == "__main__":
    main()
