"""Tests of trl_proxy/proxies.py and of what the model makes of it: sums of proxies, a proxy for each row, and which LM
a proxy belongs to."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOTrainer
from trl_proxy.modeling.fingerprint import lm_sha256

LENGTHS = (7, 3, 5, 1)


@pytest.fixture
def two_proxies(with_random_gate, tiny_lm, tmp_path):
    """`two_proxies(features, **changes)`: a model with the proxies `one` and `two`, which differ in `changes`."""

    def build(features: str = "prefix", **changes):
        lm = tiny_lm()
        model = ProxyModelForCausalLM(lm)
        for seed, (name, settings) in enumerate({"one": {}, "two": changes}.items()):
            config = ProxyConfig(**{"features": features, "p_t": 0.01, "max_candidates": 6, **settings})
            with_random_gate(lm, config, scale=2.0, bias=-0.5, seed=seed).save_pretrained(tmp_path / name)
            model.load_proxy(tmp_path / name, name)
        return model

    return build


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_proxies_add_up(two_proxies, ragged_batch, features):
    model, prompts = two_proxies(features, threshold=0.4, gate_hidden_sizes=[32]), ragged_batch(LENGTHS)
    alone = {}
    for name in ("one", "two"):
        model.set_proxy(name)
        alone[name] = model.generate(**prompts, max_new_tokens=10).tolist()
    model.add_weighted_proxy(["one", "two"], [0.5, 2.0], "both")
    model.set_proxy("both")
    output = model.generate(**prompts, max_new_tokens=10, output_rollout=True)
    read = model.rollout_features(output.rollout)
    one, two = (model.proxies[name].gate(read) for name in ("one", "two"))
    added = 0.5 * one + 2.0 * (two - 0.4)
    torch.testing.assert_close(model.gate(read), added)
    accept = output.rollout.accept[output.rollout.mask]
    assert {True, False} == set(accept.tolist())
    assert ((added >= 0) == accept)[added.abs() > 1e-4].all(), "the sum decided"
    assert output.sequences.tolist() not in alone.values()
    for name, weights in {"one": [1.0, 0.0], "two": [0.0, 1.0]}.items():
        model.add_weighted_proxy(["one", "two"], weights, "both")
        assert model.generate(**prompts, max_new_tokens=10).tolist() == alone[name]


def test_only_the_active_proxy_learns(two_proxies):
    """Several processes wait for a gradient of every parameter that requires one."""

    def learning(model):
        return {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}

    model = two_proxies()
    assert learning(model) == {"default"}
    model.set_proxy("two")
    assert learning(model) == {"two"}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.proxy.parameters())
    model.add_weighted_proxy(["one", "two"], [0.5, 0.5], "both")
    assert learning(model) == {"two"}
    model.set_proxy("both")
    assert learning(model) == set()
    model.set_proxy("one")
    assert learning(model) == {"one"}


@pytest.mark.fault
def test_what_does_not_add_up_is_named(two_proxies, tmp_path):
    model = two_proxies(p_t=0.2)
    with pytest.raises(ValueError, match=r"one and two cannot be added: `p_t` is 0\.01 in the one and 0\.2 in"):
        model.add_weighted_proxy(["one", "two"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match="There are 1 weights for 2 proxies"):
        model.add_weighted_proxy(["one", "two"], [1.0], "both")
    with pytest.raises(ValueError, match="There is no proxy 'three' to add; loaded: default, one, two"):
        model.add_weighted_proxy(["one", "three"], [1.0, 1.0], "both")
    assert "both" not in model.proxies
    model.add_weighted_proxy(["one"], [2.0], "more")
    with pytest.raises(ValueError, match="There is no proxy 'more' to add"):
        model.add_weighted_proxy(["more"], [1.0], "most")
    model.set_proxy("more")
    with pytest.raises(ValueError, match="'more' is a sum of others: save those"):
        model.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match="'more' is a sum of others: train one of those"):
        ProxyPPOTrainer(model, lambda **_: [], train_dataset=Dataset.from_dict({"prompt": ["a"]}))


@pytest.mark.fault
def test_a_deleted_proxy_is_gone(two_proxies, ragged_batch):
    model, prompts = two_proxies(), ragged_batch(LENGTHS)
    model.add_weighted_proxy(["one", "two"], [1.0, 1.0], "both")
    model.set_proxy("both")
    expected = model.generate(**prompts, max_new_tokens=10).tolist()
    with pytest.raises(ValueError, match="'both' is the active one"):
        model.delete_proxy("both")
    model.delete_proxy("one")
    assert list(model.proxies) == ["default", "two", "both"]
    assert model.generate(**prompts, max_new_tokens=10).tolist() == expected, "the sum keeps its parts"
    with pytest.raises(ValueError, match="There is no proxy 'one'; loaded: default, two, both"):
        model.delete_proxy("one")


# A proxy for each row


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_each_row_has_its_proxy(two_proxies, ragged_batch, features, tree):
    model, prompts = two_proxies(features, threshold=0.4, gate_hidden_sizes=[32]), ragged_batch(LENGTHS)
    options = {"max_new_tokens": 10, "num_return_sequences": 2, "tree": tree}
    names = ["two", "__base__", "one", "two"]
    alone = {"__base__": model.lm.generate(**prompts, max_new_tokens=10, do_sample=False, num_return_sequences=1)}
    alone["__base__"] = alone["__base__"].repeat_interleave(2, dim=0)
    for name in ("one", "two"):
        model.set_proxy(name)
        alone[name] = model.generate(**prompts, **options)
    model.set_proxy("default")
    mixed = model.generate(**prompts, **options, proxy_names=names)
    width = mixed.shape[1]
    assert len({str(output[0].tolist()) for output in alone.values()}) == 3, "they differ"
    for row, name in enumerate(name for name in names for _ in range(2)):
        expected = alone[name][row]
        assert mixed[row, : len(expected)].tolist() == expected[:width].tolist(), name
    assert model.active_proxy == "default"


def test_a_threshold_counts_from_each_rows_own(two_proxies, ragged_batch):
    model, prompts = two_proxies(threshold=0.4), ragged_batch(LENGTHS)
    model.set_proxy("two")
    expected = model.generate(**prompts, max_new_tokens=10, threshold=1.4)
    mixed = model.generate(**prompts, max_new_tokens=10, threshold=1.0, proxy_names=["two"] * 4)
    assert mixed.tolist() == expected.tolist()
    assert mixed.tolist() != model.generate(**prompts, max_new_tokens=10).tolist()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one"], "`proxy_names` has 1 names for 4 prompts"),
        (["one", "two", "three", "one"], "There is no proxy 'three'; loaded: default, one, two"),
        (["__base__"] * 4, "names no proxy: decode inside"),
        (["one", "two", "one", "one"], r"one and two cannot decode in one batch: `p_t` is 0\.01 in the one and 0\.2"),
    ],
)
def test_proxies_that_do_not_go_together_are_named(two_proxies, ragged_batch, names, message):
    model = two_proxies(p_t=0.2)
    with pytest.raises(ValueError, match=message):
        model.generate(**ragged_batch(LENGTHS), max_new_tokens=4, proxy_names=names)


# Which LM a proxy belongs to


@pytest.mark.fault
def test_a_proxy_knows_its_lm(tiny_lm, four_bit_lm, tmp_path):
    """Its weights in another dtype, in 4 bit or under an adapter are the same LM; another training of it is not."""
    lm = tiny_lm("llama")
    ProxyModelForCausalLM(lm, ProxyConfig(gate_hidden_sizes=[8])).save_pretrained(tmp_path / "proxy")
    tuned = get_peft_model(tiny_lm("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for same in (lm, tiny_lm("llama", dtype=torch.bfloat16), four_bit_lm, tuned):
        assert ProxyModelForCausalLM.from_pretrained(same, tmp_path / "proxy").proxy_config.gate_hidden_sizes == [8]
    other = tiny_lm("llama", seed=1)
    assert lm_sha256(other) != lm_sha256(lm) == lm_sha256(tuned)
    model = ProxyModelForCausalLM(other)
    for load in (
        lambda **check: ProxyModelForCausalLM.from_pretrained(other, tmp_path / "proxy", **check),
        lambda **check: model.load_proxy(tmp_path / "proxy", "mine", **check),
    ):
        with pytest.raises(ValueError, match=r"proxy was trained over another LM, whose sizes or embeddings differ"):
            load()
        load(check_base_model=False)
    assert model.proxies["mine"].config.base_model_sha256 == lm_sha256(other), "saved again, it is this LM's"
    path = tmp_path / "proxy" / "proxy_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_sha256": None}))
    ProxyModelForCausalLM.from_pretrained(other, tmp_path / "proxy")  # saved before there were checksums


def test_one_changed_layer_size_is_another_lm(tiny_lm):
    lm = tiny_lm("llama")
    before = lm_sha256(lm)
    lm.config.num_hidden_layers += 1
    assert lm_sha256(lm) != before


def test_embeddings_elsewhere_are_not_checked(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    ProxyModelForCausalLM(lm).save_pretrained(tmp_path / "proxy")
    sha256 = lm_sha256(lm)
    lm.model.embed_tokens.to("meta")
    assert lm_sha256(lm) is None
    lm.model.embed_tokens = tiny_lm("llama").model.embed_tokens
    assert lm_sha256(lm) == sha256


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_a_proxy_over_a_tuned_lm(tiny_lm, with_random_gate, ragged_batch, tmp_path, features):
    """LoRA under the proxy: what it decodes is what it decodes over the merged weights; it trains the gate alone."""
    tuned = get_peft_model(tiny_lm("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    prompts, config = ragged_batch(LENGTHS), ProxyConfig(features=features, p_t=0.01, max_candidates=6)
    model = with_random_gate(tuned, config, scale=2.0, bias=-0.5)
    model.save_pretrained(tmp_path / "proxy")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"proxies"}
    ours = model.generate(**prompts, max_new_tokens=10).tolist()
    assert (
        ours
        != with_random_gate(tiny_lm("llama"), config, scale=2.0, bias=-0.5)
        .generate(**prompts, max_new_tokens=10)
        .tolist()
    ), "the adapter matters"
    merged = ProxyModelForCausalLM.from_pretrained(tuned.merge_and_unload(), tmp_path / "proxy")
    assert merged.generate(**prompts, max_new_tokens=10).tolist() == ours
