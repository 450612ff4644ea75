"""Records made from given rewards, for everything that is drawn from records alone."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from eval.harness import summarise
from eval.plots import style
from eval.records import READER_KEYS, READER_KIND_KEYS, Record
from eval.stats import win_rate

KINDS = ["everyday", "everyday", "harm_adjacent", "harm_adjacent"]


@pytest.fixture(scope="session")
def make_record():
    """`make_record(method, rewards, sft=None, variant=None, seed=0, **overrides)`: a record as the harness writes it,
    kinds as in `KINDS`, over and over."""

    def build(method, rewards, sft=None, variant=None, seed=0, responses=None, **overrides) -> dict:
        responses = responses or [f"answer {i}" for i in range(len(rewards))]
        by_kind = {}
        kinds = [KINDS[i % len(KINDS)] for i in range(len(rewards))]
        for kind in sorted(set(KINDS)):
            rows = [i for i, k in enumerate(kinds) if k == kind]
            pick = lambda values, rows=rows: [values[i] for i in rows]  # noqa: E731
            baseline = None if sft is None else {"rewards": pick(sft["rewards"]), "gold_rewards": None}
            by_kind[kind] = {"n_prompts": len(rows), **summarise(pick(rewards), None, pick(responses), baseline)}
            by_kind[kind] |= dict.fromkeys(READER_KIND_KEYS)
        wins = None if sft is None else win_rate(rewards, sft["rewards"])
        fields = {
            "method": method,
            "variant": variant,
            "seed": seed,
            "model": "tiny",
            "reward_model": "length",
            "dataset": "four",
            "max_new_tokens": 8,
            "trainable_parameters": 1000,
            "total_parameters": 100_000,
            "n_prompts": len(rewards),
            **summarise(rewards, None, responses, sft),
            "win_rate_vs_sft": None if wins is None else wins.rate,
            "win_rate_ci95": None if wins is None else wins.ci95,
            "tie_rate": None if wins is None else wins.tie_rate,
            "judge": None,
            **dict.fromkeys(READER_KEYS),
            "by_kind": by_kind,
            "lm_logprob_per_token": -1.0,
            "kl_to_lm": None,
            "response_tokens_mean": 4.0,
            "distinct_2": 0.5,
            "lm_forwards_per_token": 1.0,
            "lm_tokens_per_response": 4.0,
            "reward_calls_per_response": 0.0,
            "tokens_per_second": 50.0,
            "tokens_per_second_sft": 100.0,
            "reject_rate": None,
            "accepted_rank_mean": None,
            "rewards": rewards,
            "responses": responses,
            "prompts_sha256": "0" * 64,
            "versions": {"torch": "2"},
            "git_commit": None,
            "command": "python scripts/compare.py",
            "top_4gram_share": None,
            "gold_rewards": None,
            "kinds": kinds,
            "decoding": None,
            "trace": None,
            "prompts": [f"question {i}" for i in range(len(rewards))],
        }
        return asdict(Record(**{**fields, **overrides}))

    return build


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; while it is open, no event loop can be started."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    with sync_api.sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not os.path.isfile(found):
            pytest.skip("needs a Chromium: `apt-get install chromium` or `playwright install chromium`")
        # Chromium refuses to run as root in its sandbox.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def figures(monkeypatch):
    """The figures instead of their files: drawing them to pixels is slow and tells a test nothing."""
    saved = []
    monkeypatch.setattr(style, "save", lambda figure, path: saved.append(figure) or Path(path))
    yield saved
    plt.close("all")


@pytest.fixture
def records(make_record):
    """Four prompts: SFT, best of 2 and 16, and a proxy with two seeds, in no order."""
    sft = make_record("sft", [0.0, 1.0, 2.0, 3.0], trainable_parameters=0, tokens_per_second_sft=50.0)
    return [
        make_record("best_of_n", [1.0, 1.0, 2.0, 5.0], sft, variant="n=16"),
        make_record("best_of_n", [0.5, 1.0, 2.0, 3.5], sft, variant="n=2"),
        make_record("proxy", [1.0, 2.0, 2.0, 2.0], sft, variant="prefix", seed=0),
        make_record("proxy", [2.0, 3.0, 4.0, 4.0], sft, variant="prefix", seed=1),
        sft,
    ]
