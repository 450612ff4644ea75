"""trl_proxy/modeling/card.py: a proxy's card says what it is and what was measured."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from trl_proxy import ProxyConfig
from trl_proxy.modeling.card import add_results, proxy_card

RECORD = {
    "dataset": "embedded/test@sha256:0123",
    "reward_model": "embedded",
    "n_prompts": 256,
    "max_new_tokens": 24,
    "reward_mean": 0.67,
    "reward_ci95": [0.6, 0.75],
    "delta_vs_sft": 0.41,
    "delta_ci95": [0.33, 0.5],
    "gold_delta_vs_sft": None,
    "win_rate_vs_sft": 0.71,
    "win_rate_ci95": [0.65, 0.76],
    "lm_logprob_per_token": -1.23,
}


def config(**values) -> ProxyConfig:
    return ProxyConfig(hidden_size=64, embedding_size=64, **values)


def test_results_are_for_readers_and_for_the_hub(tmp_path):
    path = tmp_path / "README.md"
    proxy_card(config(base_model_name_or_path="owner/lm"), 5, 1005, revision="abc").save(path)
    before = path.read_text()
    add_results(path, RECORD)
    once = path.read_text()
    add_results(path, RECORD | {"delta_vs_sft": 0.3})
    add_results(path, RECORD)
    assert path.read_text() == once, "the latest evaluation alone"
    assert "- gain over the LM's greedy decoding: 0.410 (95 % interval 0.330 to 0.500)\n" in once
    assert "gold" not in once
    assert "Measured on 256 prompts (embedded/test@sha256:0123)" in once
    (index,) = ModelCard.load(path).data.to_dict()["model-index"]
    metrics = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert metrics["delta_vs_sft"] == 0.41
    assert set(metrics) == {"reward_mean", "delta_vs_sft", "win_rate_vs_sft", "lm_logprob_per_token"}
    assert all(line in once for line in before.partition("# proxy")[2].splitlines()), "nothing else is lost"


@pytest.mark.parametrize(("base", "on_hub"), [("owner/lm", True), ("/some/folder", False), ("embedded", False)])
def test_the_lm_and_its_revision_are_named(base, on_hub, tmp_path):
    base = str(tmp_path) if base == "/some/folder" else base
    card = proxy_card(config(base_model_name_or_path=base), 888, 100_888, revision="abc")
    assert f'from_pretrained("{base}", revision="abc")' in card.text
    assert "888 parameters, 0.89 % of the LM's" in card.text
    assert card.data.base_model == (base if on_hub else None)


@pytest.mark.parametrize(
    "base",
    ['x"); import os; os.system("id")  #', "a\nb", "C:\\models\\lm", "`x` ```\n# title", "\ud7ff\u2028é'", "<!-- x"],
)
def test_a_name_from_a_downloaded_proxy_is_text_alone(base):
    """In the Python block it is one literal, and it ends no code or line around it."""
    card = proxy_card(config(base_model_name_or_path=base), 888, 100_888, revision=base)
    (block,) = re.findall(r"^```python\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)
    (call,) = [
        node.value for node in ast.parse(block).body if "AutoModel" in ast.unparse(node) and hasattr(node, "value")
    ]
    assert ast.literal_eval(call.args[0]) == base
    assert ast.literal_eval(call.keywords[0].value) == base
    assert [line for line in card.text.splitlines() if line.startswith("#")] == ["# proxy"]


@pytest.mark.parametrize(
    "mark", ["<!-- results -->", "<!-- end of results -->", "x<!-- results -->\n<!-- results -->"]
)
@pytest.mark.parametrize("where", ["base", "revision", "training", "name", "dataset", "reward_model"])
def test_no_value_stands_for_the_marks_around_the_results(tmp_path, where, mark):
    """The results are replaced, and nothing else is, whoever wrote the names."""
    path = tmp_path / "README.md"
    of_card = {where: mark} if where in ("revision", "training", "name") else {}
    proxy_card(config(base_model_name_or_path=mark if where == "base" else "lm"), 5, 1005, **of_card).save(path)
    before = ModelCard.load(path).text
    record = RECORD | ({where: mark} if where in RECORD else {})
    add_results(path, record)
    once = path.read_text()
    add_results(path, record)
    assert path.read_text() == once
    text = ModelCard.load(path).text
    assert [text.count(x) for x in ("<!-- results -->", "<!-- end of results -->")] == [1, 1]
    assert all(line in text for line in before.splitlines())
