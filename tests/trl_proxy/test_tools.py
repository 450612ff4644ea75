"""The tools of others on a gated LM, each run for real: lm-eval, pipelines, streamers, transformers' server, compiled
and dispatched LMs. docs/guide.md has the table and the snippets."""

import json
import re
import socket
import time
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    TextIteratorStreamer,
    pipeline,
)
from transformers.pipelines import base as pipelines

from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.decoding import options
from trl_proxy.modeling import causal_lm

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
PROMPTS = ["Which letter follows a?", "Hi", "What is rain? ", "Name three birds."]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
FEATURES = ("prefix", "candidate")


@pytest.fixture
def gated(tiny_lm, with_random_gate):
    """`gated(**config)`: a tiny LM under a gate that both accepts and rejects."""
    return lambda **config: with_random_gate(
        tiny_lm("llama"), ProxyConfig(**{"pooled_features": config.get("features") != "candidate"} | config)
    )


@pytest.fixture
def write(tiny_tokenizer):
    """`write(model, prompts, **options)`: what `generate` writes for each prompt, one by one."""

    def texts(model, prompts, **options) -> list[str]:
        written = []
        for prompt in prompts:
            if isinstance(prompt, list):
                prompt = tiny_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            inputs = tiny_tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
            written.append(tiny_tokenizer.decode(output, skip_special_tokens=True))
        return written

    return texts


@pytest.fixture
def warnings(monkeypatch):
    """What is said once."""
    said: list[str] = []
    for module in (causal_lm, options):
        monkeypatch.setattr(module.logger, "warning_once", said.append)
    return said


def snippet(word: str) -> str:
    """The block of the guide that has this word. These blocks are `py`: they do not run with the rest of the page."""
    (block,) = (block for block in re.findall(r"^```py\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE) if word in block)
    return block


# lm-eval


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The package with two tasks of the guide's names in place of its own 13,000 files, and without its report of the
    machine, which takes seconds. `gsm8k` generates, `arc_easy` is multiple choice, `wikitext` is rolling."""
    lm_eval = pytest.importorskip("lm_eval", reason='pip install "trl-proxy[lm-eval]"')
    from lm_eval import evaluator, tasks

    rows = [
        {"question": text, "choices": ["zz", "no!", "yes, yes", "b"], "answer": i % 4}
        for i, text in enumerate(PROMPTS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")}}
    shared |= {"test_split": "train", "doc_to_text": "{{question}}"}
    of_task = {
        "gsm8k": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["e", "a"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "arc_easy": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "wikitext": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [
                {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        },
    }
    (tmp_path / "tasks").mkdir()
    for name, task in of_task.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    simple_evaluate = evaluator.simple_evaluate

    def evaluate(model, names):
        manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        return simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda model, tasks: evaluate(model, tasks), raising=False)
    return lm_eval


def responses(results: dict, task: str) -> list:
    """What the LM answered to each request of a task, row by row."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_generates_as_generate_does(lm_eval, gated, write, warnings, tiny_tokenizer, features, batch_size):
    from lm_eval.models.huggingface import HFLM

    model = gated(features=features)
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=batch_size)
    results = lm_eval.simple_evaluate(harness, ["gsm8k"])
    whole = write(model, PROMPTS, max_new_tokens=12)
    expected = [re.split("[ea]", text)[0] for text in whole]
    assert responses(results, "gsm8k") == [[[text]] for text in expected]
    assert expected != whole, "a stop sequence has ended one"
    assert write(model.lm, PROMPTS, max_new_tokens=12, do_sample=False) != whole, "the gate makes a difference"
    assert not warnings


@pytest.mark.parametrize("features", FEATURES)
def test_lm_eval_scores_with_the_lm(lm_eval, gated, tiny_tokenizer, features):
    """Multiple choice and perplexity inside `disable_proxy` are the frozen LM's, to the last bit."""
    from lm_eval.models.huggingface import HFLM

    model, tasks = gated(features=features), ["arc_easy", "wikitext"]
    with model.disable_proxy():
        found = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=3), tasks)
    expected = lm_eval.simple_evaluate(HFLM(pretrained=model.lm, tokenizer=tiny_tokenizer, batch_size=3), tasks)
    for task in tasks:
        assert responses(found, task) == responses(expected, task)
        assert found["results"][task] == expected["results"][task]
    scores = [[choice[0][0] for choice in row] for row in responses(found, "arc_easy")]
    assert all(len(set(row)) == 4 and min(row) > -1e4 and max(row) < 0 for row in scores)


@pytest.mark.fault
def test_scores_of_the_gate_are_not_silent(lm_eval, gated, warnings, tiny_tokenizer):
    """Outside of it lm-eval finds -inf for every answer and takes the first: that is said, with the remedy."""
    from lm_eval.models.huggingface import HFLM

    model = gated()
    results = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tiny_tokenizer), ["arc_easy"])
    assert all(score == -torch.inf for row in responses(results, "arc_easy") for ((score, _),) in row)
    assert results["results"]["arc_easy"]["acc,none"] == 0.25, "the first of four rows has the first answer"
    assert set(warnings) == {
        "The gated logits of tokens that are no candidates are -inf: score given texts inside "
        "`with model.disable_proxy():`, which is the frozen LM. The gate itself is measured by what it writes, in "
        "tasks that generate."
    }


@pytest.mark.fault
def test_scores_by_candidate_features_are_refused(lm_eval, gated, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=gated(features="candidate"), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match=r"score given texts inside `with model\.disable_proxy\(\):`"):
        lm_eval.simple_evaluate(harness, ["arc_easy"])


def test_the_guides_lm_eval(lm_eval, gated, write, warnings, tiny_tokenizer):
    model = gated()
    names = {"model": model, "tokenizer": tiny_tokenizer}
    exec(snippet("lm_eval"), names)
    expected = [re.split("[ea]", text)[0] for text in write(model, PROMPTS, max_new_tokens=12)]
    assert responses(names["gated"], "gsm8k") == [[[text]] for text in expected]
    assert all(score > -1e4 for row in responses(names["scored"], "arc_easy") for ((score, _),) in row)
    assert not warnings


# `forward` as tools call it


@pytest.mark.fault
def test_an_infinite_loss_is_refused(gated, ragged_batch):
    model, ids = gated(), ragged_batch((6,))["input_ids"]
    with pytest.raises(
        ValueError, match=r"The loss is infinite: a label is no candidate of the LM; score given texts"
    ):
        model(ids, labels=ids)
    with torch.no_grad(), model.disable_proxy():
        assert torch.equal(model(ids, labels=ids).loss, model.lm(ids, labels=ids).loss)
    likely = model.generate(ids, max_new_tokens=5, eos_token_id=-1)
    labels = likely.clone()
    labels[:, :6] = -100
    logits = model(likely).logits[0, 5:-1]
    expected = -logits.gather(-1, likely[0, 6:, None]).mean()
    torch.testing.assert_close(model(likely, labels=labels).loss, expected)


def test_nothing_is_said_where_nothing_is_scored(gated, ragged_batch, warnings):
    """Decoding with and without a cache, packed texts, and a caller that asks for the LM's logits too."""
    model, prompts = gated(), ragged_batch((6, 3))
    for use_cache in (True, False):
        model.generate(**prompts, max_new_tokens=3, use_cache=use_cache)
        GenerationMixin.generate(model, **prompts, max_new_tokens=3, do_sample=False, use_cache=use_cache)
    model.generate(**prompts, max_new_tokens=3, num_beams=2)
    model.generate(**prompts, max_new_tokens=3, gate_sample=True)
    with torch.no_grad():
        model(**prompts, output_lm_logits=True)
        model(**prompts, logits_to_keep=1)
        with model.disable_proxy():
            model(**prompts)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(32, 16, 64)
    packed = gated(pooled_features=False)
    packed.generate_batch([[5, 6, 7], [8, 9]], generation_config=settings, continuous_batching_config=small)
    assert not warnings
    model(**prompts)
    assert len(warnings) == 1


def test_engines_ask_for_the_last_logits_alone(gated, ragged_batch, monkeypatch):
    """The gate is not asked for every position of the prompts."""
    model, seen = gated(), []
    forward = model.lm.lm_head.forward
    monkeypatch.setattr(model.lm.lm_head, "forward", lambda x: seen.append(x.shape[1]) or forward(x))
    GenerationMixin.generate(model, **ragged_batch((6, 3)), max_new_tokens=3, do_sample=False)
    assert seen == [1, 1, 1]


# Pipelines and streamers


@pytest.fixture
def pipe(gated, tiny_tokenizer):
    return lambda **config: pipeline("text-generation", model=gated(**config), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["plain", "chat"])
def test_a_pipeline_writes_as_generate_does(pipe, write, warnings, features, prompts):
    """One by one and in batches of different lengths."""
    pipe = pipe(features=features)
    expected = write(pipe.model, prompts, max_new_tokens=8)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    assert [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts] == expected
    assert [row[0]["generated_text"] for row in pipe(prompts, batch_size=3, **settings)] == expected
    assert expected != write(pipe.model.lm, prompts, max_new_tokens=8, do_sample=False)
    assert not warnings


def test_a_pipelines_other_options(pipe, write, tiny_tokenizer):
    pipe = pipe()
    greedy = {"max_new_tokens": 8, "do_sample": False}
    (expected,) = write(pipe.model, PROMPTS[:1], max_new_tokens=8)
    assert pipe(PROMPTS[0], **greedy) == [{"generated_text": PROMPTS[0] + expected}]
    (chat,) = write(pipe.model, CHATS[:1], max_new_tokens=8)
    assert pipe(CHATS[0], **greedy)[0]["generated_text"] == [*CHATS[0], {"role": "assistant", "content": chat}]
    torch.manual_seed(3)
    drawn = pipe(PROMPTS[0], **greedy, gate_sample=True, num_return_sequences=3, return_full_text=False)
    torch.manual_seed(3)
    inputs = tiny_tokenizer(PROMPTS[0], return_tensors="pt")
    ids = pipe.model.generate(**inputs, max_new_tokens=8, gate_sample=True, num_return_sequences=3)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    assert [x["generated_text"] for x in drawn] == tiny_tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len({x["generated_text"] for x in drawn}) > 1
    ids = pipe.model.generate(**inputs, max_new_tokens=8, num_beams=2)
    expected = tiny_tokenizer.decode(ids[0], skip_special_tokens=True)
    assert pipe(PROMPTS[0], **greedy, num_beams=2) == [{"generated_text": expected}]


def test_a_pipelines_own_temperature_is_not_silent(pipe, write, warnings):
    """Unless `do_sample=False`, a pipeline adds `do_sample=True, temperature=0.7`."""
    pipe = pipe(p_t=0.3)
    written = [pipe(prompt, max_new_tokens=12, return_full_text=False)[0]["generated_text"] for prompt in PROMPTS]
    assert written == write(pipe.model, PROMPTS, max_new_tokens=12, temperature=0.7)
    assert written != write(pipe.model, PROMPTS, max_new_tokens=12)
    assert set(warnings) == {
        "`do_sample=True` does not apply to a gated LM: `gate_sample=True` draws the gate's decisions. A "
        "`temperature`, as a pipeline adds to it, is that of the LM's proposals."
    }


def test_a_pipeline_knows_the_class(pipe, monkeypatch):
    errors = []
    monkeypatch.setattr(pipelines.logger, "error", errors.append)
    pipe()
    assert not errors


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("through", ["generate", "pipeline"])
def test_a_streamer_in_another_thread(pipe, write, tiny_tokenizer, features, through):
    pipe = pipe(features=features)
    prompt = "A prompt of words"
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    settings = {"max_new_tokens": 12, "streamer": streamer}
    if through == "generate":
        call = (pipe.model.generate, (), {**tiny_tokenizer(prompt, return_tensors="pt"), **settings})
    else:
        call = (pipe, (prompt,), settings | {"do_sample": False})
    thread = Thread(target=call[0], args=call[1], kwargs=call[2])
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert ["".join(pieces)] == write(pipe.model, [prompt], max_new_tokens=12)


# transformers' server


@pytest.fixture
def client(gated, tiny_tokenizer):
    """The guide's server on a free port, and an OpenAI client; both end with the test. `client.gated` is the model."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"model": gated(), "tokenizer": tiny_tokenizer}
    code = snippet("Serve(")
    assert "port=8000" in code
    exec(code.replace("port=8000", f'port={port}, host="127.0.0.1", device="cpu"'), names)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            client.gated = names["model"]
            yield client
    finally:
        names["server"].kill_server()


def test_transformers_server_answers_as_generate_does(client, write):
    """Whole and streamed, chats and completions, until a stop string; a request's own sampling does not apply."""
    (chat,) = write(client.gated, CHATS[:1], max_new_tokens=12)
    request = {"model": "gated", "max_tokens": 12}
    chats = request | {"messages": CHATS[0]}
    for sampling in ({}, {"temperature": 0}, {"temperature": 2.0, "top_p": 0.5}):
        answer = client.chat.completions.create(**chats, **sampling)
        assert answer.choices[0].message.content == chat
    pieces = [
        x.choices[0].delta.content or "" for x in client.chat.completions.create(**chats, stream=True) if x.choices
    ]
    assert "".join(pieces) == chat
    assert len([piece for piece in pieces if piece]) > 6, "token by token"
    stop = chat[5]
    answer = client.chat.completions.create(**chats, stop=[stop]).choices[0].message.content
    assert answer == chat[: chat.index(stop) + 1]
    (text,) = write(client.gated, PROMPTS[:1], max_new_tokens=12)
    assert client.completions.create(**request, prompt=PROMPTS[0]).choices[0].text == text
    assert write(client.gated.lm, CHATS[:1], max_new_tokens=12, do_sample=False) != [chat]


@pytest.mark.fault
def test_a_proxys_folder_is_no_checkpoint(gated, tmp_path):
    """What loads by name (`transformers serve`, lm-eval's command line) refuses it, and does not run the LM alone."""
    gated().save_pretrained(tmp_path / "proxy")
    with pytest.raises((ValueError, OSError), match=r"Unrecognized model in .*proxy"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "proxy")


# Compiled and dispatched LMs


@pytest.mark.parametrize("features", FEATURES)
def test_a_dispatched_lm(gated, tiny_tokenizer, tmp_path, write, features):
    """`device_map="auto"`, here of a CPU alone."""
    model = gated(features=features)
    model.lm.save_pretrained(tmp_path / "lm")
    model.save_pretrained(tmp_path / "proxy")
    loaded = ProxyModelForCausalLM.from_pretrained(tmp_path / "lm", tmp_path / "proxy", device_map="auto")
    assert write(loaded, PROMPTS, max_new_tokens=6) == write(model, PROMPTS, max_new_tokens=6)


def test_a_compiled_lm(gated, ragged_batch):
    """What the gate reads is caught inside the compiled LM. `generate` works too, and takes a minute to compile."""
    model, prompts = gated(), ragged_batch((6, 3))
    with torch.no_grad():
        expected = model(**prompts, use_cache=False).logits
        model.lm.compile(backend="eager")
        assert torch.equal(model(**prompts, use_cache=False).logits, expected)
