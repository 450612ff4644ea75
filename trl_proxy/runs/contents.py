"""What the names in a run's settings stand for: checksums of files, commits of the hub."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from ..core.config import CONFIG_NAME, WEIGHTS_NAME
from ..files import BESIDE_A_MODEL
from ..loading import EMBEDDED
from ..rewards.checks import TRL_REWARDS

# A setting whose value is a name: of a model, an adapter, a proxy, a dataset, a template, a reward function.
_NAMING = re.compile(r"(?<!base_model_name_or)_path$|^dataset_name$|^reward_funcs$")
_DATASET = "dataset_name"
_BLOCK, _BLOCKS = 1 << 20, 64
_OF_A_MODEL = (".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt")


def named(settings: dict) -> Iterator[tuple[str, list[str]]]:
    """The settings whose values are names, and those names."""
    for key, value in settings.items():
        if _NAMING.search(key) and value:
            yield key, list(map(str, value)) if isinstance(value, list) else [str(value)]


def contents_of(settings: dict) -> dict[str, list[str]]:
    """Checksums of what the settings name, by setting, one for each name: of the files of a model, a dataset or a
    template, of a reward function's source, or the commit of a hub repository. A setting is left out if one of its
    names is unknown here, and so are the embedded defaults, which belong to the version of the code."""
    found = {key: [_content(name, key, settings) for name in names] for key, names in named(settings)}
    return {key: [x for x in sums if x is not None] for key, sums in found.items() if None not in sums}


def _content(name: str, key: str, settings: dict) -> str | None:
    if name == EMBEDDED or name.startswith(EMBEDDED + ":"):
        return None
    if os.path.exists(name):
        return _digest(dict(_files(Path(name), key)))
    if "reward" in key and (source := _source(name)):
        return f"{name} {_digest({'': source})}"
    revision = settings.get("model_revision") if key == "model_name_or_path" else None
    return _commit(name, "dataset" if key == _DATASET else "model", revision or "main")


def _files(path: Path, key: str) -> Iterator[tuple[str, Path]]:
    """The files that count, by their names in the folder."""
    if path.is_file():
        yield "", path
    elif key == _DATASET:
        for file in path.rglob("*"):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                yield str(name), file
    elif (path / CONFIG_NAME).is_file():
        yield from ((name, path / name) for name in (CONFIG_NAME, WEIGHTS_NAME) if (path / name).is_file())
    else:
        for file in path.iterdir():
            if file.is_file() and file.suffix in _OF_A_MODEL and file.name not in BESIDE_A_MODEL:
                yield file.name, file
        with suppress(OSError, ValueError, KeyError):  # an adapter's LM
            base = Path(json.loads((path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
            if base.is_dir() and base.resolve() != path.resolve():
                yield from ((f"base/{name}", file) for name, file in _files(base, key))


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        found = path.stat()
        digest.update(f"{name}\0{_file_digest(str(path.resolve()), found.st_size, found.st_mtime_ns)}\0".encode())
    return digest.hexdigest()


@functools.cache
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """Checksum of a file; of a large one, of its size and of 64 MiB in blocks spread evenly over it."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _source(name: str) -> Path | None:
    """The source file of a reward function, by its dotted name; None for those that belong to a package's version."""
    parts = name.split(".")
    if name in TRL_REWARDS or parts[0] in ("trl", "trl_proxy"):
        return None
    if os.getcwd() not in sys.path:  # as `import_reward` does
        sys.path.insert(0, os.getcwd())
    for n in range(len(parts) - 1, 0, -1):
        with suppress(Exception, SystemExit):  # `import_reward` will say what is wrong
            spec = importlib.util.find_spec(".".join(parts[:n]))
            if spec is not None and spec.origin is not None and os.path.isfile(spec.origin):
                return Path(spec.origin)
    return None


@functools.cache
def _commit(name: str, kind: str, revision: str) -> str | None:
    """The commit of a hub repository, None if it is not known."""
    with suppress(Exception):  # no network, no such repository: whoever loads it will say so
        if commit := HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha:
            return commit
    with suppress(OSError, ValueError):  # a path that is not there is no name of the hub
        cached = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "refs", revision)
        return cached.read_text(encoding="utf-8").strip() or None
    return None
