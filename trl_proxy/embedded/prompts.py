"""The embedded prompts: made for this project, half everyday, half harm-adjacent."""

import functools
import json
from pathlib import Path

from datasets import Dataset

from ..rewards.preference import KINDS

DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "validation", "test")


@functools.cache
def embedded_prompts() -> dict[str, Dataset]:
    """The embedded prompts by split, and by split and kind, such as `train_everyday`."""
    # In memory: `datasets` would need a writable cache folder to read a file.
    rows = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [*SPLITS, *(f"{split}_{kind}" for split in SPLITS for kind in KINDS)]
    return {
        name: Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": row["prompt"]}], "kind": row["kind"]}
                for row in rows
                if name in (row["split"], f"{row['split']}_{row['kind']}")
            ]
        )
        for name in names
    }
