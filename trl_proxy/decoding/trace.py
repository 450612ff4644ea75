"""Every proposal of a response, accepted or rejected, as text."""

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..core.rollout import Rollout


class TracedToken(NamedTuple):
    """A token of a response with the candidates that were rejected before it, as in Figure 1 of the paper.

    `asked` is False if the token was taken without a decision, as the last candidate of its position.
    """

    token_id: int
    rejected: list[int]
    asked: bool


def trace(rollout: Rollout, responses: list[list[int]]) -> list[list[TracedToken]]:
    """The proposals for every token of the responses (token ids without padding), one list per row."""
    traced = []
    columns = (x.tolist() for x in (rollout.positions, rollout.token_ids, rollout.accept, rollout.mask))
    for response, *decisions in zip(responses, *columns, strict=True):
        tokens = [TracedToken(token, [], False) for token in response]
        for position, candidate, accept, is_decision in zip(*decisions, strict=True):
            if is_decision and position < len(tokens):
                if accept:
                    tokens[position] = tokens[position]._replace(asked=True)
                else:
                    tokens[position].rejected.append(candidate)
        traced.append(tokens)
    return traced


# A character has four bytes at most, and so four tokens.
MAX_TOKENS_PER_CHARACTER = 4
# Pieces of text that are decoded again before a token. A tokenizer needs one of them to tell whether a space is before
# the token, and two to clean up `do n ' t`; two more may be empty.
CONTEXT_PIECES = 4
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def trace_texts(tokens: Sequence[TracedToken], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[str]]]:
    """The text of each token of a response, and the texts of the candidates rejected before it.

    The text of a single token is uncertain: a tokenizer may drop its space, or split a character into several tokens.
    So each token is decoded after the few tokens before it. Special tokens are texts too.

    Returns:
        one pair `(text, rejected texts)` per token. The texts of the tokens, joined, equal `tokenizer.decode` of the
        whole response. A token that leaves a character incomplete has the text "". The token that completes the
        character has all of it. A rejected text is what the candidate adds to the tokens before it. Bytes of an
        incomplete character read `<0xF0 0x9F>` there. A candidate that adds no text is shown by its name in the
        vocabulary.
    """
    ids = [token.token_id for token in tokens]
    whole = tokenizer.decode(ids)
    texts = []
    written = 0  # characters of `whole`
    # Token counts at which `whole` was cut into pieces, the latest last.
    cuts = deque([0], maxlen=CONTEXT_PIECES + 1)
    for i, token in enumerate(tokens):
        # A character cannot take this long: invalid bytes changed how the bytes before them read. Only the text from
        # the start of the response is certain then.
        start = cuts[0] if i - cuts[-1] < MAX_TOKENS_PER_CHARACTER else 0
        read = tokenizer.decode(ids[start : cuts[-1]]) if start else whole[:written]
        before = tokenizer.decode(ids[start:i])
        rejected = [_rejected_text(candidate, ids[start:i], read, before, tokenizer) for candidate in token.rejected]
        after = tokenizer.decode(ids[start : i + 1])
        text = ""
        if i + 1 == len(tokens):
            text = whole[written:]
        elif after.startswith(read) and whole.startswith(after[len(read) :], written):
            text = after[len(read) :]
            cuts.append(i + 1)
        written += len(text)
        texts.append((text, rejected))
    return texts


def _rejected_text(candidate: int, ids: list[int], read: str, before: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the candidate adds to the tokens `ids`; `before` is their text, `read` the whole characters of it."""
    after = tokenizer.decode([*ids, candidate])
    text = _added(after, read)
    if not text or REPLACEMENT in text:  # a character is incomplete: the candidate's, or one before it
        raw = _token_bytes(candidate, tokenizer)
        text = _added(after, before) if raw is None else _with_hexadecimal(raw)
    return text or tokenizer.convert_ids_to_tokens(candidate) or ""  # an LM may have more ids than its tokenizer


def _added(text: str, beginning: str) -> str:
    """The text after what it has in common with `beginning`."""
    same = [a == b for a, b in zip(text, beginning)]
    return text[[*same, False].index(False) :]


def _token_bytes(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The bytes of a byte-level token, or of a byte token such as `<0xF0>`; None for other tokens."""
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        raw = bytes.fromhex(byte[1])
    elif all(character in BYTE_OF_CHARACTER for character in name):
        raw = bytes(BYTE_OF_CHARACTER[character] for character in name)
    else:
        return None
    # The token `é` is the byte 0xE9 of a byte-level vocabulary, and a letter of any other.
    return raw if raw.decode("utf-8", "replace") == tokenizer.decode([token_id]) else None


def _with_hexadecimal(raw: bytes) -> str:
    """The bytes as text; those that are not UTF-8 read `<0xF0 0x9F>`."""
    text = raw.decode("utf-8", "surrogateescape")  # the byte 0xF0 becomes U+DCF0 if it is not UTF-8
    return re.sub("[\udc80-\udcff]+", lambda run: f"<{' '.join(f'0x{ord(c) - 0xDC00:02X}' for c in run[0])}>", text)
