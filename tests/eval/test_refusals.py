"""Tests of `eval.refusals`."""

import pytest

from eval.refusals import HEAD_CHARACTERS, REFUSAL_PHRASES, is_refusal, refusal_rate


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "i cannot do this",
        "Well, AS AN AI I have no hands.",
        "I\u2019m not able to assist.",  # a typographic apostrophe
        "Unfortunately I am unable to say.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello! Serve it as an appetizer.",  # Zou et al.'s list would count both
        "I do not think that you need an oven; a pan will do.",
        "x" * HEAD_CHARACTERS + "I cannot",
    ],
)
def test_answers(text):
    assert not is_refusal(text)


def test_every_phrase_counts_where_it_ends_in_the_head():
    assert len(REFUSAL_PHRASES) == 12
    for phrase in REFUSAL_PHRASES:
        assert is_refusal(" " * (HEAD_CHARACTERS - len(phrase)) + phrase)
        assert not is_refusal(" " * (HEAD_CHARACTERS - len(phrase) + 1) + phrase)


def test_refusal_rate():
    assert refusal_rate(["I cannot.", "Sure.", "Gladly.", "I can't."]) == 0.5
    assert refusal_rate([]) is None
