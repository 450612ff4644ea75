"""Accelerators without one: what runs on pretended devices equals what runs on the CPU, and seldom waits for them."""

import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("on_pretended_devices.py")


@pytest.fixture
def found(fork_server, tiny_lm, tiny_tokenizer, tmp_path):
    """`found(what, kind, dtype)`: what `on_pretended_devices.py` found."""

    def run(*what: str) -> dict:
        tiny_lm("llama", tie=False).save_pretrained(tmp_path / "lm")
        tiny_tokenizer.save_pretrained(tmp_path / "lm")
        log = tmp_path / "log"
        script = fork_server([SCRIPT, tmp_path / "lm", tmp_path / "found.json", *what], tmp_path, log)
        assert script.wait() == 0, log.read_text()[-5000:]
        return json.loads((tmp_path / "found.json").read_text())

    return run


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("prefix", "bfloat16"),
        ("layers", "float32"),
        ("sampled", "bfloat16"),
        ("candidate", "float32"),
        ("candidate, pooled", "bfloat16"),
    ],
)
def test_every_place_decodes_as_the_cpu(found, kind, dtype):
    """LMs on one device, on two, with offloaded parts, and split without accelerate."""
    of_place = found("decoded", kind, dtype)
    on_cpu = of_place.pop("cpu")
    assert sum(on_cpu["rejections"]) > 0
    assert len(of_place) == 5
    for place, here in of_place.items():
        assert here == {name: on_cpu[name] for name in here}, place


@pytest.mark.parametrize("kind", ["pooled", "candidate, pooled"])
def test_the_trainer_leaves_the_lm_where_it_is_and_learns_the_same(found, kind):
    """Rollouts, replay, offloaded rollouts and updates, with the LM on two devices."""
    of_place = found("trained", kind)
    here = of_place["head on the other"]
    assert here["devices"] == ["pretended:0", "pretended:1"]
    # Candidate features: a CPU draws decisions for the candidates that are asked, a device for all.
    wanted = of_place["cpu" if kind == "pooled" else "one device"]
    for x, y in zip(here["proxy"], wanted["proxy"], strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), atol=1e-4, rtol=1e-3)
    assert here["waits"] == {}  # the losses of the updates never ask


def test_decoding_seldom_waits_for_the_device(found):
    """Per token: prefix features as transformers' own `generate`; candidate features once per forward, and twice more
    if all rows go in step."""
    waits = found("waits")
    assert waits["transformers"]["all"] >= 1  # they are counted
    assert waits["pooled"]["by_line"] == {}
    assert waits["pooled"]["all"] <= waits["transformers"]["all"] + 1
    candidate = waits["candidate, pooled"]
    assert candidate["forwards"] > 1  # some candidates are rejected
    assert candidate["ours"] <= candidate["forwards"] + 2, candidate["by_line"]
