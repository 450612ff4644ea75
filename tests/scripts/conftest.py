"""Fixtures that the scripts' tests share."""

import json

import pytest


@pytest.fixture
def tiny_files(tmp_path, tiny_lm, tiny_tokenizer):
    """A tiny LM (`lm`), two dozen prompts (`prompts.jsonl`) and reward functions (`my_rewards.py`) in `tmp_path`."""
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}{b}"}) + "\n" for a in "abcdef" for b in "wxyz")
    )
    (tmp_path / "my_rewards.py").write_text(
        "def upper(prompts, completions, **kwargs):\n"
        "    return [float(sum(c.isupper() for c in x)) for x in completions]\n\n\n"
        "def same(prompts, completions, **kwargs):\n"
        "    return [1.0] * len(prompts)\n"
    )
    return tmp_path


@pytest.fixture
def tiny_run(tiny_files):
    """Flags of a run of seconds on [`tiny_files`]."""
    flags = {
        "model_name_or_path": tiny_files / "lm",
        "dataset_name": tiny_files / "prompts.jsonl",
        "reward_funcs": "my_rewards.upper",
        "output_dir": tiny_files / "out",
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 4,
        "gate_hidden_sizes": 16,
        "report_to": "none",
    }

    def arguments(**changes):
        return [str(x) for key, value in {**flags, **changes}.items() for x in (f"--{key}", value)]

    return arguments
