"""What the training scripts leave behind, of the right syntax and with values that cannot be: the file and the key are
named."""

import json

import numpy as np
import pytest

from eval.trained import read_baseline, read_results
from eval.training_logs import training_log, training_points

RESULTS = {"episodes": 8, "steps": 2, "train_seconds": 3.0, "train_peak_memory_mb": 1.0}
STATE = {"log_history": [{"step": 1, "reward": 0.5, "train_seconds": 1.0}, {"step": 2, "reward": 1.5}]}
RUN = {"method": "ppo", "seed": 0, "use_peft": True, "lora_r": 16}


@pytest.fixture
def folder(tmp_path):
    """`folder(**files)`: a baseline's output folder, with other contents of some files."""

    def write(**changed):
        for name, content in {"train_results": RESULTS, "trainer_state": STATE, "run": RUN, **changed}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
        return str(tmp_path)

    return write


def everything(folder):
    """All that a comparison and a report read of a folder."""
    trained = read_baseline(folder)
    return trained, training_points(training_log(folder), "reward")


def test_a_whole_folder_is_read(folder):
    trained, points = everything(folder())
    assert (trained.method, trained.variant, trained.seed, trained.episodes) == ("ppo", "lora_r=16", 0, 8)
    np.testing.assert_array_equal(points, [[4.0, 1.0, 0.5], [8.0, np.nan, 1.5]])


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_null_is_not_a_number(folder, nothing):
    """In a log it is a mean over nothing, or a time that was not taken."""
    history = [{"step": 1, "reward": nothing}, {"step": 2, "reward": 1.0, "train_seconds": nothing}]
    path = folder(trainer_state={"log_history": history}, train_results={**RESULTS, "train_seconds": None})
    np.testing.assert_array_equal(training_points(training_log(path), "reward"), [[8.0, np.nan, 1.0]])
    assert read_results(path)["train_seconds"] is None


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_results", {**RESULTS, "steps": 0}, "has no steps or no episodes"),
        ("train_results", {**RESULTS, "episodes": 0}, "has no steps or no episodes"),
        ("train_results", {**RESULTS, "episodes": "8"}, r"is damaged \(episodes must be a number, got '8'\)"),
        ("train_results", {**RESULTS, "train_seconds": []}, r"train_seconds must be a number or null, got \[\]"),
        ("train_results", {}, "is damaged .lacks episodes, steps"),
        ("trainer_state", {}, "is damaged .lacks log_history"),
        ("trainer_state", [], "is damaged .must be a dict"),
        ("trainer_state", {"log_history": [1, 2]}, "log_history.0 must be a dict, got 1"),
        ("trainer_state", {"log_history": [{"reward": 1.0}]}, "log_history.0 lacks step"),
        (
            "trainer_state",
            {"log_history": [{"step": 1, "reward": "x"}]},
            "log_history.0.reward must be a number or null",
        ),
        ("run", {**RUN, "method": 5}, "is damaged .method must be text, got 5"),
        ("run", {**RUN, "seed": "x"}, "is damaged .seed must be a whole number, got 'x'"),
        ("run", {**RUN, "seed": None}, "is damaged .seed must be a whole number, got None"),
        ("run", {**RUN, "generation_kwargs": 5}, "generation_kwargs must be a dict or null, got 5"),
        ("run", {"method": "ppo"}, "run.json lacks seed, use_peft, lora_r"),
        ("run", {**RUN, "method": "sft"}, "method 'sft', which is no baseline that trains"),
        ("run", {**RUN, "method": "proxy"}, "method 'proxy', which is no baseline that trains .*by --proxies"),
    ],
)
def test_a_value_that_cannot_be_is_named(folder, file, content, message):
    with pytest.raises(ValueError, match=message) as error:
        everything(folder(**{file: content}))
    assert f"{file}.json" in str(error.value)
    assert "\n" not in str(error.value)
