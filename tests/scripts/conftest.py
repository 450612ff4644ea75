"""Fixtures that the scripts' tests share."""

import json

import pytest


@pytest.fixture
def tiny_run(tmp_path, tiny_lm, tiny_tokenizer):
    """Flags of a run of seconds: a tiny LM, two dozen prompts and a reward function in a file."""
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}{b}"}) + "\n" for a in "abcdef" for b in "wxyz")
    )
    (tmp_path / "my_rewards.py").write_text(
        "def upper(prompts, completions, **kwargs):\n"
        "    return [float(sum(c.isupper() for c in x)) for x in completions]\n"
    )
    flags = {
        "model_name_or_path": tmp_path / "lm",
        "dataset_name": tmp_path / "prompts.jsonl",
        "reward_funcs": "my_rewards.upper",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 4,
        "gate_hidden_sizes": 16,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
    }

    def arguments(**changes):
        return [str(x) for key, value in {**flags, **changes}.items() for x in (f"--{key}", value)]

    return arguments
