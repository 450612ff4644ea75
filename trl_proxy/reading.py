"""One way to read a dataset: a file, a folder, or a name on the hub, with configurations, splits and slices as in
`datasets`; and preference data in any of TRL's formats or that of HH-RLHF."""

import glob
import hashlib
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import fsspec
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from transformers.utils import logging

from .devices import is_main_process
from .prompts import bad_row, messages_flaw, prompt_flaw, to_text

logger = logging.get_logger(__name__)
_BUILDERS: dict[str, tuple[str, dict]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_PACKED = (".gz", ".bz2", ".xz")  # of text formats; parquet and arrow have compression of their own
_LEFT_OUT = "left_out"  # a column of our own, while pairs are read
_OTHER_FORMAT = ("of another format than its prompt", "give all as text or all as messages")
_ON_DISK = ("dataset_dict.json", "state.json")  # of `DatasetDict.save_to_disk` and `Dataset.save_to_disk`


class UnknownSplit(ValueError):
    """A dataset has no split of that name."""


def read_dataset(
    name: str,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
) -> Dataset:
    """
    The rows of a split, as they are.

    Args:
        name: a file (.json, .jsonl, .csv, .tsv, .parquet or .arrow; text also packed as .gz, .bz2 or .xz), a folder
            of such files or of `save_to_disk`, or a dataset of the hub. What exists here is not looked for there.
        split: splits and their slices, such as `train[:90%]` or `train+test[:100]`. A file has the split `train`.
        config: the configuration, of a folder or a dataset of the hub.
        revision, data_dir: as for `datasets.load_dataset`.

    Raises:
        ValueError: there is no such dataset, configuration or split, it has no rows, or it is damaged; one sentence.
        OSError: the system's reason why a file cannot be read, or the cache not written.
    """
    return select_split(_read_splits(name, config, revision, data_dir), split, name)


def select_split(splits: dict[str, Dataset], split: str, name: str) -> Dataset:
    """The rows of a split, slice or sum of them. Raises `ValueError` if there are none, [`UnknownSplit`] if there is
    no such split."""
    if split == "all":
        split = "+".join(splits)
    try:
        instruction = ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({key: len(part) for key, part in splits.items()})
    except ValueError as error:
        if "Unknown split" in str(error):
            raise UnknownSplit(
                f"The dataset {name} has no split {split!r}, only {', '.join(splits)}: name one of them, or a part of "
                f"one, such as '{next(iter(splits))}[:90%]'."
            ) from None
        raise ValueError(
            f"The split {split!r} of the dataset {name} cannot be read ({_reason(error)}): write splits and slices as "
            "in train, train[:90%] or train[:100]+test."
        ) from None
    chosen = [splits[p.splitname].select(range(p.from_, p.to)) for p in parts if p.from_ < p.to]
    if not chosen:
        sizes = ", ".join(f"{key} has {len(part)}" for key, part in splits.items())
        raise ValueError(f"The dataset {name} ({split}) is empty: {sizes} rows.")
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _read_splits(name: str, config: str | None, revision: str | None, data_dir: str | None) -> dict[str, Dataset]:
    path = os.path.expanduser(name)
    known = _builder(path)
    arguments: dict[str, Any] = {"path": path, "name": config, "revision": revision, "data_dir": data_dir}
    saved = any(os.path.isfile(os.path.join(path, file)) for file in _ON_DISK)
    if config and (saved or os.path.isfile(path)):
        raise ValueError(f"The dataset {name} has no configurations: leave --dataset_config {config} out.")
    if os.path.isfile(path):
        if known is None:
            raise ValueError(
                f"The file {name} is of no known format: give {', '.join(_BUILDERS)}, or packed text such as "
                'prompts.jsonl.gz, with a line such as {"prompt": "Hello"} for each prompt.'
            )
        if os.path.getsize(path) == 0:
            raise ValueError(f"The dataset {name} is empty: the file has 0 bytes.")
        arguments = {"path": known[0], "data_files": glob.escape(path), **known[1]}
    elif os.path.isdir(path):
        # `datasets` would give the old rows of a changed file if the folder's README names its configurations.
        arguments["cache_dir"] = os.path.join(datasets.config.HF_DATASETS_CACHE, f"folder-{_state(path)}")
    elif known or path.count("/") > 1 or path.startswith((".", "/")):
        raise ValueError(f"There is no dataset file {name}.")
    with _one_sentence(name, path):
        found = load_from_disk(path) if saved else load_dataset(**arguments)
        splits = dict(found) if isinstance(found, DatasetDict) else {"train": found}
        for dataset in splits.values():
            dataset.data.validate(full=True)  # JSON that is not UTF-8 is only noticed when a row is used
    return splits


def _state(folder: str) -> str:
    """A hash of the names, sizes and times of a folder's files, without hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(path):  # not a broken link
                status = os.stat(path)
                found.append((os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _builder(path: str) -> tuple[str, dict] | None:
    """The reader of a file by its ending, and its options; None for an unknown ending."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending in _PACKED
    found = _BUILDERS.get(os.path.splitext(stem)[1] if packed else ending)
    return None if found is None or (packed and found[0] not in ("json", "csv")) else found


@contextmanager
def _one_sentence(name: str, path: str) -> Iterator[None]:
    """Turns what `datasets` raises and logs for a dataset that it cannot read into one sentence."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:  # the library of every format has its own kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno and cause.filename:
            raise cause from None  # a full disk, or a file that may not be read
        reason = _reason(cause)
        if os.path.isfile(path):
            line = _damaged_line(path)
            reason, remedy = f"line {line}: {reason}" if line else reason, "mend the file"
        elif "config" in reason.lower():
            remedy = "choose one by --dataset_config"
        elif os.path.isdir(path):
            remedy = "mend the folder, or name one of its files"
        else:
            remedy = (
                "there is no such file or folder here, and a name must be one that the hub knows and lets you read"
            )
        raise ValueError(f"The dataset {name} could not be read ({reason}): {remedy}.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    """An error of a library in one line, without its example of a call."""
    text = " ".join(str(error).partition("Example of usage")[0].split()).rstrip(".!")
    return text or type(error).__name__


def _damaged_line(path: str) -> int | None:
    """The first line that is no text in UTF-8 or, of a JSON file, no JSON; None if every line is, or none can be."""
    is_json = (_builder(path) or ("",))[0] == "json"
    number = 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                text = line.decode()
                if is_json and text.strip():
                    try:
                        json.loads(text)
                    except json.JSONDecodeError as error:
                        # An object over several lines has a first line that is cut off, not wrong.
                        if number == 1 and error.pos >= len(text.rstrip()):
                            return _damaged_document(text, file)
                        return number
    except UnicodeDecodeError:
        return number
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        return number + 1 if number else None  # the packed file ends there
    return None


def _damaged_document(start: str, file) -> int | None:
    """The line at which JSON over several lines is damaged."""
    try:
        json.loads(start + file.read().decode())
    except json.JSONDecodeError as error:
        return error.lineno
    return None


# Preference data


def with_prompts(dataset: Dataset, where: str) -> Dataset:
    """
    Preference data in TRL's explicit format, `prompt`, `chosen` and `rejected`; any other dataset as it is.

    Prompts that stand only in the responses become the column `prompt`, as messages: of two conversations (also if a
    plain `prompt` repeats their beginning), and of two dialogues of HH-RLHF, `\\n\\nHuman: ...\\n\\nAssistant: ...`.
    Pairs whose sides answer different prompts, or which do not end with an answer, are left out, and counted.

    Raises:
        ValueError: a row is of no such format; it is named.
    """
    columns = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    if "chosen" not in columns:
        return dataset
    if "prompt" in columns and not isinstance(dataset.select_columns("chosen")[0]["chosen"], list):
        return dataset
    dataset = dataset.map(
        _explicit,
        batched=True,
        with_indices=True,
        fn_kwargs={"columns": columns, "where": where},
        keep_in_memory=True,
        desc="Prompts of preferences",
    )
    return leave_out(dataset, dataset[_LEFT_OUT][:], where).remove_columns(_LEFT_OUT)


def check_pairs(dataset: Dataset, where: str) -> Dataset:
    """
    The three columns of preference data, without the pairs that prefer nothing: those are counted in a warning.

    Raises:
        ValueError: a column is missing, a response has another format than its prompt, or no pair is left.
    """
    columns = ("prompt", "chosen", "rejected")
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"The dataset {where} has no column {', '.join(missing)}: a pair needs {', '.join(columns)}.")
    dataset = dataset.select_columns(list(columns))
    useless: list[str | None] = []
    for batch in dataset.iter(1000):
        for prompt, *sides in zip(*(batch[column] for column in columns), strict=True):
            for column, response in zip(columns[1:], sides, strict=True):
                flaw = messages_flaw(response)
                if flaw is None and isinstance(response, str) != isinstance(prompt, str):
                    flaw = _OTHER_FORMAT
                if flaw is not None:
                    raise bad_row(len(useless), where, flaw, response, column)
            same = "the two responses are the same" if sides[0] == sides[1] else None
            answered = all(to_text(response, "assistant").strip() for response in sides)
            useless.append(same if answered else "a response is empty")
    return leave_out(dataset, useless, where)


def leave_out(dataset: Dataset, reasons: Sequence[str | None], where: str) -> Dataset:
    """The rows without a reason to leave them out. A warning counts the others; `ValueError` if none is left."""
    counts = Counter(reason for reason in reasons if reason is not None)
    if not counts:
        return dataset
    why = ", ".join(f"{count} because {reason}" for reason, count in counts.most_common())
    sentence = f"{counts.total()} of the {len(reasons)} rows of {where} are left out: {why}"
    if counts.total() == len(reasons):
        raise ValueError(f"{sentence}, and none is left, so mend the dataset.")
    if is_main_process():
        logger.warning(f"{sentence}.")
    return dataset.select([row for row, reason in enumerate(reasons) if reason is None])


class _Incomplete(Exception):
    """A pair that is of the right format and cannot be used."""


def _explicit(batch: dict[str, list], rows: list[int], columns: list[str], where: str) -> dict[str, list]:
    """The rows of a batch in the explicit format, and why some are left out."""
    result: dict[str, list] = {name: [] for name in dict.fromkeys(["prompt", *columns, _LEFT_OUT])}
    for row, *values in zip(rows, *(batch[name] for name in columns), strict=True):
        given = dict(zip(columns, values))
        try:
            explicit = _split_pair(row, given, where)
        except _Incomplete as reason:
            explicit = {_LEFT_OUT: str(reason)}
        for name, column in result.items():
            column.append(explicit.get(name))
    return result


def _split_pair(row: int, given: dict[str, Any], where: str) -> dict[str, Any]:
    """One row in the explicit format."""
    sides = {name: value for name, value in given.items() if name != "prompt"}
    for name, value in sides.items():
        if flaw := messages_flaw(value):
            raise bad_row(row, where, flaw, value, name)
        if isinstance(value, str):
            if "prompt" in given:
                raise bad_row(row, where, _OTHER_FORMAT, value, name)
            sides[name] = _dialogue(row, where, name, value)
    if "prompt" in given:
        prompt = given["prompt"]
        if flaw := prompt_flaw(prompt):
            raise bad_row(row, where, flaw, prompt)
        if isinstance(prompt, list):
            repeated = all(len(value) > len(prompt) and value[: len(prompt)] == prompt for value in sides.values())
            return {"prompt": prompt, **({k: v[len(prompt) :] for k, v in sides.items()} if repeated else sides)}
        if not all(any(_says(message, prompt) for message in value[:-1]) for value in sides.values()):
            flaw = "that is plain text, and the responses are conversations without it", "give both as messages"
            raise bad_row(row, where, flaw, prompt)
    if any(value[-1]["role"] != "assistant" or len(value) == 1 for value in sides.values()):
        raise _Incomplete("a side does not end with an answer to a prompt")
    prompts = [value[:-1] for value in sides.values()]
    if any(prompt != prompts[0] for prompt in prompts):
        raise _Incomplete("the two sides answer different prompts")
    if flaw := prompt_flaw(prompts[0]):
        raise bad_row(row, where, flaw, prompts[0])
    return {"prompt": prompts[0], **{name: value[-1:] for name, value in sides.items()}}


def _says(message: dict, text: str) -> bool:
    return message["role"] == "user" and str(message["content"]).strip() == text.strip()


def _dialogue(row: int, where: str, column: str, text: str) -> list[dict[str, str]]:
    """The messages of HH-RLHF's text."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before.strip() or not turns:
        flaw = "that is no dialogue", r"add a column `prompt`, or write '\n\nHuman: ...\n\nAssistant: ...'"
        raise bad_row(row, where, flaw, text, column)
    speakers = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": speakers[name], "content": said.strip()} for name, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(messages)):
        raise _Incomplete("the turns of Human and Assistant do not alternate")
    if any(not message["content"] for message in messages[:-1]):
        raise _Incomplete("a turn before the answer is empty")
    return messages
