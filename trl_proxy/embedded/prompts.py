"""The embedded prompts: made for this project, half everyday, half harm-adjacent."""

import json
from pathlib import Path

from datasets import Dataset

from ..rewards.preference import KINDS

DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "validation", "test")


def _embedded_prompts(split: str) -> Dataset:
    """A split of the embedded prompts, or its prompts of one kind."""
    name, _, kind = split.partition("_")
    if name not in SPLITS or kind not in ("", *KINDS):
        raise ValueError(
            f"The embedded prompts have the splits {', '.join(SPLITS)}, and one per kind, e.g. train_everyday, "
            f"not {split!r}."
        )
    # In memory: `datasets` would need a writable cache folder to read a file.
    lines = (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "kind": row["kind"]}
            for row in map(json.loads, lines)
            if row["split"] == name and kind in ("", row["kind"])
        ]
    )
