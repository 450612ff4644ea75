"""Prompts and completions, plain or conversational: their text and lengths, and checks of a dataset's every row."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset
from trl import is_conversational

# Columns that often hold the prompts under another name, the likeliest first.
_QUESTIONS = ("prompts", "question", "instruction", "query", "problem", "input", "text", "user")
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_FILL_IN = "fill it in, or remove the row"
_TYPES = {bool: "a truth value", int: "a number", float: "a number", dict: "a mapping", bytes: "bytes", str: "text"}
Flaw = tuple[str, str]  # what is wrong, to follow "a prompt", and the remedy


def to_text(messages: str | Sequence[dict], role: str) -> str:
    """
    Text of one prompt (`role="user"`) or completion (`role="assistant"`).

    A string is returned unchanged. For a list of messages, the contents of that role are joined by newlines.

    Raises:
        ValueError: neither a string nor a list of messages with a role and a content.
    """
    if isinstance(messages, str):
        return messages
    try:
        contents = [message["content"] for message in messages if message["role"] == role]
    except (TypeError, KeyError):
        raise ValueError(
            f"A prompt or completion must be a string or a list of messages with 'role' and 'content', got "
            f"{repr(messages)[:200]}."
        ) from None
    # Multimodal templates hold a list of parts in place of the string; the reward reads the text parts
    parts = [[{"type": "text", "text": c}] if isinstance(c, str) else (c or []) for c in contents]
    return "\n".join(part["text"] for content in parts for part in content if part.get("type") == "text")


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of `lengths`, longest first, in batches of at most `batch_size` with little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def check_chat_template(prompt: str | list[dict], tokenizer) -> None:
    """`ValueError` if the prompt is a conversation and the tokenizer has no chat template."""
    if is_conversational({"prompt": prompt}) and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts are conversations and the tokenizer of {tokenizer.name_or_path or 'the LM'} has no chat "
            "template: set `chat_template` in its files, or give the prompts as plain text."
        )


# One row


def messages_flaw(value: Any) -> Flaw | None:
    """What keeps a value from being text or a list of messages, in TRL's formats; None if nothing does."""
    if isinstance(value, str):
        if re.match(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""", value):
            return "that is a conversation written as text", "store it as a list of messages, in .jsonl or .parquet"
        return None
    if value is None:
        return "that is null", _FILL_IN
    if not isinstance(value, list):
        return f"that is {_kind(value)}", "give text, or a list of messages with `role` and `content`"
    if not value:
        return "without messages", _FILL_IN
    for number, message in enumerate(value, 1):
        if flaw := _message_flaw(message):
            return f"whose message {number} {flaw[0]}", flaw[1]
    return None


def prompt_flaw(value: Any) -> Flaw | None:
    """What keeps a value from being a prompt that can be answered; None if nothing does."""
    if flaw := messages_flaw(value):
        return flaw
    if isinstance(value, str):
        return None if value.strip() else ("that is empty", _FILL_IN)
    for number, message in enumerate(value, 1):
        if message["role"] == "user" and not to_text([message], "user").strip():
            return f"whose message {number} (user) is empty", _FILL_IN
    if value[-1]["role"] == "assistant":
        return "that ends with the assistant's turn", "end it with the turn that is to be answered"
    return None


def _message_flaw(message: Any) -> Flaw | None:
    if not isinstance(message, dict):
        return f"is {_kind(message)}", "give messages with `role` and `content`, one conversation a row"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        if message.get("from") is not None:
            return "has no role", "rename `from` to `role` and `value` to `content`"
        return "has no role", "name who speaks: system, user or assistant"
    if content is None:
        # The message of an assistant that calls a tool
        return None if message.get("tool_calls") else ("has no content", _FILL_IN)
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"has a content that is {_kind(content)}", "write it as text"
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            return f"has a part of type {kind}", "the LM reads text alone, so leave other parts out"
        if not isinstance(part.get("text"), str):
            return "has a part without text", _FILL_IN
    return None if content else ("has no content", _FILL_IN)


def _kind(value: Any) -> str:
    """A value's type in plain words."""
    if isinstance(value, list):
        return f"a list of {_TYPES.get(type(value[0]), type(value[0]).__name__)}" if value else "an empty list"
    return _TYPES.get(type(value), f"of type {type(value).__name__}")


def bad_row(row: int, where: str, flaw: Flaw, value: Any, column: str = "prompt") -> ValueError:
    """The error for a row, counted from 0; its sentence counts from 1, as the lines of a file."""
    return ValueError(f"Row {row + 1} of {where} has a {column} {flaw[0]} ({repr(value)[:200]}): {flaw[1]}.")


# Every row


def check_dataset(dataset: Any, where: str) -> None:
    """
    Checks that every row has a prompt that can be answered. What has no length (a stream) is not read.

    Args:
        dataset: a dataset, a dict of datasets, or None.
        where: its name for the messages, such as `prompts.jsonl (train)`.

    Raises:
        ValueError: no `prompt` column, no rows, or a row that holds no prompt; the first one is named.
    """
    for name, part in _parts(dataset, where):
        if part.column_names is not None:
            _check_columns(part.column_names, name)
        if not isinstance(part, Dataset):
            continue
        if len(part) == 0:
            raise ValueError(f"The dataset {name} is empty.")
        first = None
        for start, prompts in _batches(part):
            for row, prompt in enumerate(prompts, start):
                if flaw := prompt_flaw(prompt):
                    raise bad_row(row, name, flaw, prompt)
                first = first or type(prompt)
                if type(prompt) is not first:
                    kinds = "a conversation", "plain text"
                    here, there = kinds if first is str else kinds[::-1]
                    flaw = f"that is {here} where row 1 has {there}", "give all rows one format"
                    raise bad_row(row, name, flaw, prompt)


def check_prompts(
    dataset: Any,
    where: str,
    render: Callable[[list], list[list[int]]],
    positions: int | None = None,
    max_new_tokens: int = 0,
) -> None:
    """
    Renders every prompt, so that a chat template or tokenizer that refuses one does so before work starts.

    Args:
        dataset, where: as for [`check_dataset`], which has passed.
        render: token ids of every prompt, unpadded.
        positions: how many tokens the LM can read, if it has a limit.
        max_new_tokens: how many of them the response may take.

    Raises:
        ValueError: a prompt that cannot be rendered, has no tokens, or is too long; the first one is named.
    """
    for name, part in _parts(dataset, where):
        for start, prompts in _batches(part) if isinstance(part, Dataset) else ():
            for row, ids in enumerate(_rendered(prompts, start, name, render), start):
                prompt = prompts[row - start]
                if len(ids) == 0:
                    raise bad_row(row, name, ("without tokens", _FILL_IN), prompt)
                if positions is not None and len(ids) + max_new_tokens > positions:
                    flaw = (
                        f"of {len(ids)} tokens, which with up to {max_new_tokens} of the response need more than the "
                        f"LM's {positions} positions"
                    )
                    raise bad_row(row, name, (flaw, "shorten it, or let responses be shorter"), prompt)


def positions_of(config) -> int | None:
    """How many tokens an LM can read, by its configuration; None if that names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # XLNet has -1


def check_room(width: int, new_tokens: int, positions: int | None) -> None:
    """`ValueError` if prompts of this width in tokens and their responses need more positions than the LM has."""
    if positions is not None and width + new_tokens > positions:
        raise ValueError(
            f"Prompt and response need {width + new_tokens} positions ({width} + {new_tokens}), the LM has "
            f"{positions}: shorten the prompts or `max_new_tokens`."
        )


def _rendered(prompts: list, start: int, where: str, render: Callable) -> list[list[int]]:
    try:
        return render(prompts)
    except Exception as in_batch:  # templates and tokenizers raise errors of all kinds
        error = in_batch
    for row, prompt in enumerate(prompts, start):
        try:
            render([prompt])
        except Exception as of_row:
            flaw = f"that the chat template or tokenizer refuses, saying {_one_line(of_row)!r}"
            raise bad_row(row, where, (flaw, "mend the row, or take another template"), prompt) from of_row
    raise ValueError(
        f"The prompts {start + 1} to {start + len(prompts)} of {where} cannot be rendered ({_one_line(error)})."
    ) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")[:200]


def _parts(dataset: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The datasets of a dict of datasets, each with its name; nothing for None."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            yield f"{where}[{key!r}]", part
    elif dataset is not None:
        yield where, dataset


def _batches(dataset: Dataset, size: int = 1000) -> Iterator[tuple[int, list]]:
    """The prompts in lists, each with the number of its first row. The other columns are not read."""
    # Without tensors and arrays; a user's own transform stays.
    column = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
    for number, batch in enumerate(column.select_columns("prompt").iter(size)):
        yield number * size, batch["prompt"]


def _check_columns(columns: list[str], where: str) -> None:
    if pictures := [name for name in ("image", "images") if name in columns]:
        raise ValueError(
            f"The dataset {where} has a column `{pictures[0]}`, which TRL's trainers read as pictures, and the LM "
            "reads text alone: remove or rename it."
        )
    if "prompt" in columns:
        return
    given = {name.strip().lower(): name for name in columns}
    remedy = "rename the one that holds the prompts"
    if found := next((given[name] for name in ("prompt", *_QUESTIONS) if name in given), None):
        remedy = f"rename `{found}` to `prompt`"
    elif found := next((given[name] for name in _CONVERSATIONS if name in given), None):
        remedy = f"make `prompt` from `{found}`, without the assistant's turn at the end"
    raise ValueError(f"The dataset {where} has no `prompt` column, only {', '.join(columns) or 'none'}: {remedy}.")
