"""Prompts and completions, plain or conversational: their text, their lengths, and checks against the tokenizer."""

from collections.abc import Sequence

from trl import is_conversational


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


def check_prompt_lengths(
    dataset, tokenizer, lm_config, max_completion_length: int, chat_template_kwargs: dict | None
) -> None:
    """`ValueError` if a prompt of the dataset and its response need more positions than the LM has."""
    limit = getattr(lm_config.get_text_config(), "max_position_embeddings", None)
    if limit is None or dataset is None or isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        return
    room = limit - max_completion_length
    for prompt in dataset["prompt"] if "prompt" in (dataset.column_names or []) else []:
        conversational = is_conversational({"prompt": prompt})
        text = "".join(str(message["content"]) for message in prompt) if conversational else prompt
        # A token has at least one character, and a template adds a few tokens: short prompts need no counting.
        if len(text) + 256 < room:
            continue
        if conversational:
            template = {"add_generation_prompt": True, "return_dict": True, **(chat_template_kwargs or {})}
            length = len(tokenizer.apply_chat_template(prompt, **template)["input_ids"])
        else:
            length = len(tokenizer(text)["input_ids"])
        if length > room:
            raise ValueError(
                f"A prompt has {length} tokens; with max_completion_length={max_completion_length} the LM's "
                f"{limit} positions leave {room}. It begins with {text[:200]!r}."
            )
