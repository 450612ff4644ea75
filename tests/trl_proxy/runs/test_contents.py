import pytest

from trl_proxy.runs import contents
from trl_proxy.runs.contents import contents_of


def test_a_name_of_the_hub_is_its_commit_if_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "HF_HUB_CACHE", str(tmp_path))
    for kind, commit in (("models", "a" * 40), ("datasets", "b" * 40)):
        refs = tmp_path / f"{kind}--owner--name" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(commit, encoding="utf-8")
    (tmp_path / "models--owner--name" / "refs" / "v2").write_text("c" * 40, encoding="utf-8")
    name = {"model_name_or_path": "owner/name", "dataset_name": "owner/name"}
    assert contents_of(name) == {"model_name_or_path": ["a" * 40], "dataset_name": ["b" * 40]}
    assert contents_of({**name, "model_revision": "v2"})["model_name_or_path"] == ["c" * 40]
    unknown = {"model_name_or_path": "owner/unknown", "dataset_name": "embedded", "output_dir": str(tmp_path)}
    assert contents_of({**unknown, "reward_funcs": ["trl_proxy.rewards.repetition_penalty"]}) == {}


def test_a_large_file_is_read_in_parts_that_reach_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_BLOCK", 16)
    path = tmp_path / "prompts.jsonl"
    found = set()
    zeros = bytes(9_999)
    for content in (zeros + b"\0", b"\1" + zeros, zeros + b"\1", zeros + b"\0\0", bytes(5000) + b"\1" * 5000):
        path.write_bytes(content)
        contents._file_digest.cache_clear()
        found.add(contents_of({"dataset_name": str(path)})["dataset_name"][0])
    assert len(found) == 5


def test_what_stands_beside_a_model_is_not_the_model(tmp_path):
    """Logs and records; but an adapter's LM counts."""
    for name in ("lm", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "lm" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"2")
    config = f'{{"base_model_name_or_path": "{tmp_path / "lm"}"}}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(config, encoding="utf-8")
    settings = {"model_name_or_path": str(tmp_path / "adapter")}
    before = contents_of(settings)
    for name in ("README.md", "trainer_state.json", "log.txt", "train_results.json"):
        (tmp_path / "adapter" / name).write_text("x", encoding="utf-8")
    (tmp_path / "adapter" / "records").mkdir()
    assert contents_of(settings) == before
    (tmp_path / "lm" / "model.safetensors").write_bytes(b"3!")
    assert contents_of(settings) != before


@pytest.mark.fault
@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name", "reward_model_name_or_path"])
@pytest.mark.parametrize(
    "name", ["data/my/prompts.jsonl", "/tmp/nowhere/x", "../x", "owner/na me", "a--b", "x\0y", "x" * 300]
)
def test_a_name_that_can_be_none_has_no_content(key, name):
    """Whoever loads it says so."""
    assert contents_of({key: name}) == {}
