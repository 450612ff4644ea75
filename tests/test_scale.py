"""Several processes, large LMs: what accelerate is told, gradients and metrics over two ranks, offloaded LMs."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from trl_proxy import ProxyConfig, ProxyModelForCausalLM

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scripts" / "accelerate_configs"
EXPECTED = {
    "cpu": {"multi_gpu": True, "use_cpu": True, "num_processes": 2},
    "multi_gpu": {"multi_gpu": True},
    "fsdp2": {"use_fsdp": True, "fsdp_version": 2},
    "zero2": {"use_deepspeed": True, "zero_stage": 2},
    "zero3": {"use_deepspeed": True, "zero_stage": 3},
}


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_knows_every_setting(name):
    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)  # refuses unknown keys
    args = launch_command_parser().parse_args(["--config_file", path, "train.py"])
    # What is nested is taken as it is: a misspelt key would be an attribute that nobody reads.
    nested = {**config.fsdp_config, **config.deepspeed_config}
    assert [key for key in nested if not hasattr(args, key)] == []
    args.nondefault = []
    args, defaults, _ = _validate_launch_command(args)
    assert {key: getattr(args, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert args.main_process_port == 0  # a free one, so that launches at the same time do not race for it
    # DeepSpeed casts all weights to the mixed precision: not the gate's, which learns in float32.
    if name == "zero2":
        assert defaults.mixed_precision == "no"


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory, tiny_lm, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(start_ranks, load_ranks, lm_folder, tmp_path_factory, tiny_lm) -> dict[int, dict]:
    """Number of processes -> what they found."""
    root = tmp_path_factory.mktemp("ranks")
    second = ProxyModelForCausalLM(tiny_lm("llama"), ProxyConfig(p_t=0.001, gate_hidden_sizes=[8]))
    second.save_pretrained(root / "proxy")
    found = {1: load_ranks.main(str(lm_folder), str(root / "proxy"), str(root / "1"))}
    for world in (2, 4):
        folder = root / str(world)
        folder.mkdir()
        statuses = start_ranks(
            world, [ROOT / "tests" / "ranks.py", lm_folder, root / "proxy", folder], root, folder / "log"
        )
        assert statuses == [0] * world, (folder / "log").read_text()[-3000:]
        found[world] = json.loads((folder / "found.json").read_text())
    return found


def same(x, y) -> bool:
    """Whether nested lists and dictionaries of numbers are equal, up to the float32 in which a rollout is recorded."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(value, y[key]) for key, value in x.items())
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y or math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-8)


def decisions(found: dict, rollout: int, name: str) -> list[float]:
    """What the decisions of a rollout were worth, in the order of the rows of all processes."""
    return [x for of_process in found["learned_from"] for x in of_process[rollout][name]]


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradients_are_those_of_one_process(found, world):
    one, several = found[1], found[world]
    counts = [sum(of_process[0]["counts"]) for of_process in several["learned_from"]]
    assert counts[0] > 0 == counts[-1], "every process has decisions"
    assert (one["wrapper"], several["wrapper"]) == ("SeededModel", "DistributedDataParallel")
    assert len(one["gradients"]) == 4
    assert same(several["gradients"], one["gradients"])
    assert max(abs(x) for x in one["gradients"][-1]["gate.mlp.0.bias"]) > 1e-4
    # From equal gradients come equal proxies.
    assert all(same(proxy, one["proxies"][0]) for proxy in several["proxies"])


@pytest.mark.parametrize("world", [2, 4])
def test_the_advantages_are_those_of_one_process(found, world):
    for rollout in (0, 1):
        for name in ("counts", "advantages_per_step", "returns", "state_values"):
            expected = decisions(found[1], rollout, name)
            assert same(decisions(found[world], rollout, name), expected), name
            assert len(set(expected)) > 1 or (rollout, name) == (0, "state_values")
    assert sorted(found[world]["rewards"]) == sorted(found[1]["rewards"])
    assert found[world]["table"] == found[1]["table"] == 16
    # The moments of the gate's input are those of the first rollout.
    moments = {name: x for name, x in found[world]["proxies"][0].items() if ".feature_" in name}
    assert same(moments, {name: found[1]["proxies"][0][name] for name in moments})
    assert min(moments["gate.feature_std"]) < 0.9


@pytest.mark.parametrize("world", [2, 4])
def test_the_metrics_are_those_of_one_process(found, world):
    one, several = found[1], found[world]
    for log, expected in zip(several["log"], one["log"], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # transformers sums it in float32
        assert same({**log, "loss": 0.0}, {**expected, "loss": 0.0})
    for generations in (1, 4):  # five prompts leave an uneven last batch
        for name in (f"evaluation_{generations}", f"scored_{generations}"):
            assert several[name].keys() == one[name].keys()
            assert [key for key, x in one[name].items() if not same(several[name][key], x)] == []
        for results in (one, several):
            assert same(results[f"streamed_{generations}"], results[f"evaluation_{generations}"])
    shown = {"reward", "reward_std", "accept_rate", "kl", "explained_variance", "loss", "loss/value", "num_tokens"}
    assert {f"eval_{name}" for name in shown} <= one["evaluation_1"].keys()
    rewards = one["rewards"]
    assert one["log"][0]["reward"] == pytest.approx(sum(rewards[:16]) / 16)


def test_the_lm_is_neither_broadcast_nor_optimized(found):
    two = found[2]
    learned = {f"proxies.default.{name}" for name in two["gradients"][0]}
    assert two["lm"] == [[0.0, True], [1.0, True]]  # nor copied, as it is on its way to `cpu:0`
    assert two["device"] == "cpu"
    assert learned < set(two["broadcast"])
    assert all(name.startswith("proxies.") for name in two["broadcast"])
    # Two more proxies are loaded, and only the active one learns.
    assert set(two["optimized"]) == learned


@pytest.fixture
def rejecting(with_random_gate, ragged_batch):
    """`rejecting(lm, features)` -> a greedy generation of a gate that rejects, with its rollout."""

    def generate(lm, features):
        model = with_random_gate(lm, ProxyConfig(features=features, p_t=0.001, gate_hidden_sizes=[16]))
        return model.generate(**ragged_batch([5, 9, 7]), max_new_tokens=6, output_rollout=True)

    return generate


@pytest.mark.parametrize("features", ["prefix", "candidate"])
@pytest.mark.parametrize("place", ["cpu", "disk", "all on disk"])
def test_an_lm_placed_by_a_device_map(lm_folder, rejecting, tmp_path, features, place):
    """Layers that are kept on disk come back for each forward, as those on another device would."""
    device_map = {"": "cpu"}
    if place != "cpu":
        others = "disk" if place == "all on disk" else "cpu"  # the embedding and the head, too
        device_map = {
            "model.embed_tokens": others,
            "model.layers.0": "disk",
            "model.layers.1": "disk",
            "model.norm": others,
            "model.rotary_emb": "cpu",
            "lm_head": others,
        }
    lm = AutoModelForCausalLM.from_pretrained(lm_folder, device_map=device_map, offload_folder=tmp_path)
    layers = lm.model.layers[1].parameters()
    assert {p.device.type for p in layers} == {"cpu" if place == "cpu" else "meta"}
    placed, whole = rejecting(lm, features), rejecting(AutoModelForCausalLM.from_pretrained(lm_folder), features)
    assert torch.equal(placed.sequences, whole.sequences)
    assert placed.decisions.rank_sum.sum() > 0
    torch.testing.assert_close(placed.rollout.hidden, whole.rollout.hidden)


@pytest.mark.parametrize("features", ["prefix", "candidate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_keeps_what_the_gate_read_in_the_lms_dtype(tiny_lm, rejecting, features, dtype):
    rollout = rejecting(tiny_lm("llama", dtype=dtype), features).rollout
    assert rollout.hidden.dtype == dtype
    assert rollout.mask.any()
