"""The texts of a trace: joined they are the response, whatever the tokenizer, and the few tokens that are decoded
again give what the whole response gives."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_proxy.decoding.trace import TracedToken, trace_texts

CORPUS = ["Un café 😀😁 — 你好, don't stop. He can't, we've I'm naïve 👩‍👧 [1]\n"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(vocab_size: int) -> Tokenizer:
    """BPE over bytes, as GPT-2's, Llama 3's and SmolLM2's; with 256 tokens every byte is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """BPE over characters, with `▁` for a space, as T5's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """`▁` for a space, and bytes for all but a few letters, as Llama 2's."""
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *"▁abcdeé"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """`##` before what continues a word, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILD = {
    "bytes": lambda: byte_level(256),
    "byte_level": lambda: byte_level(300),
    "metaspace": metaspace,
    "byte_fallback": byte_fallback,
    "word_piece": word_piece,
    "word_piece_cleaned": word_piece,
    "no_decoder": lambda: Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")),
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer; with the clean-up, " n't" and " ." lose their space when they are decoded."""
    cleaned = name == "word_piece_cleaned"
    return PreTrainedTokenizerFast(tokenizer_object=BUILD[name](), clean_up_tokenization_spaces=cleaned)


TOKENIZERS = pytest.mark.parametrize("name", BUILD)
TEXTS = st.text(st.one_of(st.sampled_from("ab é 😀😁你好— don't.\n\u200d\ufffd"), st.characters(codec="utf-8")))


def traced(ids: list[int], rejected: list[list[int]] | None = None) -> list[TracedToken]:
    return [TracedToken(i, (rejected or [[]] * len(ids))[place], True) for place, i in enumerate(ids)]


def whole_prefixes(ids: list[int], tokenizer) -> list[str]:
    """The texts of the tokens by the whole response before each: a token has what is new in the longest beginning of
    the response's text."""
    whole, texts, written = tokenizer.decode(ids), [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        read = len(text) if whole.startswith(text) and len(text) > written else written
        texts.append(whole[written:read])
        written = read
    return texts


@TOKENIZERS
@given(text=TEXTS)
def test_the_texts_of_a_text_join_to_the_decoded_response(name, text):
    tokenizer = tokenizer_of(name)
    ids = tokenizer(text)["input_ids"]
    texts = [text for text, _ in trace_texts(traced(ids), tokenizer)]
    assert "".join(texts) == tokenizer.decode(ids)
    if "\ufffd" not in text:  # which reads like an incomplete character
        assert texts == whole_prefixes(ids, tokenizer)


@TOKENIZERS
@given(data=st.data())
def test_the_texts_of_any_tokens_join_to_the_decoded_response(name, data):
    """Bytes that are no UTF-8 included: with byte fallback one of them changes how all bytes of its run read."""
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    texts = [text for text, _ in trace_texts(traced(ids), tokenizer)]
    assert "".join(texts) == tokenizer.decode(ids)
    if name != "byte_fallback":
        assert texts == whole_prefixes(ids, tokenizer)


@TOKENIZERS
@given(data=st.data())
def test_a_rejected_text_is_what_the_candidate_adds_to_the_whole_text(name, data):
    tokenizer = tokenizer_of(name)
    ids = tokenizer(data.draw(TEXTS))["input_ids"]
    candidates = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=len(ids), max_size=len(ids)))
    texts = trace_texts(traced(ids, [[candidate] for candidate in candidates]), tokenizer)
    read = ""
    for place, (text, [rejected]) in enumerate(texts):
        after = tokenizer.decode([*ids[:place], candidates[place]])
        # Whole characters that leave the text before them as it is; the other cases have tests of their own.
        if after.startswith(read) and after != read and "\ufffd" not in after:
            assert rejected == after[len(read) :]
        read += text


def test_characters_of_several_tokens():
    tokenizer = tokenizer_of("bytes")
    ids = tokenizer("Un café 😀 — 你好")["input_ids"]
    texts = [text for text, _ in trace_texts(traced(ids), tokenizer)]
    accent, emoji, dash, chinese = ["", "é"], ["", "", "", "😀"], ["", "", "—"], ["", "", "你", "", "", "好"]
    assert texts == [*"Un caf", *accent, " ", *emoji, " ", *dash, " ", *chinese]


def ids_of_bytes(name: str, raw: bytes) -> list[int]:
    """A token per byte."""
    if name == "byte_fallback":
        return tokenizer_of(name).convert_tokens_to_ids([BYTES[byte] for byte in raw])
    return tokenizer_of(name).convert_tokens_to_ids([ALPHABET[byte] for byte in raw])


# The characters that stand for the bytes 0 to 255: byte-level decoders know no other way from the one to the other.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
ALPHABET = [chr(byte) if byte in PRINTED else chr(256 + OTHERS.index(byte)) for byte in range(256)]


@pytest.mark.parametrize("name", ["bytes", "byte_fallback"])
@pytest.mark.parametrize(
    ("accepted", "candidate", "expected"),
    [
        (b"", b"\xf0", "<0xF0>"),  # begins a character
        (b"\xf0\x9f", b"\x98", "<0x98>"),  # continues one
        (b"\xf0\x9f\x98", b"\x81", "😁"),  # completes another one than was accepted
        (b"\xf0\x9f", b"a", "a"),  # leaves one incomplete
        (b"\xf0\x9f", b"\xf0", "<0xF0>"),
        (b"\xc3\xa9", b"\xff", "<0xFF>"),  # is in no character
    ],
)
def test_bytes_of_a_rejected_candidate(name, accepted, candidate, expected):
    ids = ids_of_bytes(name, accepted + b"\x80")
    [candidate] = ids_of_bytes(name, candidate)
    texts = trace_texts(traced(ids, [*([[]] * len(accepted)), [candidate]]), tokenizer_of(name))
    assert texts[-1][1] == [expected]


def test_a_rejected_token_of_a_letter_and_half_a_character():
    tokenizer = tokenizer_of("byte_level")
    half = tokenizer.convert_tokens_to_ids("ĠðŁ")  # a space and two bytes of an emoji
    [(_, rejected)] = trace_texts(traced(tokenizer("a")["input_ids"], [[half]]), tokenizer)
    assert rejected == [" <0xF0 0x9F>"]


def test_letters_of_other_vocabularies_are_no_bytes():
    """`é` is the name of the byte 0xE9 if the vocabulary is byte-level."""
    tokenizer = tokenizer_of("byte_fallback")
    letter = tokenizer.convert_tokens_to_ids("é")
    ids = ids_of_bytes("byte_fallback", "ñ".encode())
    assert trace_texts(traced(ids, [[], [letter]]), tokenizer) == [("", []), ("ñ", ["é"])]


def test_a_candidate_that_changes_the_text_before_it():
    """The clean-up of `do n ' t` takes a space that an accepted text has."""
    tokenizer = tokenizer_of("word_piece_cleaned")
    ids = tokenizer.convert_tokens_to_ids(["he", "do", "n", "'", "we"])
    [wrong] = tokenizer.convert_tokens_to_ids(["t"])
    texts = trace_texts(traced(ids, [[], [], [], [], [wrong]]), tokenizer)
    assert texts == [("he", []), (" do", []), (" n", []), ("", []), ("'we", ["n't"])]


def test_spaces_are_kept():
    tokenizer = tokenizer_of("byte_fallback")
    a, space = tokenizer.convert_tokens_to_ids(["a", "▁"])
    assert trace_texts(traced([a, space, a], [[], [space], [space]]), tokenizer) == [
        ("a", []),
        (" ", [" "]),
        ("a", [" "]),
    ]
    # The decoder drops the first space of a response.
    assert trace_texts(traced([space, a], [[space], []]), tokenizer) == [("", ["▁"]), ("a", [])]


def test_a_candidate_that_the_tokenizer_does_not_have():
    """LMs have more ids than their tokenizers: the embeddings are padded."""
    tokenizer = tokenizer_of("bytes")
    for accepted in (b"ab", b"\xf0\x9f"):
        texts = trace_texts(traced(ids_of_bytes("bytes", accepted), [[], [10**6]]), tokenizer)
        assert texts[1][1] == [""]


def test_no_token_needs_the_whole_response():
    """The tokens before one that are decoded again are as many in a long response."""
    tokenizer, longest = tokenizer_of("bytes"), 0

    class Spy:
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids) * (len(ids) < 400))
            return tokenizer.decode(ids)

        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    ids = tokenizer("é😀你 a" * 40)["input_ids"]
    assert len(ids) >= 400
    assert "".join(text for text, _ in trace_texts(traced(ids, [[ids[0]]] * len(ids)), Spy())) == tokenizer.decode(ids)
    assert longest <= 4 * 4 + 4


@given(st.lists(st.sampled_from([b"\xc3\xa9", b"\xff", b"a", b" "]), min_size=1))
def test_invalid_bytes_hold_up_the_text_no_longer_than_their_run(parts):
    """With byte fallback, 0xFF makes `é` before it unreadable: what follows the run has its own text again."""
    tokenizer = tokenizer_of("byte_fallback")
    tail = tokenizer.convert_tokens_to_ids(["a", "▁"]) * 8
    ids = ids_of_bytes("byte_fallback", b"".join(parts)) + tail
    texts = [text for text, _ in trace_texts(traced(ids), tokenizer)]
    assert "".join(texts) == tokenizer.decode(ids)
    assert texts[-8:] == ["a", " "] * 4


@pytest.mark.parametrize("raw", [b"\xff\x98\xf0\x98\x9f\xa9\xc3", b"\xf0\x98\xbd\xbf\xbda"])
@pytest.mark.parametrize("before", [[], ["é"]])
def test_a_part_of_a_run_of_bytes_that_reads_otherwise_than_the_run(before, raw):
    """Some bytes of the run are a character, and the run as a whole is no UTF-8."""
    tokenizer = tokenizer_of("byte_fallback")
    ids = [*tokenizer.convert_tokens_to_ids(before), *ids_of_bytes("byte_fallback", raw)]
    assert [text for text, _ in trace_texts(traced(ids), tokenizer)] == whole_prefixes(ids, tokenizer)
