"""Files that are written whole or not at all, checksums that detect damage, and models whose files cannot be read."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHECKSUMS_NAME = "checksums.json"  # of a checkpoint
# In a model's folder: what a training or a comparison wrote beside the model.
BESIDE_A_MODEL = {
    CHECKSUMS_NAME,
    "log.txt",
    "pairs.json",
    "run.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
}


class WriteError(OSError):
    """A file could not be written; earlier files are unchanged."""


def reason_not_written(error: Exception) -> str | None:
    """The operating system's reason why a file was not written; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers are written in Rust, and torch writes its archives in C++.
    if reason := re.search(r"([^:]+) \(os error \d+\)", str(error)):
        return reason[1].strip()
    in_archive = any(part in str(error) for part in ("inline_container", "iostream error"))
    return "torch could not write its file" if in_archive else None


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns the libraries' errors for a full disk or a read-only folder into a [`WriteError`]."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (reason := reason_not_written(error)) is None:
            raise
        raise WriteError(
            f"{os.fspath(path)} could not be written ({reason}): make room or fix the folder, and the same command "
            "resumes from what was saved before."
        ) from error


def temporary_path(path: str | os.PathLike) -> str:
    """A name beside the file that no other process uses: two that write the same file do not meet."""
    return f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Deletes the temporary files that a killed process left in a folder."""
    for path in Path(folder).glob("*.tmp"):
        if re.search(r"\.[0-9a-f]{8}\.tmp$", path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Gives a temporary path to write to. If that succeeds, the file is on the disk and becomes `path` in one step;
    otherwise it is deleted, and `path` stays what it was."""
    temporary = temporary_path(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def flush_to_disk(path: str | os.PathLike) -> None:
    """Waits until a file is on the disk: a machine that loses its power later finds it whole."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one step, so that nobody finds half of it; creates its folders. Raises [`WriteError`]."""
    path = os.fspath(path)
    with writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)


def make_readable(path: str | os.PathLike) -> None:
    """Gives a file, or a folder with its files, the mode that `open` and `mkdir` give: 0666 and 0777 minus the umask.

    safetensors and `tempfile` make files that only their owner can read, so other users could not load them.
    """
    umask = os.umask(0o022)
    os.umask(umask)
    if os.path.isfile(path):
        os.chmod(path, 0o666 & ~umask)
    for folder, _, names in os.walk(os.fspath(path)):
        os.chmod(folder, 0o777 & ~umask)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o666 & ~umask)


def _checksums(folder: str) -> dict[str, str]:
    sums = {}
    for name in sorted(os.listdir(folder)):
        if name != CHECKSUMS_NAME and os.path.isfile(path := os.path.join(folder, name)):
            with open(path, "rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def write_checksums(folder: str) -> None:
    """Writes the SHA-256 of every file in a checkpoint: torch does not notice a flipped bit."""
    write_text(os.path.join(folder, CHECKSUMS_NAME), json.dumps(_checksums(folder), indent=2) + "\n")


def damaged_files(folder: str) -> list[str]:
    """Names of the changed or missing files of a checkpoint; none if the checkpoint has no checksums."""
    path = os.path.join(folder, CHECKSUMS_NAME)
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            written = json.load(file)
        found = _checksums(folder)
        return [name for name, digest in written.items() if found.get(name) != digest]
    except (AttributeError, ValueError):
        return [CHECKSUMS_NAME]


@contextmanager
def loading_model(name: str | os.PathLike, kind: str = "language model", remedy: str | None = None) -> Iterator[None]:
    """Turns whatever fails while a model, its adapter or its tokenizer is loaded into one sentence.

    The JSON files of a folder are read before: transformers passes over a damaged `generation_config.json`, and the
    LM would lose its penalties and EOS tokens.

    Args:
        name: as the user gave it: a folder or a hub id.
        kind: what is loaded.
        remedy: what to do if no file is known to be damaged.

    Raises:
        ValueError: with the model's name, the file if it is known, and what to do.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"The folder {name} holds no {kind}: it has no config.json.")
        _check_files(name, kind, ".json")
    elif os.path.exists(name) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"The {kind} {name} is neither a folder nor a model id of the hub: there is no such folder.")
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # every library has its own kinds
        if "OutOfMemory" in type(error).__name__:
            raise
        if os.path.isdir(name):
            _check_files(name, kind, ".safetensors")
        is_missing = isinstance(error, OSError)  # as transformers says that the hub has no such model, or is away
        text = str(error).strip().split("\n")[0] if is_missing else " ".join(str(error).split())
        reason = text.rstrip(".:") or type(error).__name__
        if remedy is None and is_missing:
            remedy = "there is no such folder here, and a name must be one that the hub knows and lets you read"
            if os.path.isdir(name):
                remedy = "mend the folder, or copy it again"
        advice = f": {remedy}." if remedy else "."
        raise ValueError(f"The {kind} {name} cannot be loaded ({reason}){advice}") from error


def _check_files(folder: str, kind: str, ending: str) -> None:
    """`ValueError` naming the first file of a model that is damaged."""
    for name in sorted(os.listdir(folder)):
        if not name.endswith(ending) or name in BESIDE_A_MODEL:
            continue
        path = os.path.join(folder, name)
        try:
            if ending == ".json":
                with open(path, encoding="utf-8") as file:
                    if not isinstance(json.load(file), dict) and name.endswith("config.json"):
                        raise ValueError("no JSON object")
            else:
                from safetensors import safe_open  # here: `core` needs torch alone

                with safe_open(path, framework="pt"):
                    pass
        except Exception as error:  # safetensors' own is no ValueError
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The {kind} {folder} cannot be loaded: {path} is damaged ({reason}), copy it again."
            ) from None
