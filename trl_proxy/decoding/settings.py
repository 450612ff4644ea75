"""How an LM is decoded: one object, made from the LM, its tokenizer and the caller's arguments.

Training, evaluation and serving take it from here, so all of them do what the user's `lm.generate()` would do: the
penalties, bans, ends and caches of the LM's generation_config.json count, and the user's `generation_kwargs` replace
them by name. How a token is chosen (greedily, by sampling, by a gate) is the method's own.
"""

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria
from transformers.utils import logging
from trl import is_conversational

from ..prompts import check_chat_template, check_room, length_buckets, positions_of
from .hidden_states import execution_device

logger = logging.get_logger(__name__)

# Options of `generate` by which an LM chooses among tokens. With a gate, its candidates take their place.
TRUNCATIONS = ("top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
SAMPLING = ("do_sample", "temperature", *TRUNCATIONS)
# Every other option of a generation configuration. `used`: it counts for every method. `refused`: decoding with the
# record of decisions cannot follow it. `moot`: it has no meaning for a causal LM without beams, and is warned about.
USED = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "min_length", "min_new_tokens", "remove_invalid_values"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "max_time"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile"),
)
# option -> the values that change nothing, and why others are refused
REFUSED: dict[str, tuple[tuple, str]] = {
    "num_beams": ((None, 1), "beams have no record of decisions"),
    "num_beam_groups": ((None, 1), "beams have no record of decisions"),
    "num_return_sequences": ((None, 1), "each method decides how many responses it draws"),
    "constraints": ((None,), "it needs beams"),
    "force_words_ids": ((None,), "it needs beams"),
    "guidance_scale": ((None, 1, 1.0), "it runs the LM twice per step"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search chooses the token by itself"),
    "dola_layers": ((None,), "DoLa chooses the token by itself"),
    "watermarking_config": ((None,), "the watermark would be put on the token that the gate has chosen already"),
    "token_healing": ((None, False), "it changes the prompt"),
    "prompt_lookup_num_tokens": ((None, 0), "assisted generation has no record of decisions"),
    "is_assistant": ((None, False), "assisted generation has no record of decisions"),
    "assistant_early_exit": ((None,), "assisted generation has no record of decisions"),
    "use_mtp": ((None, False), "assisted generation has no record of decisions"),
    "low_memory": ((None, False), "transformers has it no more"),
    "max_new_tokens": ((None,), "the length of a response has its own argument"),
    "max_length": ((None,), "the length of a response has its own argument"),
}
MOOT = (
    *("length_penalty", "early_stopping", "diversity_penalty", "renormalize_logits", "decoder_start_token_id"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("continuous_batching_config", "transformers_version"),
)
# Refused of the user alone: LMs ship a length, and it is not the caller's.
_LENGTHS = ("max_new_tokens", "max_length")


class StopRecorder(StoppingCriteria):
    """Applies stopping criteria and records which rows they ended at each step. A response does not show this, because
    its last token may equal the padding token."""

    def __init__(self, criteria: list[StoppingCriteria]):
        self.criteria = criteria
        self.stopped: list[torch.Tensor] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | criterion(input_ids, scores, **kwargs)
        self.stopped.append(done)
        return done


def check_generation_kwargs(kwargs: dict | None, *, sampling: bool = False) -> None:
    """`ValueError` for options of `generate` that a run cannot keep; a warning for those without meaning.

    Args:
        kwargs: the user's `generation_kwargs`.
        sampling: whether the LM samples, so that temperature and truncations have a meaning.
    """
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"`generation_kwargs` must be a JSON object of options of `generate`, got {kwargs!r}.")
    for name, value in (kwargs or {}).items():
        if name in SAMPLING:
            if not sampling:
                raise ValueError(
                    f"`generation_kwargs` has {name}={value!r}: the method decides how a token is chosen. Set `p_t`, "
                    "`max_candidates` and the temperature of the proxy, or `--temperature` and `--top_p` of best-of-n."
                )
        elif name in REFUSED:
            neutral, reason = REFUSED[name]
            if value not in neutral:
                raise ValueError(f"`generation_kwargs` has {name}={value!r}, which is not supported: {reason}.")
        elif name in MOOT:
            logger.warning_once(f"`generation_kwargs` has {name}, which has no meaning for a gated LM.")
        elif name not in USED:
            close = difflib.get_close_matches(name, [*USED, *SAMPLING, *REFUSED], n=1)
            raise ValueError(
                f"`generation_kwargs` has {name!r}, which is no option of `generate`"
                + (f": did you mean {close[0]!r}?" if close else ".")
            )


def encode_prompts(prompts: list, tokenizer, **chat_template_kwargs) -> list[list[int]]:
    """Token ids of every prompt, unpadded, exactly as TRL's trainers encode them: conversations through the chat
    template with the generation prompt, strings as they are. `ValueError` if the tokenizer has no template."""
    check_chat_template(prompts[0], tokenizer)
    if is_conversational({"prompt": prompts[0]}):
        template = {"add_generation_prompt": True, "return_dict": True, **chat_template_kwargs}
        return tokenizer.apply_chat_template(prompts, **template)["input_ids"]
    return tokenizer(prompts)["input_ids"]


def with_system_prompt(prompt: str | list[dict], system_prompt: str | None) -> str | list[dict]:
    """The conversation with the system message in front, if it has none; `ValueError` for a plain prompt."""
    if not system_prompt:
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"`system_prompt` needs conversations, the prompt {prompt[:200]!r} is plain text: put it into the text."
        )
    if prompt and prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": system_prompt}, *prompt]


@dataclass(frozen=True)
class DecodingSettings:
    """How an LM is decoded. [`DecodingSettings.of`] makes it.

    Attributes:
        tokenizer: the LM's.
        max_new_tokens: longest response.
        eos_token_ids: all ids that end a response.
        pad_token_id: fills up a batch.
        options: further options of `generate`, by name: those of the LM's generation_config.json that count for every
            method, replaced by the user's.
        chat_template_kwargs: of the tokenizer's `apply_chat_template`.
        system_prompt: put before conversations without a system message.
        max_positions: of the LM; None if it has no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    eos_token_ids: list[int]
    pad_token_id: int
    options: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    max_positions: int | None = None

    @classmethod
    def of(
        cls,
        lm,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        generation_kwargs: dict | None = None,
        chat_template_kwargs: dict | None = None,
        system_prompt: str | None = None,
        sampling: bool = False,
    ) -> "DecodingSettings":
        """The settings of this LM with these arguments.

        Args:
            lm: the LM, or a gated one.
            max_new_tokens: longest response.
            generation_kwargs: options of `generate` that replace those of the LM's generation_config.json. None as a
                value switches one off.
            chat_template_kwargs, system_prompt: see the attributes.
            sampling: whether the LM samples, so that temperature and truncations have a meaning.

        Raises:
            `ValueError`: an option that cannot be kept, of the user or of the LM; or one that `generate` refuses.
        """
        user = dict(generation_kwargs or {})
        check_generation_kwargs(user, sampling=sampling)
        theirs = {name: value for name, value in lm.generation_config.to_dict().items() if value is not None}
        for name, (neutral, reason) in REFUSED.items():
            value = user.get(name, theirs.get(name))
            if value not in neutral and name not in _LENGTHS:
                raise ValueError(
                    f"The LM's generation_config.json has {name}={value!r}, which is not supported: {reason}. Switch "
                    f"it off: generation_kwargs {{{name!r}: {neutral[-1] if len(neutral) > 1 else None}}}."
                )
        options = {name: theirs[name] for name in USED if name in theirs}
        options |= {name: value for name, value in user.items() if name not in MOOT}
        eos = _as_list(options.pop("eos_token_id", None))
        if "eos_token_id" not in user:
            # As TRL: an id that any of the LM's files names ends a response.
            eos += _as_list(lm.config.get_text_config().eos_token_id) + _as_list(tokenizer.eos_token_id)
        eos = sorted(set(eos))
        pad = options.pop("pad_token_id", None)
        pad = next((i for i in (user.get("pad_token_id"), tokenizer.pad_token_id, pad, *eos) if i is not None), 0)
        settings = cls(
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos,
            pad_token_id=pad,
            options=options,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            system_prompt=system_prompt,
            max_positions=positions_of(lm.config),
        )
        settings._check_values(lm)
        return settings

    def _check_values(self, lm) -> None:
        """`ValueError` for values that `generate` would refuse at its first call."""
        try:
            self.stop_recorder()
            config = self.generation_config()
            lm._prepare_special_tokens(config, True, device=execution_device(lm))
            lm._get_logits_processor(config, 1, device=execution_device(lm))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The decoding options {self.options} are not valid ({reason}): correct them.") from error

    # What goes into a run and its records

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": self.pad_token_id,
            "generation_kwargs": copy.deepcopy(self.options),
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "system_prompt": self.system_prompt,
        }

    # Prompts

    def encode(self, prompts: list) -> list[list[int]]:
        """Token ids of every prompt, unpadded."""
        prompts = [with_system_prompt(prompt, self.system_prompt) for prompt in prompts]
        return encode_prompts(prompts, self.tokenizer, **self.chat_template_kwargs)

    def pad(self, encoded: list[list[int]], device) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, `(batch, longest)` each, padded on the left."""
        width = max(map(len, encoded))
        input_ids = torch.full((len(encoded), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(encoded):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}

    def batches(self, prompts: list, *, batch_size: int, device) -> Iterator[tuple[list[int], dict]]:
        """The prompts' indices and tensors, batch by batch: sorted by length, longest first."""
        encoded = self.encode(prompts)
        for indices in length_buckets([len(ids) for ids in encoded], batch_size):
            yield indices, self.pad([encoded[i] for i in indices], device)

    # Decoding

    @property
    def has_own_cache(self) -> bool:
        """Whether the LM or the user has chosen a cache, or none."""
        return self.options.get("cache_implementation") is not None or self.options.get("use_cache") is False

    def stop_recorder(self) -> StopRecorder:
        """What ends a response besides an EOS id and its length: the stop strings."""
        strings = self.options.get("stop_strings")
        return StopRecorder([StopStringCriteria(self.tokenizer, strings)] if strings else [])

    def generation_config(self) -> GenerationConfig:
        """The settings as a configuration; without stop strings, which the [`stop_recorder`] has."""
        options = {**self.options, "stop_strings": None}
        return GenerationConfig(
            **options,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self.pad_token_id,
        )

    def generate(self, model, inputs: dict[str, torch.Tensor], **method) -> tuple[list[list[int]], list[bool], Any]:
        """Decodes one batch of padded prompts.

        Args:
            model: the LM, or a gated one.
            inputs: `input_ids` and `attention_mask`, `(batch, prompt length)`.
            method: options of `generate` by which the method chooses tokens, such as `do_sample` or `gate_sample`.

        Returns:
            the responses' token ids, the EOS or stop string included; whether each has ended by one; and what
            `generate` returned.

        Raises:
            `ValueError`: the longest prompt and its response need more positions than the LM has.
        """
        width = inputs["input_ids"].shape[1]
        check_room(width, self.max_new_tokens, self.max_positions)
        stops = self.stop_recorder()
        output = model.generate(
            **inputs,
            **{**self.options, "stop_strings": None},
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self.pad_token_id,
            stopping_criteria=[stops] if stops.criteria else None,
            return_dict_in_generate=True,
            **method,
        )
        responses = output.sequences[:, width:].tolist()
        return *self.cut(responses, stops), output

    def cut(self, responses: list[list[int]], stops: StopRecorder) -> tuple[list[list[int]], list[bool]]:
        """The responses without the padding after their end, and whether each has an end."""
        stopped = torch.stack(stops.stopped, 1).tolist() if stops.stopped else [[]] * len(responses)
        ends = set(self.eos_token_ids)
        cut, ended = [], []
        for ids, flags in zip(responses, stopped, strict=True):
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            if True in flags:
                end = min(end, flags.index(True))
            cut.append(ids[: end + 1])
            ended.append(end < len(ids))
        return cut, ended


def _as_list(ids) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
