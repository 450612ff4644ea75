"""A judge behind any OpenAI-compatible endpoint, with a cache on disk: no answer is paid for twice.

Needs the extra `judge`. The API key comes from the environment variable `OPENAI_API_KEY` and goes only to the
endpoint: it is cut out of replies and error messages before they are stored or shown.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import sqlite3
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import urlsplit

import openai
from aiolimiter import AsyncLimiter
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)
from tqdm.auto import tqdm

from eval.judges.pairwise import Answer, JudgeError, PairwiseJudge, parse_answer, sum_known

API_KEY = "OPENAI_API_KEY"
OPENAI_URL = "https://api.openai.com/v1"  # the client's own default
REMINDER = "\n\nYour last answer was not one of the words A, B, tie. Write one of them and nothing else."
# If a server asks to wait longer (a daily quota is used up), the run ends; it can resume another day.
LONGEST_WAIT = 600.0  # seconds
# Error codes of a question that is never answered: Azure's filter of harmful prompts, and OpenAI's length limit. The
# question counts as unparsed and the others continue.
UNANSWERABLE = ("content_filter", "context_length_exceeded")


class BrokenReply(Exception):
    """The endpoint sent something that is no chat completion."""


class Reply(NamedTuple):
    """The endpoint's reply to one request, and the tokens that it counted (None if it did not)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class ReplyCache:
    """Replies on disk, in an SQLite file, by the hash of everything that decides them.

    Args:
        path: the file; made if it is missing.

    Raises:
        ValueError: if the file is something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self.path, timeout=60)  # seconds that another process may hold it
        try:
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
                    "prompt_tokens INTEGER, completion_tokens INTEGER)"
                )
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"The cache {self.path} cannot be used ({error}): name another file.") from error

    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM replies").fetchone()[0]

    def get(self, key: str) -> Reply | None:
        row = self._connection.execute(
            "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, reply: Reply) -> None:
        """Stores a reply at once: a crash a moment later does not lose it."""
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (key, *reply))

    def close(self) -> None:
        self._connection.close()


def retry_after(error: BaseException) -> float | None:
    """Seconds that a response's `Retry-After` header asks to wait, given in seconds or as a date (RFC 9110, section
    10.2.3); None without one that can be read."""
    if not isinstance(error, openai.APIStatusError):
        return None
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return None


def is_transient(error: BaseException) -> bool:
    """Whether asking again later may help: no connection, time-outs, a broken reply, and the statuses that the openai
    client itself retries (408, 409, 429, 5xx). It does not help if the account's money or daily quota is used up."""
    if isinstance(error, openai.APIStatusError):
        if error.code == "insufficient_quota" or (retry_after(error) or 0.0) > LONGEST_WAIT:
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | BrokenReply)


class ApiJudge(PairwiseJudge):
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Args:
        model: its name at the endpoint.
        cache: keeps the replies.
        base_url: of the endpoint; `OPENAI_BASE_URL` or OpenAI itself by default.
        template: as for [`PairwiseJudge`].
        request: further fields of every request, e.g. `{"temperature": 0, "max_tokens": 8}`.
        ask_again: how often a question is asked again if its reply is no answer.
        concurrency: requests at the same time.
        requests_per_minute: the most requests per minute, evenly spread; None for no limit.
        timeout: of a request, in seconds.
        retries: of a request whose failure [`is_transient`].
        backoff: seconds before the first retry, at most; doubled by every further one, up to a minute. A server's
            `Retry-After` is honoured instead.

    Raises:
        ValueError: if there is no API key for OpenAI, the URL is invalid or holds a secret, or `request` sets fields
            that the judge sets itself.
    """

    def __init__(
        self,
        model: str,
        cache: ReplyCache,
        *,
        base_url: str | None = None,
        template: Template | None = None,
        request: dict | None = None,
        ask_again: int = 2,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
    ):
        super().__init__(f"openai {model}", template)
        self.model, self.cache = model, cache
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        url = urlsplit(self.base_url)
        if url.username or url.password or url.query:  # not shown: it may be a secret
            raise ValueError(f"judge_base_url must hold no user name, password or query: set {API_KEY} instead.")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"judge_base_url must be a URL like http://localhost:8000/v1, got {self.base_url!r}.")
        self._key = os.environ.get(API_KEY, "").strip()
        if not self._key and self.base_url == OPENAI_URL:
            raise ValueError(f"The environment variable {API_KEY} is not set: set it, or name a judge_base_url.")
        self.request = request or {}
        if reserved := sorted({"model", "messages", "stream", "n"} & self.request.keys()):
            raise ValueError(f"judge_request must not set {', '.join(reserved)}: they are the judge's own.")
        self.ask_again, self.concurrency, self.requests_per_minute = ask_again, concurrency, requests_per_minute
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.paid: list[Reply] = []  # by this object, not from the cache

    def ask(self, questions: list[str]) -> list[Answer]:
        """Asks what is not in the cache; a question that occurs twice is asked once.

        Raises:
            JudgeError: if the endpoint cannot be reached or refuses. Replies to requests already sent are kept.
        """
        answers, failure = asyncio.run(self._ask_all(list(dict.fromkeys(questions))))
        if failure is not None:  # raised outside of the handler: no traceback shows what a server sent
            raise JudgeError(
                f"The judge {self.model} at {self.base_url} gave no answer ({failure}): {len(self.cache)} replies are "
                f"kept in {self.cache.path}, the same command resumes from there."
            )
        return [answers[question] for question in questions]

    async def _ask_all(self, questions: list[str]) -> tuple[dict[str, Answer], str | None]:
        """Answers by question, and one line about what went wrong; None if nothing did."""
        answers: dict[str, Answer] = {}
        failed, waiting = asyncio.Event(), iter(questions)
        pace = contextlib.nullcontext()
        if self.requests_per_minute is not None:
            pace = AsyncLimiter(1, 60 / self.requests_per_minute)  # one at a time, and so no burst at the start
        # tenacity does all retries, so all of them wait in the same way. Local servers take any key.
        client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=0
        )

        async def work() -> None:
            for question in waiting:
                if failed.is_set():
                    return
                try:
                    answers[question] = await self._answer(client, pace, failed, question)
                except Exception:
                    failed.set()
                    raise
                progress.update()

        async with client:
            with tqdm(total=len(questions), desc=self.name, unit="question", leave=False) as progress:
                results = await asyncio.gather(*(work() for _ in range(self.concurrency)), return_exceptions=True)
        for error in results:
            if isinstance(error, openai.OpenAIError | BrokenReply):
                return answers, " ".join(self._redact(str(error)).split())[:300]
            if error is not None:
                raise error
        return answers, None

    async def _answer(self, client, pace, failed: asyncio.Event, question: str) -> Answer:
        """Asks one question until a reply is an answer, `1 + ask_again` times at most."""
        replies = []
        for attempt in range(1 + self.ask_again):
            content = question if attempt == 0 else question + REMINDER
            body = {**self.request, "model": self.model, "messages": [{"role": "user", "content": content}]}
            # The attempt counts too: at a temperature above 0 a later attempt may succeed with the same question.
            identity = {"base_url": self.base_url, "body": body, "attempt": attempt}
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            reply = self.cache.get(key)
            if reply is None:
                reply = await self._retrying(failed)(self._send, client, pace, body)
                self.cache.put(key, reply)
                self.paid.append(reply)
            replies.append(reply)
            choice = parse_answer(reply.text)
            if choice is not None:
                break
        return Answer(
            choice,
            sum_known([reply.prompt_tokens for reply in replies]),
            sum_known([reply.completion_tokens for reply in replies]),
        )

    def _retrying(self, failed: asyncio.Event) -> AsyncRetrying:
        backoff = wait_random_exponential(multiplier=self.backoff, max=60)

        def wait(state: RetryCallState) -> float:
            asked_for = retry_after(state.outcome.exception())
            return backoff(state) if asked_for is None else asked_for

        async def sleep(seconds: float) -> None:  # ends early if another request has failed for good
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(failed.wait(), seconds)

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait,
            stop=stop_after_attempt(1 + self.retries) | stop_when_event_set(failed),
            sleep=sleep,
            reraise=True,
        )

    async def _send(self, client: openai.AsyncOpenAI, pace, body: dict) -> Reply:
        async with pace:
            try:
                completion = await client.chat.completions.create(
                    model=body["model"], messages=body["messages"], extra_body=self.request
                )
            except openai.BadRequestError as error:
                if error.code in UNANSWERABLE:
                    return Reply("", 0, 0)
                raise
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise BrokenReply("its reply is broken JSON") from None
        try:  # the client passes on unchanged what is no chat completion
            content, usage = completion.choices[0].message.content or "", completion.usage
            counts = (None, None) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
            return Reply(self._redact(content), *counts)
        except (AttributeError, IndexError, TypeError):
            raise BrokenReply("its reply is no chat completion") from None

    def _redact(self, text: str) -> str:
        """The text without the API key, and without lone surrogates, which no file can hold."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text.replace(self._key, f"[{API_KEY}]") if self._key else text
