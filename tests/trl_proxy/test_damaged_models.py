"""Folders of an LM that cannot be loaded, and names that are none: one sentence with the name and the file."""

import json

import pytest

from baselines.training import load_trained
from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.loading import load_lm


@pytest.fixture
def folder(tmp_path, tiny_lm, tiny_tokenizer):
    tiny_lm().save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.fault
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_half_a_file_is_named(folder, tiny_lm, tiny_tokenizer, with_random_gate, file):
    with_random_gate(tiny_lm(), ProxyConfig()).save_pretrained(folder.parent / "proxy")
    halve(folder / file)
    lm = tiny_lm()
    lm.config.architectures = ["LlamaForCausalLM"]
    loads = [
        lambda: load_lm(str(folder)),
        lambda: load_trained(folder, lm, tiny_tokenizer),
        lambda: ProxyModelForCausalLM.from_pretrained(str(folder), folder.parent / "proxy"),
    ]
    for load in loads:
        with pytest.raises(ValueError, match=rf"{folder} cannot be loaded: .*/{file} is damaged \(") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "The folder empty holds no language model: it has no config.json"),
        ("owner/unknown", r"^The language model owner/unknown cannot be loaded \(.+\): there is no such folder here"),
        ("unknown", r"^The language model unknown cannot be loaded \(.+\): there is no such folder here"),
        ("data/my/lm", "^The language model data/my/lm is neither a folder nor a model id of the hub"),
        ("/tmp/nowhere", "^The language model /tmp/nowhere is neither a folder nor a model id of the hub"),
        ("owner/na me", r"^The language model owner/na me cannot be loaded \(.+\): there is no such folder here"),
        ("file.bin", "^The language model file.bin is neither a folder nor a model id of the hub"),
    ],
)
def test_a_name_that_is_no_lm(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=message) as error:
        load_lm(name)
    assert "\n" not in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_attention_heads"])
def test_a_configuration_that_no_library_foresees(folder, key):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "nothing"}))
    with pytest.raises(ValueError, match=rf"{folder} cannot be loaded \(.+\)\.$"):
        load_lm(str(folder))


def test_what_a_training_left_beside_the_lm_may_be_damaged(folder):
    (folder / "trainer_state.json").write_text("{")
    load_lm(str(folder))


@pytest.mark.fault
def test_code_that_nobody_trusts_is_no_damage(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": code}))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"custom code .*`trust_remote_code=True` to allow") as error:
        load_lm(str(folder))
    assert "copy it again" not in str(error.value)
