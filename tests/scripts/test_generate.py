"""scripts/generate.py: a question, an answer, and the trace of what was proposed."""

import importlib
import io
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import ModelConfig

from trl_proxy import ProxyConfig, ProxyModelForCausalLM


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("trl_proxy.runs.ask")


@pytest.fixture
def saved(tmp_path, tiny_lm, tiny_tokenizer, with_random_gate):
    """`saved(features)` -> flags that name a tiny LM and a proxy over it."""

    def build(features):
        lm = tiny_lm("llama")
        lm.save_pretrained(tmp_path / "lm")
        tiny_tokenizer.save_pretrained(tmp_path / "lm")
        with_random_gate(lm, ProxyConfig(features=features, p_t=0.01)).save_pretrained(tmp_path / "proxy")
        return ["--model_name_or_path", str(tmp_path / "lm"), "--proxy", str(tmp_path / "proxy")]

    return build


def unmark(printed: str) -> tuple[str, list[tuple[int, str]]]:
    """The response of a trace without colours, and the rejected texts with their places in it; by the legend alone."""
    legend, _, text = printed.partition("\n")
    opening, closing = legend.split("text")[0], legend.split("text")[1].split()[0]
    parts = re.split(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, flags=re.DOTALL)
    response, rejected = parts[0], []
    for mark, kept in zip(parts[1::2], parts[2::2], strict=True):
        rejected.append((len(response), mark))
        response += kept
    return response, rejected


def printed_by(script, tokens, **kwargs) -> str:
    """What a console of 20 columns prints, by default one that is no terminal."""
    console = Console(file=io.StringIO(), width=20, highlight=False, **{"_environ": {}, **kwargs})
    script.print_trace(console, tokens)
    return console.file.getvalue().removesuffix("\n")


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_the_trace_shows_rejections_and_the_same_response(script, saved, tiny_lm, tiny_tokenizer, features):
    flags = saved(features)
    model = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), flags[-1])
    inputs = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=40, output_rollout=True)
    width = inputs["input_ids"].shape[1]
    tokens = script.read_trace(tiny_tokenizer, output, width)
    expected = tiny_tokenizer.decode(output.sequences[0, width:])

    response, rejected = unmark(printed_by(script, tokens))
    assert response == expected
    assert len(rejected) == int(output.decisions.rank_sum[0]) > 0
    assert sum(token.asked for token in tokens) == int(output.decisions.accepts[0])

    text = script.colored_trace(tokens)
    begin = text.plain.index("\n") + 1
    struck = [span for span in text.spans if "strike" in str(span.style) and span.start >= begin]
    assert len(struck) == len(rejected)
    kept, at = "", begin
    for span in struck:
        kept += text.plain[at : span.start]
        at = span.end
    assert kept + text.plain[at:] == expected


def test_without_colours_rejected_texts_are_marked(script):
    """Each token is a byte; the proxy rejects a letter, a space, bytes of characters, and a line break."""
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    # `好` is E5 A5 BD in UTF-8, and `奄` is E5 A5 84.
    response, other, rejected = map(tokenizer.encode, ("Un café 😀 — 你好", "奄", "E \n"))
    decisions = [
        (0, rejected[0], False),
        (0, rejected[1], False),
        (0, response[0], True),
        (9, other[0], False),  # in place of the emoji's first byte
        (len(response) - 3, rejected[2], False),
        (len(response) - 1, other[-1], False),  # in place of the last byte
    ]
    positions, token_ids, accept = (torch.tensor([column]) for column in zip(*decisions, strict=True))
    output = SimpleNamespace(
        sequences=torch.tensor([[7, 7, *response]]),  # a prompt of two tokens
        decisions=SimpleNamespace(tokens=torch.tensor([len(response)])),
        rollout=SimpleNamespace(positions=positions, token_ids=token_ids, accept=accept, mask=torch.ones_like(accept)),
    )
    tokens = script.read_trace(tokenizer, output, 2)
    assert [token.asked for token in tokens] == [True] + [False] * (len(response) - 1)
    assert printed_by(script, tokens) == (
        "[-text-] was rejected; the text after it was accepted in its place\n"
        "[-E-][- -]Un café [-<0xE5>-]😀 — 你[-\\n-][-奄-]好"
    )


PIECES = st.text(st.sampled_from("[]-a \n\t\\"), max_size=6)


@given(st.lists(st.tuples(PIECES, st.booleans(), st.lists(PIECES, max_size=3)), min_size=1))
def test_texts_that_look_like_marks_stay_texts(script, pieces):
    tokens = [script.TracedText(text, asked, list(map(script.visible, texts))) for text, asked, texts in pieces]
    response, rejected = unmark(printed_by(script, tokens))
    assert response == "".join(text for text, _, _ in pieces)
    expected, place = [], 0
    for token in tokens:
        expected += [(place, text) for text in token.rejected]
        place += len(token.text)
    assert rejected == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\n", "\\n"), ("\\n", "\\\\n"), ("\t\x1b[0m", "\\t\\x1b[0m"), (" é 你😀", " é 你😀"), ("\u200d", "\\u200d")],
)
def test_rejected_texts_are_visible_on_one_line(script, text, expected):
    assert script.visible(text) == expected


def test_colours_are_used_where_there_are_any(script):
    tokens = [script.TracedText("Un café 😀 — 你好, et bien plus", True, ["The"]), script.TracedText("!", False, [])]
    plain = printed_by(script, tokens)
    assert "\x1b" not in plain
    colored = printed_by(script, tokens, force_terminal=True, color_system="standard")
    legend, text = colored.split("\n")
    assert "\x1b[32maccepted\x1b[0m, \x1b[9;31mrejected\x1b[0m" in legend
    assert text == "\x1b[9;31mThe\x1b[0m\x1b[32mUn café 😀 — 你好, et bien plus\x1b[0m!"
    # A terminal that has no colours, or whose user wants none.
    assert printed_by(script, tokens, force_terminal=True, no_color=True, color_system="standard") == plain
    assert printed_by(script, tokens, force_terminal=True, _environ={"TERM": "dumb"}) == plain
    assert (
        printed_by(script, tokens, force_terminal=True, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"}) == plain
    )
    assert "\x1b" in printed_by(script, tokens, force_terminal=True, _environ={"TERM": "xterm-256color"})


def test_it_prints_an_answer_with_and_without_a_proxy(script, saved, capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    flags = saved("prefix")
    script.ask(script.make_parser().parse_args(["Hello", *flags, "--max_new_tokens", "8", "--trace"]))
    printed = capsys.readouterr().out
    assert "8 tokens," in " ".join(printed.split())
    assert printed.startswith("[-text-] was rejected")
    assert len(unmark("\n".join(printed.split("\n")[:2]))[1]) == int(re.search(r"(\d+)\s+rejected", printed)[1]) > 0
    script.ask(script.make_parser().parse_args(["Hello", *flags[:2], "--max_new_tokens", "8"]))
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("cpu", [True, False])
def test_the_lm_is_loaded_as_in_the_other_scripts(script, saved, monkeypatch, capsys, cpu):
    """On the accelerator unless the CPU is asked for, with the flags of compare.py, in the weights' own dtype."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    loaded = []

    class Loaded(Exception):
        pass

    def load(model_args, args, device):
        loaded.extend([model_args, args, device])
        raise Loaded

    monkeypatch.setattr(script, "load_policy", load)
    words = ["--load_in_4bit", *saved("prefix"), "--attn_implementation", "eager", "--model_revision", "v1"]
    words += ["--trust_remote_code", "--use_bnb_nested_quant", *["--use_cpu"] * cpu]
    with pytest.raises(Loaded):
        script.ask(script.make_parser().parse_args([*words, "--load_in_8bit", "false", "Hello"]))
    model_args, args, device = loaded
    assert isinstance(model_args, ModelConfig)
    assert (model_args.load_in_4bit, model_args.use_bnb_nested_quant, model_args.load_in_8bit) == (True, True, False)
    assert (model_args.attn_implementation, model_args.model_revision, model_args.dtype) == ("eager", "v1", "auto")
    assert (args.trust_remote_code, device.type) == (True, "cpu" if cpu else "meta")


def test_a_question_may_follow_any_option(script):
    parser = script.make_parser()
    for words in (["--load_in_4bit", "How?"], ["How?", "--load_in_4bit"], ["--load_in_4bit", "true", "How?"]):
        args = parser.parse_args(words)
        assert (args.prompt, args.load_in_4bit) == ("How?", True)
    args = parser.parse_args(["--load_in_4bit", "no", "--threshold", "-1e-5", "How?"])
    assert (args.load_in_4bit, args.threshold) == (False, -1e-5)
    assert "lora" not in parser.format_help()


def test_an_answer_in_4_bit(script, saved, capsys):
    words = ["Hello", *saved("prefix"), "--max_new_tokens", "4", "--load_in_4bit"]
    script.ask(script.make_parser().parse_args(words))
    assert "4 tokens" in capsys.readouterr().out


@pytest.mark.fault
def test_mistakes_are_one_sentence(script, saved, tmp_path):
    flags = saved("prefix")
    with pytest.raises(ValueError, match="name one with --proxy"):
        script.ask(script.make_parser().parse_args(["Hello", "--trace"]))
    with pytest.raises(ValueError, match="unrecognized arguments: --lod_in_4bit"):
        script.make_parser().parse_args(["Hello", "--lod_in_4bit"])
    with pytest.raises(ValueError, match=r"use_peft.*frozen"):
        script.ask(script.make_parser().parse_args(["Hello", "--use_peft"]))
    with pytest.raises(ValueError, match="holds no proxy"):
        script.ask(script.make_parser().parse_args(["Hello", *flags[:2], "--proxy", str(tmp_path / "lm")]))
