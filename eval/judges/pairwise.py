"""Which of two responses wins: a judge sees each pair in both orders, and a win counts only if both orders agree.

A judge is a [`PairwiseJudge`]: it answers questions by A, B or tie. [`LocalJudge`] is a causal LM,
`eval.judges.endpoint` has one behind an OpenAI-compatible endpoint, and [`recorded_verdicts`] uses the scores of the
records. All of them return [`Verdicts`], which `eval.judges.judgements` writes next to the records.

Judges prefer a position, mostly the first (Zheng et al. 2023, arXiv 2306.05685), so a verdict that changes with the
order is a tie. A small LM such as SmolLM2-135M may answer by position alone, and then all its verdicts are ties. Read
the share of pairs whose orders disagree before the win rate.
"""

import re
from pathlib import Path
from string import Template
from typing import NamedTuple

from eval.likelihood import next_token_logprobs
from eval.stats import win_scores
from trl_proxy.decoding.settings import encode_prompts

PROMPT_FILE = Path(__file__).with_name("judge_prompt.txt")
FIELDS = ("prompt", "response_a", "response_b")
# What an answer is worth to the response that is shown as A; no usable answer is a tie.
VALUES = {"A": 1.0, "B": 0.0, "tie": 0.5, None: 0.5}


class JudgeError(Exception):
    """A judge gave no answer, for a reason outside of this program. What it answered before is kept."""


class Answer(NamedTuple):
    """A judge's answer to one question.

    `choice`: `A`, `B`, `tie`, or None if no reply was one of them. The tokens are those of all replies; None if they
    are not known.
    """

    choice: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Verdicts(NamedTuple):
    """A judge's decisions, one per pair of responses.

    Attributes:
        scores: 1.0 if the response won against the reference, 0.5 for a tie, 0.0 if it lost.
        answers: the two answers to a pair: with the response as A, then with the reference as A. None for a pair that
            nobody was asked about, because its two responses are equal.
        prompt_tokens, completion_tokens: of all the answers; None if they are not known.
    """

    scores: list[float]
    answers: list[tuple[str | None, str | None] | None]
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def unparsed(self) -> int:
        """Answers that were none of A, B, tie; each makes its pair a tie."""
        return sum(pair.count(None) for pair in self.answers if pair is not None)

    @property
    def disagreements(self) -> int:
        """Pairs whose two orders got different verdicts; they are ties."""
        asked = [pair for pair in self.answers if pair is not None and None not in pair]
        return sum(VALUES[first] != 1 - VALUES[second] for first, second in asked)


def read_template(path: str | Path = PROMPT_FILE) -> Template:
    """The judge's prompt: a text with `$prompt`, `$response_a` and `$response_b`, each between tags with its name
    (`<response_a>`): [`fill`] protects these tags.

    Raises:
        ValueError: if there is no such file, or it has not exactly these three fields.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The judge's prompt {path} is no file: name one with $prompt, $response_a and $response_b.")
    template = Template(path.read_text(encoding="utf-8"))
    if not template.is_valid() or set(template.get_identifiers()) != set(FIELDS):
        raise ValueError(
            f"The judge's prompt {path} must have the fields $prompt, $response_a and $response_b and no other "
            "(a dollar sign is written $$)."
        )
    return template


def fill(template: Template, prompt: str, response_a: str, response_b: str) -> str:
    """The question to a judge. Texts cannot end their section or open another one: whatever imitates the template's
    tags is escaped. Everything else stays as it was written."""
    imitation = re.compile(rf"<(?=\s*/?\s*(?:{'|'.join(FIELDS)})\b)", re.IGNORECASE)
    texts = (imitation.sub("&lt;", text) for text in (prompt, response_a, response_b))
    return template.substitute(dict(zip(FIELDS, texts)))


def parse_answer(reply: str) -> str | None:
    """`A`, `B` or `tie` if the reply is this word alone, with or without white space and a full stop; else None.

    A letter inside a sentence does not count: it may be a quotation of the judged response.
    """
    match = re.fullmatch(r"\s*(?:(A|B)|(tie))\.?\s*", reply, re.IGNORECASE)
    if match is None:
        return None
    return match[1].upper() if match[1] else "tie"


def combine(first: str | None, second: str | None) -> float:
    """Score of the response, from the answers with it as A and with it as B: 0.5 if the two disagree."""
    score = VALUES[first]
    return score if score == 1 - VALUES[second] else 0.5


def sum_known(counts: list[int | None]) -> int | None:
    """Their sum; None if one is not known."""
    return None if None in counts else sum(counts)


class PairwiseJudge:
    """A judge that is asked questions; subclasses answer them.

    Args:
        name: for tables and folders.
        template: of the question, see [`read_template`].
    """

    def __init__(self, name: str, template: Template | None = None):
        self.name = name
        self.template = template or read_template()

    def ask(self, questions: list[str]) -> list[Answer]:
        """One answer per question."""
        raise NotImplementedError

    def judge(self, prompts: list[str], responses: list[str], references: list[str]) -> Verdicts:
        """Decides for every prompt whether the response beats the reference.

        Equal responses are a tie without asking.

        Args:
            prompts, responses, references: n texts each.

        Raises:
            ValueError: if the lists are not of one length.
        """
        if not len(prompts) == len(responses) == len(references):
            raise ValueError(
                f"prompts, responses and references must be paired: got {len(prompts)}, {len(responses)} and "
                f"{len(references)}."
            )
        asked = [i for i in range(len(prompts)) if responses[i] != references[i]]
        questions = [fill(self.template, prompts[i], responses[i], references[i]) for i in asked]
        questions += [fill(self.template, prompts[i], references[i], responses[i]) for i in asked]
        given = self.ask(questions) if questions else []
        answers: list[tuple[str | None, str | None] | None] = [None] * len(prompts)
        for i, first, second in zip(asked, given[: len(asked)], given[len(asked) :], strict=True):
            answers[i] = (first.choice, second.choice)
        return Verdicts(
            [0.5 if pair is None else combine(*pair) for pair in answers],
            answers,
            sum_known([answer.prompt_tokens for answer in given]),
            sum_known([answer.completion_tokens for answer in given]),
        )


class LocalJudge(PairwiseJudge):
    """A causal LM that judges by the log-probabilities of A and B as the first token of its reply.

    It says tie only for an exact draw. If it prefers the same letter in both orders, the pair is a tie.

    Args:
        lm, tokenizer: the judge. With a chat template the question is a user's message, without one it is plain text.
        name, template: as for [`PairwiseJudge`].
        batch_size: questions per forward.
        chat_template_kwargs: of the judge's chat template.

    Raises:
        ValueError: if A or B is not a single token.
    """

    def __init__(
        self,
        lm,
        tokenizer,
        name: str,
        template: Template | None = None,
        *,
        batch_size: int = 8,
        chat_template_kwargs: dict | None = None,
    ):
        super().__init__(name, template)
        self.lm, self.tokenizer, self.batch_size = lm, tokenizer, batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.letter_ids = []
        for letter in "AB":
            ids = tokenizer.encode(letter, add_special_tokens=False)
            if len(ids) != 1 or tokenizer.decode(ids).strip() != letter:
                raise ValueError(
                    f"The judge {name} cannot answer: its tokenizer has no token {letter}; choose another."
                )
            self.letter_ids += ids

    def ask(self, questions: list[str]) -> list[Answer]:
        """The likelier letter to each question.

        Raises:
            ValueError: if a question is longer than what the judge can read.
        """
        prompts = questions
        if self.tokenizer.chat_template is not None:
            prompts = [[{"role": "user", "content": question}] for question in questions]
        prompt_ids = encode_prompts(prompts, self.tokenizer, **self.chat_template_kwargs)
        longest = max(map(len, prompt_ids))
        if longest > self.tokenizer.model_max_length:
            raise ValueError(
                f"The judge {self.name} reads at most {self.tokenizer.model_max_length} tokens, a question has "
                f"{longest}: judge shorter responses or choose another LM."
            )
        logprobs = next_token_logprobs(self.lm, prompt_ids, self.letter_ids, batch_size=self.batch_size)
        choices = ["tie" if a == b else "A" if a > b else "B" for a, b in logprobs.tolist()]
        return [Answer(choice, len(ids), 0) for choice, ids in zip(choices, prompt_ids, strict=True)]


def recorded_verdicts(record: dict, reference: dict, key: str) -> Verdicts:
    """Verdicts from a reward's scores in two records: the higher score wins.

    Equal responses are a tie whatever their scores: the same text scored in another batch differs by rounding.

    Args:
        record, reference: of the same prompts.
        key: `rewards` or `gold_rewards`.

    Raises:
        ValueError: if one of them has no such scores.
    """
    for one in (record, reference):
        if one[key] is None:
            raise ValueError(f"The record of {one['method']}, seed {one['seed']}, has no {key}: choose another judge.")
    scores = win_scores(record[key], reference[key]).tolist()
    equal = [a == b for a, b in zip(record["responses"], reference["responses"], strict=True)]
    return Verdicts([0.5 if same else s for same, s in zip(equal, scores, strict=True)], [None] * len(scores), 0, 0)
