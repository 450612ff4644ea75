"""Checks that stop a training without work, or with a prompt that cannot be answered, before it starts."""

from typing import Any

from datasets import Dataset

from ..prompts import check_chat_template, check_dataset, check_prompts, positions_of


def check_work(args, train_dataset: Any = None) -> None:
    """`ValueError` if the training arguments, or too few prompts for one rollout, leave nothing to train on."""
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` must be above 0, got {args.num_train_epochs:g}: it would train nothing.")
    if not isinstance(train_dataset, Dataset):
        return
    needed = args.generation_batch_size // args.num_generations
    if len(train_dataset) < needed:
        raise ValueError(
            f"The training dataset has {len(train_dataset)} prompts and a rollout takes {needed} "
            f"({args.generation_batch_size} responses, num_generations={args.num_generations}), so nothing would be "
            f"trained: give at least {needed} prompts, or lower `per_device_train_batch_size` or "
            "`steps_per_generation`."
        )


class PromptCheckMixin:
    """A mixin to list first among the parents of a subclass of TRL's RLOOTrainer or GRPOTrainer."""

    # What TRL's trainers have
    args: Any
    model: Any
    max_completion_length: int
    num_generations_eval: int
    _tokenizer: Any
    _tokenize_prompts: Any

    def __init__(self, model, reward_funcs, args=None, train_dataset=None, eval_dataset=None, **kwargs):
        both = {"`train_dataset`": train_dataset, "`eval_dataset`": eval_dataset}
        for name, dataset in both.items():
            check_dataset(dataset, name)
        if args is not None:
            check_work(args, train_dataset)
        super().__init__(  # type: ignore[call-arg]
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        for name, dataset in both.items():
            self._check_prompts(dataset, name)
        parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for part in parts:
            self._check_evaluation(part)

    def _check_prompts(self, dataset, name: str) -> None:
        """`ValueError` naming the first prompt that cannot be encoded as in a rollout."""
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if isinstance(part, Dataset):
                check_chat_template(part.select_columns("prompt")[0]["prompt"], self._tokenizer)
        check_prompts(
            dataset,
            name,
            lambda prompts: self._tokenize_prompts(prompts)[0],
            positions_of(self.model.config),
            self.max_completion_length,
        )

    def _check_evaluation(self, dataset) -> None:
        """`ValueError` if responses of an evaluation would be left out."""
        if not isinstance(dataset, Dataset):
            return
        responses = len(dataset) * self.num_generations_eval
        batch = self.args.per_device_eval_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and responses % batch:
            raise ValueError(
                f"`dataloader_drop_last=True` would leave {responses % batch} of the {responses} evaluation responses "
                f"out, because a batch has {batch}: set it to False."
            )
