"""`accelerate launch` that ends with what the training said: no traceback of the launcher follows it.

    python scripts/launch.py --config_file scripts/accelerate_configs/cpu.yaml scripts/train_proxy.py \\
        --config scripts/recipes/smollm2_cpu.yaml
"""

import logging
import signal
import sys

import torch.distributed.run  # noqa: F401 - all of its loggers
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Launches by the command line; returns the exit status."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"launch: process {rank} was ended by {name}; the same command resumes.", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
