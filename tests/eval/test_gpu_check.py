"""The check of a GPU: in its tiny form on the CPU, and a few of its parts on a GPU if there is one."""

import itertools
import json
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval import gpu_check
from eval.gpu_check import FULL, PARTS, TINY, GpuCheckArguments

ROW = {"what": "x", "unit": "s", "gated": 1.0, "reference": None, "ratio": None}


def test_the_tiny_form_fills_one_file_and_one_table(tmp_path, capsys):
    arguments = GpuCheckArguments(tiny=True, output=str(tmp_path / "check.json"))
    gpu_check.gpu_check(arguments)
    check = json.loads((tmp_path / "check.json").read_text())
    assert {name: part["status"] for name, part in check["parts"].items()} == dict.fromkeys(PARTS, "done")
    rows = {(row["what"], row["unit"]): row for part in check["parts"].values() for row in part["rows"]}
    assert len([row for row in rows.values() if row["unit"] == "rows"]) == 5
    assert all(rows["training, 8 x 4", unit]["ratio"] > 0 for unit in ("s/step", "MiB at most"))
    assert rows["tiny in 4 bit, batch 4", "tokens/s"]["ratio"] > 0
    assert rows["prefix features", "waits/token"]["gated"] is None  # torch counts those of CUDA alone
    printed = capsys.readouterr().out
    assert all(what in printed for what, _ in rows)


@pytest.mark.fault
def test_decoding_that_is_not_exact_and_parts_that_fail_are_told(monkeypatch, tmp_path):
    arguments = GpuCheckArguments(tiny=True, output=str(tmp_path / "check.json"))
    part = {"status": "done", "seconds": 0.0, "rows": []}
    for exact, other, message in (
        ({"gated": 3, "reference": 4}, "done", "not exact on .*: x"),
        ({"gated": 0, "reference": 0}, "done", "not exact on .*: x"),
        ({"gated": 4, "reference": 4}, "failed: no memory", "not complete: speed failed: no memory"),
    ):
        parts = {"exactness": {**part, "rows": [{**ROW, **exact}]}, "speed": {**part, "status": other}}
        monkeypatch.setattr(gpu_check, "measure", lambda args, parts=parts: parts)
        with pytest.raises(ValueError, match=message):
            gpu_check.gpu_check(arguments)
        assert json.loads((tmp_path / "check.json").read_text())["parts"] == parts


def test_the_loop_by_hand_notices_another_fast_path(monkeypatch):
    """A gate that decides the other way round is not what the loop computes."""
    true = gpu_check.ProxyModelForCausalLM.generate

    def generate(self, *args, **kwargs):
        with torch.no_grad():
            self.gate.mlp[-1].weight.neg_()
            output = true(self, *args, **kwargs)
            self.gate.mlp[-1].weight.neg_()
        return output

    monkeypatch.setattr(gpu_check.ProxyModelForCausalLM, "generate", generate)
    same, by_hand = itertools.islice(gpu_check.exactness(TINY, torch.device("cpu")), 2)
    assert same.gated == same.reference
    assert by_hand.gated < by_hand.reference


@pytest.mark.fault
def test_a_part_is_stopped_when_its_time_is_over_and_keeps_its_figures():
    program = f"import time; print({{'a': 1}}); print({json.dumps(json.dumps(ROW))}, flush=True); "
    command = [sys.executable, "-S", "-c"]
    assert gpu_check.run_apart([*command, program + "time.sleep(60)"], 1.0) == ([ROW], "stopped after its 1 s")
    failing = program + "raise RuntimeError('CUDA out of memory')"
    assert gpu_check.run_apart([*command, failing], 30.0) == ([ROW], "failed: RuntimeError: CUDA out of memory")
    assert gpu_check.run_apart([*command, program], 30.0) == ([ROW], "done")


def test_what_does_not_fit_into_the_time_is_skipped(monkeypatch):
    given = {}

    def run(command, seconds):
        given[command[-1]] = seconds
        now[0] += 300.0 if command[-1] == "waits" else 1.0
        return [], "done"

    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_check, "run_apart", run)
    results = gpu_check.measure(GpuCheckArguments(seconds=400.0))
    assert given == {"exactness": 45.0, "waits": 30.0, "training": 99.0, "vllm": 85.0}
    assert results["speed"]["status"] == "skipped: 98 s are left, it needs 200 s"
    assert sum(part.seconds for part in PARTS.values()) <= GpuCheckArguments().seconds == 480.0


def test_4_bit_is_that_of_from_pretrained(four_bit_lm, tiny_lm, ragged_batch):
    lm = AutoModelForCausalLM.from_config(tiny_lm().config)
    lm.load_state_dict(tiny_lm().state_dict())
    gpu_check.to_4_bit(lm.eval(), torch.float32)
    batch = ragged_batch([5, 3])
    with torch.no_grad():
        torch.testing.assert_close(lm(**batch).logits, four_bit_lm(**batch).logits)


def test_waits_are_counted_by_torchs_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for message in (
            "called a synchronizing CUDA operation",
            "something else",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(message, stacklevel=1)

    assert gpu_check.count_waits(run) == 2
    assert modes == ["warn", "default"]


@pytest.mark.fault
def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--part must be one of exactness, .*, got speeds"):
        GpuCheckArguments(part="speeds")
    with pytest.raises(ValueError, match="--seconds must be above 0, got nan"):
        GpuCheckArguments(seconds=float("nan"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device: --tiny"):
            gpu_check.gpu_check(GpuCheckArguments(output=str(tmp_path / "check.json")))


@pytest.mark.gpu
class TestOnAGpu:
    """The same checks there."""

    def test_decoding_is_exact(self):
        rows = list(gpu_check.exactness(FULL, torch.device("cuda")))
        assert all(row.gated == row.reference > 0 for row in rows), rows

    @pytest.mark.parametrize("way", ["proxy", "ppo"])
    def test_trainers_run(self, way):
        assert all(value >= 0 for value in gpu_check.train(TINY, torch.device("cuda", 0), way).values())

    def test_waits_are_seen(self):
        rows = list(gpu_check.waits(TINY, torch.device("cuda")))
        assert all(row.reference >= 1 and row.gated >= row.reference for row in rows), rows
