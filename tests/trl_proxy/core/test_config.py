"""Tests of trl_proxy/config.py: bad values are refused by name, and configurations survive the disk."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from trl_proxy import PPOConfig, ProxyConfig, ProxyPPOConfig
from trl_proxy.core.config import proxy_file

NAN, INF = float("nan"), float("inf")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("p_t", v) for v in (0.0, -0.1, 1.0001, NAN, INF)],
        *[("temperature", v) for v in (0.0, -1.0, NAN)],
        *[("max_candidates", v) for v in (0, -1, 2.5)],
        *[("threshold", v) for v in (NAN, INF)],
        *[("initial_accept_bias", v) for v in (-0.5,)],
        *[("gate_hidden_sizes", v) for v in ([], [0], [64, -1])],
        *[("p_t_mode", v) for v in ("min-p", "Relative", "", None)],
        *[("proposal", v) for v in ("greedy", "", None)],
        *[("features", v) for v in ("both", "Prefix", None)],
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be .*got .*{value if value else ''}".replace("[", r"\[")):
        ProxyConfig(**{field: value})


@pytest.mark.fault
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoding": 5}, "`decoding` must be a dict, got 5"),
        ({"decoding": {"generation_kwargs": [1]}}, "`decoding` may have .*, got {'generation_kwargs': \\[1\\]}"),
        ({"decoding": {"chat_template_kwargs": 5}}, "`decoding` may have .*, got {'chat_template_kwargs': 5}"),
        ({"decoding": {"system_prompt": 5}}, "`decoding` may have .*, got {'system_prompt': 5}"),
        ({"decoding": {"foo": 1}}, "`decoding` may have .*, got {'foo': 1}"),
        ({"pooled_features": "no"}, "`pooled_features` must be true or false, got 'no'"),
        ({"base_model_sha256": 5}, "`base_model_sha256` must be text, got 5"),
    ],
)
def test_a_bad_value_of_a_downloaded_proxy(values, message, tmp_path):
    (tmp_path / "proxy_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^proxy_config.json of {tmp_path}: {message}"):
        ProxyConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"p_t": 1.0}, {"p_t": 1e-9}, {"max_candidates": 1}, {"temperature": 0.01}, {"initial_accept_bias": 0.0}],
)
def test_bounds_are_allowed(values):
    assert dataclasses.asdict(ProxyConfig(**values)).items() >= values.items()


def test_round_trip(tmp_path):
    config = ProxyConfig(
        p_t=0.01,
        p_t_mode="absolute",
        max_candidates=7,
        temperature=0.5,
        proposal="sampled",
        features="candidate",
        feature_layers=[2, 4],
        pooled_features=False,
        gate_hidden_sizes=[32, 16],
        initial_accept_bias=2.0,
        threshold=-0.25,
        hidden_size=64,
        embedding_size=48,
        base_model_name_or_path="somewhere/some-lm",
        base_model_sha256="0" * 64,
        decoding={"system_prompt": "Be brief."},
    )
    defaults = ProxyConfig()
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(defaults, f.name)}
    assert changed == {f.name for f in dataclasses.fields(config)}
    config.save_pretrained(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["proxy_config.json"]
    assert ProxyConfig.from_pretrained(tmp_path / "new" / "folder") == config


@pytest.mark.fault
def test_unknown_keys_are_named(tmp_path):
    ProxyConfig().save_pretrained(tmp_path)
    path = tmp_path / "proxy_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"p_top": 0.1, "gamma": 1.0}))
    with pytest.raises(ValueError, match=r"proxy_config\.json of .* has unknown keys: gamma, p_top"):
        ProxyConfig.from_pretrained(tmp_path)


@pytest.mark.fault
def test_bad_values_on_disk_are_named(tmp_path):
    ProxyConfig().save_pretrained(tmp_path)
    path = tmp_path / "proxy_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"p_t": 2.0}))
    with pytest.raises(ValueError, match=r"`p_t` must be in \(0, 1\], got 2.0"):
        ProxyConfig.from_pretrained(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("content", ["", '{"p_t": 0.', "[1, 2]", "\x00\x01"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "proxy_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"proxy_config\.json"):
        ProxyConfig.from_pretrained(tmp_path)


@pytest.mark.fault
def test_no_proxy_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no proxy: proxy_config\.json is missing"):
        ProxyConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"/no/such/folder is neither a folder nor a hub repository"):
        proxy_file("/no/such/folder", "proxy_config.json")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated: ask for access"),
        ("RepositoryNotFoundError", "is neither a folder nor a hub repository"),
        ("RemoteEntryNotFoundError", "is neither a folder nor a hub repository"),
        ("LocalEntryNotFoundError", "the hub could not be reached"),
        ("HfHubHTTPError", r"The hub did not give proxy_config.json of owner/proxy \(429 Too many"),
    ],
)
def test_what_the_hub_answers_is_told_apart(monkeypatch, kind, said):
    def download(*args, **kwargs):
        error = getattr(errors, kind)
        if kind == "LocalEntryNotFoundError":
            raise error("offline")
        raise error("429 Too many\nrequests", response=SimpleNamespace(headers={}, request=None, status_code=429))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match=said) as refused:
        proxy_file("owner/proxy", "proxy_config.json")
    assert "\n" not in str(refused.value)


@pytest.fixture
def arguments(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}


def test_ppo_defaults(arguments):
    config = PPOConfig(**arguments)
    assert (config.num_generations, config.num_iterations) == (4, 4)
    assert (config.gamma, config.gae_lambda, config.vf_coef, config.cliprange_value) == (1.0, 0.95, 0.5, 0.2)
    proxy = ProxyPPOConfig(**arguments)
    assert (proxy.beta, proxy.gradient_checkpointing) == (0.0, False)
    assert (proxy.num_generations, proxy.replay_rollouts, proxy.num_generations_eval) == (4, 4, 1)
    assert ProxyConfig().pooled_features
    assert PPOConfig(num_generations=1, **arguments).num_generations == 1  # RLOO itself needs two


@pytest.mark.fault
@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (PPOConfig, "gamma", 1.5),
        (PPOConfig, "gamma", NAN),
        (PPOConfig, "gae_lambda", -0.1),
        (PPOConfig, "reward_timeout", 0.0),
        (PPOConfig, "reward_timeout", -1.0),
        (PPOConfig, "reward_timeout", NAN),
        (PPOConfig, "use_vllm", True),
        (PPOConfig, "use_transformers_continuous_batching", True),
        (ProxyPPOConfig, "gradient_checkpointing", True),
        (ProxyPPOConfig, "sync_ref_model", True),
    ],
)
def test_ppo_refuses_by_name(arguments, cls, field, value):
    with pytest.raises(ValueError, match=f"`{field}"):
        cls(**arguments, **{field: value})


@pytest.mark.fault
def test_ppo_refuses_beams(arguments):
    with pytest.raises(ValueError, match="has num_beams=4, which is not supported"):
        PPOConfig(**arguments, generation_kwargs={"num_beams": 4})
    assert PPOConfig(**arguments, generation_kwargs={"num_beams": 1}).generation_kwargs == {"num_beams": 1}


@pytest.mark.fault
def test_ppo_keeps_the_checks_of_its_parent(arguments):
    """One generation is allowed, but a batch that does not divide is still refused."""
    with pytest.raises(ValueError, match="divisible"):
        PPOConfig(**arguments, num_generations=3, per_device_train_batch_size=4, gradient_accumulation_steps=1)


@pytest.mark.fault
def test_an_update_is_of_one_rollout(arguments):
    settings = {"steps_per_generation": 3, "num_iterations": 2, "per_device_train_batch_size": 4}
    with pytest.raises(
        ValueError, match="`gradient_accumulation_steps` is 4, which does not divide the 6 minibatches"
    ):
        PPOConfig(**arguments, **settings, gradient_accumulation_steps=4)
    assert PPOConfig(**arguments, **settings, gradient_accumulation_steps=6).gradient_accumulation_steps == 6
