"""Several processes, large LMs: what accelerate is told, gradients and metrics over two ranks, offloaded LMs."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from trl_proxy import ProxyConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scripts" / "accelerate_configs"
EXPECTED = {
    "cpu": {"multi_gpu": True, "use_cpu": True, "num_processes": 2, "main_process_port": 0},
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
def two(launch_two, lm_folder, tmp_path_factory) -> dict:
    """What two gloo ranks found, launched by the shipped configuration."""
    folder = tmp_path_factory.mktemp("two")
    result = launch_two("tests/two_ranks.py", [lm_folder, folder], config=CONFIGS / "multi_gpu.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_the_gradient_is_the_mean_over_the_processes(two):
    assert two["wrapper"] == "DistributedDataParallel"
    assert min(two["decisions"]) > 0
    assert two["decisions"][0] != two["decisions"][1]
    assert max(two["gradients"].values()) > 0.1
    assert two["gradient_error"] < 1e-6
    # From equal gradients, and from moments of the gate's input over all processes, come equal proxies.
    assert two["proxies"][0] == two["proxies"][1]


def test_the_lm_is_neither_broadcast_nor_optimized(two):
    proxy = {name for name in two["broadcast"] if name.startswith("proxies.")}
    assert set(two["broadcast"]) == proxy
    assert two["lm_is_unchanged"] == [True, True]
    assert (two["device"], two["lm_stays"]) == ("cpu", [True, True])  # nor copied, as it is on its way to `cpu:0`
    assert set(two["optimized"]) == set(two["gradients"]) == {name for name in proxy if ".feature_" not in name}


def test_rewards_and_metrics_are_of_all_processes(two, load_two_ranks, lm_folder, tmp_path):
    assert len(two["rewards"]) == two["table"] == 8
    assert two["log"]["reward"] == pytest.approx(sum(two["rewards"]) / 8)
    assert two["log"]["rewards/upper_case/mean"] == pytest.approx(sum(two["rewards"]) / 8)
    # One process with batches of all: the same greedy decisions, so the same metrics.
    one = load_two_ranks.main(str(lm_folder), str(tmp_path), world_size=1)
    assert one["wrapper"] == "ProxyModelForCausalLM"
    assert two["even_scored"] == one["even_scored"]
    same = {key for key in one["even"] if not key.startswith(("eval_num_tokens", "eval_model"))}
    shown = {"eval_reward", "eval_reward_std", "eval_accept_rate", "eval_kl", "eval_explained_variance", "eval_loss"}
    assert shown <= same
    for key in same:
        assert two["even"][key] == pytest.approx(one["even"][key], abs=1e-5), key
    # The last batch of the two processes has one prompt and three that fill it up.
    for key in same:
        assert two["uneven"][key] == pytest.approx(one["uneven"][key], abs=1e-5), key
    worth = [one["uneven_scored"][prompt] for prompt in one["uneven_scored"]]
    assert two["uneven"]["eval_reward"] == pytest.approx(sum(worth) / 5)
    assert two["uneven"]["eval_reward_std"] == pytest.approx(statistics.stdev(worth))


def test_an_uneven_last_batch(two):
    """Five prompts by two processes of two: nobody waits for ever, every prompt is scored."""
    assert two["uneven_scored"] == {prompt: two["even_scored"][prompt] for prompt in two["uneven_scored"]}
    assert len(two["uneven_scored"]) == 5


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
