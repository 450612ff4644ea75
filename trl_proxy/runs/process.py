"""A script as a process: the lock on its folder, signals, the commands it runs, how it ends."""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from ..devices import is_main_process
from ..files import remove_leftovers
from ..ranks import fail, unwatch

LOCK_FILE = "_lock"  # transformers uploads no file with such a name


def installed_version(package: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_held: dict[str, FileLock] = {}


def lock_folder(output_dir: str | os.PathLike) -> None:
    """Locks the folder until the process ends for any reason, and deletes temporary files that a killed one left.

    Raises:
        ValueError: the folder cannot be written, or another process holds it.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        path = os.path.realpath(os.path.join(output_dir, LOCK_FILE))
        if path not in _held:
            lock = FileLock(path, timeout=0)
            lock.acquire()
            _held[path] = lock
            remove_leftovers(output_dir)
    except Timeout:
        raise ValueError(
            f"Another process is at work in {output_dir}: let it end, or choose another --output_dir."
        ) from None
    except OSError as error:
        raise ValueError(
            f"The folder {output_dir} cannot be written ({error.strerror}): choose another --output_dir."
        ) from error


def wait_until_free(folder: str | os.PathLike, stopped: Callable[[], bool] = lambda: False) -> None:
    """Waits while another process is at work in the folder, such as a training that outlived the command that started
    it. It stops waiting if `stopped()` is True."""
    path = os.path.join(folder, LOCK_FILE)
    lock = FileLock(path, timeout=0)
    while os.path.isfile(path) and not stopped():
        try:
            with lock:
                return
        except Timeout:
            time.sleep(0.2)


def launcher(command: str) -> list[str]:
    """The words of a command that launches a training, such as `accelerate launch`. `accelerate` is always this
    environment's, even if it is not activated.

    Raises:
        ValueError: if it is no command line, or there is no such program.
    """
    try:
        program, *words = shlex.split(command) or [""]
    except ValueError as error:
        raise ValueError(
            f"--launch must be a command line, got {command!r} ({error}): close the quotation."
        ) from error
    if program == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    if shutil.which(program) is None:
        raise ValueError(f"--launch names {program!r}, but no program has that name: give its path.")
    return [program, *words]


def find_file(path: str) -> str:
    """The path as given, or in this checkout if the file exists only there."""
    in_checkout = Path(__file__).parents[2] / path
    return str(in_checkout) if not os.path.exists(path) and in_checkout.is_file() else path


def run_command(command: list[str], stopped: Callable[[], bool] = lambda: False, **kwargs) -> int:
    """Runs a command in a new session. If this process is interrupted, or `stopped()` is True, the command gets
    SIGTERM; a training then saves its checkpoint. `kwargs` are those of `subprocess.Popen`.

    Returns:
        its exit status.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    if stopped():
        raise KeyboardInterrupt
    try:
        process = subprocess.Popen(command, start_new_session=True, **kwargs)
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{command[0]} cannot be run ({error.strerror}): name a program by --launch.") from error
    try:
        while not stopped():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.2)
        raise KeyboardInterrupt
    except BaseException:
        with suppress(ProcessLookupError):
            if sys.platform == "win32":  # it has no groups of processes
                process.terminate()
            else:
                os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def one_sentence(error: BaseException) -> str:
    """The message of a script for an error, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        # What follows in torch's message is about its allocator.
        what = ". ".join(str(error).split(". ")[:2]).removesuffix(".")
        return f"{what}: lower --per_device_train_batch_size or --rollout_batch_size, or load the LM in 4 bit."
    if isinstance(error, OSError) and error.filename and error.strerror:
        sentence = f"{error.filename} could not be read or written ({error.strerror})"
        in_cache = os.path.abspath(str(error.filename)).startswith(os.path.abspath(HF_HOME))
        return f"{sentence}: set HF_HOME to a folder that can be written." if in_cache else f"{sentence}."
    return " ".join(str(error).split())


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM act like Ctrl-C in the process of a script."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class Interrupted(Exception):
    """A signal ended the run; its checkpoint is saved."""

    def __init__(self, signum: int, output_dir: str):
        name = signal.Signals(signum).name
        super().__init__(f"{name} ended the run: its checkpoint is in {output_dir}, and the same command resumes.")
        self.signum = signum


def quieten() -> None:
    """Silences other libraries. Their download bars stay, and in a terminal the bars of `datasets`."""
    hub_bars = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # such as the bar of an LM's 272 weights
    if not hub_bars:
        enable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # these are for the libraries' authors
    if not (sys.stderr.isatty() and is_main_process()):
        datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):  # a console without a character shows `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_script(
    name: str, main: Callable[[], Any], errors: tuple[type[Exception], ...] = (), goes_on: bool = False
) -> NoReturn:
    """Runs `main` as the script `name` and ends the process. An error is printed as one sentence on stderr.

    Args:
        errors: kinds whose message is one sentence, besides `ImportError`, `OSError` and `ValueError`.
        goes_on: whether the same command resumes an interrupted run.
    """
    interrupt_on_sigterm()
    quieten()
    status, message = 0, ""
    failure: BaseException | None = None
    expected: tuple[type[BaseException], ...] = (ImportError, OSError, ValueError, torch.OutOfMemoryError, *errors)
    try:
        kept = main()  # noqa: F841 - keep the trainer alive until exit: DDP's destructor can deadlock
    except expected as error:
        status, message, failure = 1, one_sentence(error), error
    except Interrupted as error:
        status, message, failure = 128 + error.signum, str(error), error
    except KeyboardInterrupt as error:
        status, failure = 130, error
        message = str(error) or ("interrupted; the same command resumes." if goes_on else "interrupted.")
    except Exception as error:
        if not _is_one_of_several():
            raise
        # The error of one process: the others end because of it, and are silent.
        status, failure = 1, error
        message = f"process {os.environ['RANK']} ended by {type(error).__name__}: {one_sentence(error)}"
    if failure is not None:
        if _is_one_of_several():  # a launcher sends it to all once the first has failed
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if fail(failure):
            if not isinstance(failure, (*expected, Interrupted, KeyboardInterrupt)):
                traceback.print_exception(failure)
            print(f"{name}: {message}", file=sys.stderr)
    unwatch()
    _leave(status)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave(status: int) -> NoReturn:
    """Ends the process. One of several processes exits without destructors. DDP has the last reference to a gloo
    process group, whose destructor waits for a thread. Sometimes that thread waits for the interpreter."""
    if _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
