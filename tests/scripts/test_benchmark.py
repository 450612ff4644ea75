"""scripts/benchmark.py runs on a tiny LM and writes what it measured."""

import importlib
import json
import sys

import pytest
import torch

from eval import memory, speed
from trl_proxy import ProxyConfig, ProxyModelForCausalLM


@pytest.fixture
def script():
    return importlib.import_module("eval.benchmark")


@pytest.fixture
def tiny_arguments(script, tmp_path, tiny_lm, tiny_tokenizer):
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")

    def build(**changes):
        return script.BenchmarkArguments(
            **{
                "model_name_or_path": str(tmp_path / "lm"),
                "dtype": "float32",
                "batch_sizes": [1, 3],
                "prompt_tokens": [5, 9],
                "new_tokens": [4, 6],
                "reject_rates": [0.3, 0.0],
                "rounds": 2,
                "output_dir": str(tmp_path / "out"),
            }
            | changes
        )

    return build


def test_it_times_every_method(script, tiny_arguments, tmp_path, monkeypatch, fork_server):
    monkeypatch.setattr(sys, "executable", fork_server.python)
    monkeypatch.setattr(memory, "MEMORY", ("generate", "prefix", "train"))  # each is its own process
    monkeypatch.setattr(memory, "PRECISIONS", (False,))
    monkeypatch.setattr(memory, "MEMORY_PROCESSES", 1)
    script.benchmark(tiny_arguments())
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    cells = {tuple(list(cell.values())[:4]): cell["methods"] for cell in found["cells"]}
    base = (3, 5, 4, 0.3)
    assert set(cells) == {base, (1, *base[1:]), (3, 9, 4, 0.3), (3, 5, 6, 0.3), (3, 5, 4, 0.0)}
    for methods in cells.values():
        assert methods["generate, sampled"]["ratio"] == 1.0
        assert methods["prefix"]["lm_forwards_per_token"] == 1.0
        assert all(method["tokens_per_second"] > 0 for method in methods.values())
    assert cells[base]["candidate, one by one"]["lm_forwards_per_token"] > 1.25  # the prompt's, and rejections
    one = cells[1, *base[1:]]
    assert one["candidate, tree"]["lm_forwards_per_token"] <= 1.25
    assert one["best of 32"]["lm_forwards_per_token"] == 32
    ratios = found["ratios"]
    candidate = cells[base]["candidate, one by one"]
    assert ratios["candidate_efficiency_b3"] == candidate["ratio"] * candidate["lm_forwards_per_token"]
    assert ratios["tree_vs_generate_b1"] == one["candidate, tree"]["ratio"]
    assert {"prefix_vs_generate_b1", "prefix_vs_generate_b3", "batched_vs_serial_b3", "tree_vs_serial_b1"} < set(
        ratios
    )
    assert 0 < ratios["peak_memory_decode"] < 10
    assert 0 < ratios["peak_memory_train"] < 10
    assert all(peak > 0 for peak in found["memory"].values())
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000


@pytest.mark.fault
def test_an_interrupted_run_goes_on(script, tiny_arguments, tmp_path, monkeypatch):
    measured, measure = [], script.measure

    def interrupted(cell, *args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell)
        return measure(cell, *args)

    monkeypatch.setattr(memory, "MEMORY", ())
    monkeypatch.setattr(script, "measure", interrupted)
    arguments = tiny_arguments(batch_sizes=[3], prompt_tokens=[5], rounds=1)
    with pytest.raises(KeyboardInterrupt):
        script.benchmark(arguments)
    monkeypatch.setattr(script, "measure", lambda cell, *args: [measured.append(cell), measure(cell, *args)][1])
    found = script.benchmark(arguments)
    assert measured == script.grid(arguments)
    assert len(found["cells"]) == len(measured) == 3
    assert [path.name for path in (tmp_path / "out").glob("*.json*")] == ["benchmark.json"]
    script.benchmark(arguments)
    assert len(measured) == 2 * len(found["cells"]), "a finished benchmark is measured again"


@pytest.mark.parametrize("way", ["prefix", "train"])
def test_memory_in_4_bit(script, tiny_arguments, way, capsys):
    found = script.benchmark(tiny_arguments(memory=way, load_in_4bit=True))
    assert found["memory"] > 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == found["memory"]


def test_the_quick_form_has_the_ends_of_the_batch_alone(script, tiny_arguments):
    cells = script.grid(tiny_arguments(quick=True))
    assert [(cell.batch_size, cell.prompt_tokens, cell.new_tokens) for cell in cells] == [(3, 5, 4), (1, 5, 4)]


def test_the_reject_rate_is_what_it_says(script, tiny_lm, tiny_tokenizer):
    """Of the decisions that were taken, the share that rejects."""
    model = ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(p_t=1e-3))
    torch.nn.init.constant_(model.gate.mlp[-1].bias, torch.logit(torch.tensor(0.7)).item())
    ids = speed.prompts_of_length(tiny_tokenizer, 16, 8)
    assert ids.shape == (16, 8)
    decisions = model.generate(ids, max_new_tokens=40, gate_sample=True, return_dict_in_generate=True).decisions
    decided = decisions.proposals.sum() - decisions.forced.sum()
    assert decisions.rank_sum.sum() / decided == pytest.approx(0.3, abs=0.05)


def test_the_serial_loop_writes_what_the_gate_accepts(script, tiny_lm):
    """Accepting everything is greedy decoding at one forward per token, plus the prompt's."""
    lm = tiny_lm("llama")
    model = ProxyModelForCausalLM(lm, ProxyConfig(features="candidate", pooled_features=False))
    torch.nn.init.constant_(model.gate.mlp[-1].bias, 100.0)
    calls = []
    hook = lm.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    assert speed.serial_decode(model, ids, 6) == (6, 7)
    hook.remove()
    plain = lm.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat(calls, dim=1).tolist() == plain.tolist()
    torch.nn.init.constant_(model.gate.mlp[-1].bias, -100.0)
    _, forwards = speed.serial_decode(model, ids, 6)
    assert forwards > 12, "every proposal but the last is rejected"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [0]}, "--batch_sizes must be numbers of at least 1"),
        ({"reject_rates": [1.0]}, r"--reject_rates must lie in \[0, 1\)"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"memory": "all"}, "--memory must be one of generate, prefix, candidate, train"),
    ],
)
def test_bad_input_is_named(tiny_arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_arguments(**changes)
