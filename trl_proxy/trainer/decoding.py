"""Rollouts of TRL's online trainers by the project's decoding settings."""

import functools
from typing import Any

import torch
from transformers import GenerationConfig, Trainer

from ..decoding.settings import DecodingSettings
from .metrics import metrics_of_ends


def settings_of(args) -> dict[str, Any]:
    """The arguments of [`DecodingSettings.of`] that a trainer's configuration has.

    TRL's fields that repeat an option of `generate` count if they are not at their default: the LM's own
    generation_config.json keeps its word otherwise, as in the user's `generate`.
    """
    options = {"repetition_penalty": None if args.repetition_penalty == 1.0 else args.repetition_penalty}
    options["cache_implementation"] = args.cache_implementation
    options = {name: value for name, value in options.items() if value is not None}
    return {
        "max_new_tokens": args.max_completion_length,
        "generation_kwargs": {**options, **(args.generation_kwargs or {})},
        "chat_template_kwargs": args.chat_template_kwargs or {},
    }


class DecodingMixin(Trainer):
    """A mixin to list before [`RowMetricsMixin`] and TRL's RLOOTrainer or GRPOTrainer: rollouts and evaluation decode
    as [`DecodingSettings`] say. TRL's own sampling fields (`temperature`, `top_p`, ...) stay.

    Attributes:
        decoding: the settings.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        lm = self.accelerator.unwrap_model(self.model)
        sampling = getattr(self.args, "_samples_the_lm", True)
        self.decoding = DecodingSettings.of(lm, self._tokenizer, **settings_of(self.args), sampling=sampling)
        if self.mask_truncated_completions and self.decoding.options.get("stop_strings"):
            raise ValueError(
                "`mask_truncated_completions` knows no stop strings, and would leave out responses that end by one: "
                "set it to False, or switch the stop strings off by generation_kwargs {'stop_strings': None}."
            )
        self.eos_token_ids = self.decoding.eos_token_ids
        if hasattr(self, "generation_config"):  # else an engine generates
            options = {**self.generation_kwargs, **self.decoding.generation_config().to_diff_dict()}
            self.generation_config = GenerationConfig(**options | {"stop_strings": None, "disable_compile": True})
        self._ended: list[bool] = []  # whether each response of the latest rollout has an end

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        lm: Any = self.accelerator.unwrap_model(self.model_wrapped)
        stops = self.decoding.stop_recorder()
        configured, own_generate = lm.generation_config, lm.__dict__.get("generate")  # FSDP wraps it
        # Values that the user has switched off must not come back from the LM's own configuration.
        lm.generation_config = self.decoding.generation_config()
        if stops.criteria:
            lm.generate = functools.partial(lm.generate, stopping_criteria=[stops])
        try:
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            lm.generation_config = configured
            lm.__dict__.pop("generate", None)
            if own_generate is not None:
                lm.generate = own_generate
        token_ids, *others = result if isinstance(result, tuple) else (result,)
        token_ids, self._ended = self.decoding.cut(token_ids, stops)
        return (token_ids, *others) if others else token_ids

    def _generate(self, prompts):
        result = super()._generate(prompts)
        if self.decoding.options.get("stop_strings"):
            self._log_ends(result[1])
        return result

    def _log_ends(self, token_ids: list[list[int]]) -> None:
        """TRL counts a response that ends by a stop string as cut off."""
        device = self.accelerator.device
        lengths = self.accelerator.gather(torch.tensor([len(ids) for ids in token_ids], device=device)).float()
        cut = ~self.accelerator.gather(torch.tensor(self._ended, device=device))
        for name, value in metrics_of_ends(lengths, cut).items():
            self._metrics[self._mode][name][-1] = value.item()
