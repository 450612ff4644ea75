"""A sequence classifier of the hub as a reward function."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import apply_chat_template, is_conversational

from ..prompts import length_buckets


class ClassifierReward:
    """A reward model of the hub or the disk, as TRL's trainers use it: a sequence classifier with one label.

    Called as any reward function of TRL, `(prompts, completions, **columns) -> list[float]`.
    """

    def __init__(self, name: str, *, batch_size: int, device):
        self.__name__ = name
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype="auto")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        if is_conversational({"prompt": prompts[0]}):
            messages = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
            texts = [apply_chat_template(message, self.tokenizer)["text"] for message in messages]
        else:
            texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        scores = [0.0] * len(rows)
        for indices in length_buckets([len(row) for row in rows], self.batch_size):
            batch = self.tokenizer.pad(
                {"input_ids": [rows[i] for i in indices]}, padding_side="right", return_tensors="pt"
            )
            for i, logit in zip(indices, self.model(**batch.to(self.model.device)).logits[:, 0].tolist(), strict=True):
                scores[i] = logit
        return scores
