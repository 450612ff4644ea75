"""scripts/generate.py: a question, an answer, and the trace of what was proposed."""

import pytest

from trl_proxy import ProxyConfig


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("generate")


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


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_the_trace_shows_rejections_and_the_same_response(script, saved, tiny_lm, tiny_tokenizer, features):
    from trl_proxy import ProxyModelForCausalLM

    flags = saved(features)
    model = ProxyModelForCausalLM.from_pretrained(tiny_lm("llama"), flags[-1])
    inputs = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, output_rollout=True)
    width = inputs["input_ids"].shape[1]
    text = script.trace_text(tiny_tokenizer, output, width)
    struck = [span for span in text.spans if "strike" in str(span.style)]
    assert len(struck) == int(output.decisions.rank_sum[0]) > 0
    kept, at = "", 0
    for span in struck:
        kept += text.plain[at : span.start]
        at = span.end
    kept += text.plain[at:]
    assert kept == tiny_tokenizer.decode(output.sequences[0, width:])


def test_it_prints_an_answer_with_and_without_a_proxy(script, saved, capsys):
    flags = saved("prefix")
    script.main(script.make_parser().parse_args(["Hello", *flags, "--max_new_tokens", "8", "--trace"]))
    assert "8 tokens," in " ".join(capsys.readouterr().out.split())
    script.main(script.make_parser().parse_args(["Hello", *flags[:2], "--max_new_tokens", "8"]))
    assert capsys.readouterr().out.strip()


@pytest.mark.fault
def test_mistakes_are_one_sentence(script, saved, tmp_path):
    flags = saved("prefix")
    with pytest.raises(ValueError, match="name one with --proxy"):
        script.main(script.make_parser().parse_args(["Hello", "--trace"]))
    with pytest.raises(ValueError, match="holds no proxy"):
        script.main(script.make_parser().parse_args(["Hello", *flags[:2], "--proxy", str(tmp_path / "lm")]))
