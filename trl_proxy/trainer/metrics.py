"""Metrics over rows: the same numbers however the rows were cut into batches and spread over processes.

TRL's online trainers log the mean of their batches' means. In an evaluation it depends on the batch size, because the
last batch is smaller. With several processes it also counts the rows that accelerate repeats to fill the last batch.
"""

import math

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length
from trl.trainer.utils import nanstd

from ..devices import exact_dtype


class RowMetricsMixin(Trainer):
    """A mixin to list before TRL's RLOOTrainer or GRPOTrainer.

    Rewards and lengths of an evaluation are kept row by row, those of repeated rows left out, and its metrics are
    computed at its end. Metrics of a subclass are sums over rows divided by others, see `_add_ratios`. What else TRL
    logs for each batch is averaged by the batches' rows, or tokens.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Of this process, `(metrics, 2)` on its device: the numerators and denominators of metrics by their names.
        self._sums: dict[str, dict[tuple[str, ...], torch.Tensor]] = {"train": {}, "eval": {}}
        # Of an evaluation: rewards, length and whether it was cut off, of the rows of each batch.
        self._rows: list[torch.Tensor] = []
        self._batches = 0
        self._num_rows: float = math.inf
        self._is_real: torch.Tensor | None = None  # which rows of this process's batch count

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # Which rows count

    def get_eval_dataloader(self, eval_dataset=None):
        # A stream does not say how many of its last rows are repeated.
        streamed = eval_dataset if isinstance(eval_dataset, IterableDataset) else None
        if eval_dataset is None and isinstance(self.eval_dataset, IterableDataset):
            streamed = self.eval_dataset
        if streamed is not None and self.accelerator.num_processes > 1:
            eval_dataset = Dataset.from_list(list(streamed))
        return super().get_eval_dataloader(eval_dataset)

    def _generate_and_score_completions(self, inputs):
        self._is_real = None
        if not self.model.training:
            processes, process = self.accelerator.num_processes, self.accelerator.process_index
            first = (self._batches * processes + process) * len(inputs)
            positions = torch.arange(first, first + len(inputs), device=self.accelerator.device)
            self._is_real = positions < self._num_rows
            self._batches += 1
        return super()._generate_and_score_completions(inputs)

    def _keep_rows(self, rewards: torch.Tensor, completion_ids_list: list[list[int]]) -> None:
        """Keeps the rewards `(all B, functions)` and the lengths of an evaluation's batch."""
        if self._is_real is not None:
            rows = zip(completion_ids_list, self._ended, self._is_real, strict=True)
            local = [[len(ids), not ended, real] for ids, ended, real in rows]
            shown = self.accelerator.gather(torch.tensor(local, dtype=rewards.dtype, device=rewards.device))
            self._rows.append(torch.cat([rewards, shown[:, :2]], dim=1)[shown[:, 2].bool()])

    # Sums

    def _add_ratios(self, ratios: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]) -> None:
        """Adds to metrics that are one sum over everything, divided by another.

        Args:
            ratios: name -> what to add to both sums: `(B,)` with a row's share, or this process's part as a number.
        """
        device = self.accelerator.device

        def added(x: torch.Tensor | float) -> torch.Tensor:
            x = torch.as_tensor(x, device=device).detach().to(exact_dtype(device))
            if x.ndim and self._is_real is not None:
                x = torch.where(self._is_real, x, 0.0)
            return x.sum()

        local = torch.stack([added(x) for pair in ratios.values() for x in pair]).view(-1, 2)
        sums, names = self._sums[self._mode], tuple(ratios)
        sums[names] = sums[names] + local if names in sums else local

    def _derived(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the ratios of `_add_ratios`. Subclasses may compute metrics from them."""
        return means

    def _settle(self) -> None:
        """Puts the metrics that are known as sums where TRL logs from. All processes call it at the same time."""
        sums = self._sums[self._mode]
        if not sums:
            return
        # Nothing waits for the device or for another process before this.
        totals = self.accelerator.reduce(torch.cat(list(sums.values())), reduction="sum").tolist()
        names = [name for key in sums for name in key]
        sums.clear()
        means = {name: x / weight if weight else 0.0 for name, (x, weight) in zip(names, totals, strict=True)}
        self._metrics[self._mode].update({name: [value] for name, value in self._derived(means).items()})

    def log(self, logs, start_time=None):
        if self.model.training:
            self._settle()
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._rows, self._batches, self._num_rows = [], 0, math.inf
        if has_length(dataloader.dataset):
            self._num_rows = len(dataloader.dataset) * self.num_generations_eval
        self._sums["eval"].clear()
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self._is_real = None
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # Before training: accelerate takes the model for prepared now, and would train it without DDP.
            self.model._is_accelerate_prepared = False
        metrics = self._metrics["eval"]
        counts = [float(len(rows)) for rows in self._rows]
        tokens = [rows[:, -2].sum().item() for rows in self._rows]
        for name, values in metrics.items():
            if len(values) == len(counts):
                metrics[name] = [_weighted_mean(values, tokens if name in ("kl", "entropy") else counts)]
        if self._rows:
            over_rows = self._over_rows(torch.cat(self._rows))
            metrics.update({name: [value] for name, value in over_rows.items() if name in metrics})
        self._settle()
        return output

    def _over_rows(self, rows: torch.Tensor) -> dict[str, float]:
        """TRL's metrics of rewards and lengths, from all rows of an evaluation."""
        rewards, lengths, cut = rows[:, :-2], rows[:, -2], rows[:, -1].bool()
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(-1)
        metrics = {f"completions/{k}_length": v for k, v in _spread(lengths).items()}
        metrics |= {**metrics_of_ends(lengths, cut), "reward": total.mean()}
        metrics["reward_std"] = nanstd(total)
        for i, name in enumerate(self.reward_func_names):
            metrics[f"rewards/{name}/mean"] = rewards[:, i].nanmean()
            metrics[f"rewards/{name}/std"] = nanstd(rewards[:, i])
        return {name: value.item() for name, value in metrics.items()}


def metrics_of_ends(lengths: torch.Tensor, cut: torch.Tensor) -> dict[str, torch.Tensor]:
    """TRL's metrics of responses that have an end: their `(B,)` lengths, and which were cut off, `(B,)` bool."""
    ended = lengths[~cut] if not cut.all() else torch.zeros(1)
    metrics = {f"completions/{k}_terminated_length": v for k, v in _spread(ended).items()}
    return {**metrics, "completions/clipped_ratio": cut.float().mean()}


def _spread(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": x.mean(), "min": x.min(), "max": x.max()}


def _weighted_mean(values: list[float], weights: list[float]) -> float:
    """NaN stands for a batch without a value."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan
