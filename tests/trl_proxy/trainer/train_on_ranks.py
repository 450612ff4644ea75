"""One process of several: it trains by each of some options. The first process compares with the twin what all did.

Arguments: the folder of a tokenizer, a JSON file with a list of options, and an output folder.
"""

import json
import sys
from pathlib import Path

import recorded_training
import torch
from transformers import AutoTokenizer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
for options in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
    trainer = recorded_training.train(options, tokenizer, sys.argv[3])
    recorded_training.check(trainer, options)
    if trainer.accelerator.is_main_process:
        print("equal")
torch.distributed.destroy_process_group()
