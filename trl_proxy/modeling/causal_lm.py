"""[`ProxyModelForCausalLM`]: a frozen language model with a gate on it.

With prefix features the gated LM is an ordinary LM: `forward` returns the logits of the closed form, and transformers'
`generate`, pipelines and servers work on it. With candidate features only `generate` is defined. A token that the LM
does not propose has probability 0, so given texts are scored by the frozen LM, inside
[`~trl_proxy.ProxyModelForCausalLM.disable_proxy`].
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..core.candidates import propose_for
from ..core.config import WEIGHTS_NAME, ProxyConfig, proxy_file
from ..core.features import accept_logits, prefix_features
from ..core.gate import gated_log_probs
from ..core.rollout import Rollout
from ..decoding.generate import gated_generate
from ..decoding.hidden_states import HiddenStateHook, input_embeddings, without_peft
from ..decoding.pooling import cached_sums, length_of, with_mean
from ..files import loading_model
from .outputs import ProxyOutput
from .saving import check_trained_over, push_proxy, save_proxy
from .with_proxies import ModelWithProxies

logger = logging.get_logger(__name__)
# `pipeline` logs an error for a class that is not among these names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["proxy"] = "ProxyModelForCausalLM"
_SCORE = "score given texts inside `with model.disable_proxy():`, which is the frozen LM"


class ProxyModelForCausalLM(ModelWithProxies, GenerationMixin):
    """A frozen causal LM and a trainable proxy that accepts or rejects the tokens it proposes (arXiv 2403.04283).

    Args:
        lm ([`~transformers.PreTrainedModel`]): the language model, in any dtype or 4 bit. It is frozen and put in
            evaluation mode.
        proxy_config ([`ProxyConfig`], *optional*): the new proxy. Missing sizes are taken from `lm`.

    Example:

    ```python
    >>> model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.05))
    >>> model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
    ```
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, lm: PreTrainedModel, proxy_config: ProxyConfig | None = None):
        super().__init__(lm, proxy_config)
        # How inputs and the cache are prepared depends on the LM's class, in transformers even on its name.
        base = without_peft(lm)
        for name in vars(GenerationMixin):
            if name.startswith(("_prepare_", "_update_", "_expand_", "_supports_", "_reorder_")):
                setattr(self, name, getattr(base, name))
        self._is_stateful = base._is_stateful

    # What tools expect of a model

    def train(self, mode: bool = True) -> "ProxyModelForCausalLM":
        """As usual, but the frozen LM stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def get_base_model(self) -> PreTrainedModel:
        """The frozen LM."""
        return self.lm

    def get_input_embeddings(self) -> nn.Module:
        """The LM's."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's."""
        return self.lm.get_output_embeddings()

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The LM's, so that a trainer leaves an LM where its `device_map` has placed it. Others have no such
        attribute."""
        return self.lm.hf_device_map

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """The LM's."""
        return self.lm.prepare_inputs_for_generation(*args, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        """As the LM: whether `generate` may ask for the logits of the last positions alone."""
        return self.lm._supports_logits_to_keep()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters. Each 4-bit weight counts as one."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        everything = 0
        for parameter in self.parameters():
            numel = parameter.numel()
            # bitsandbytes packs two 4-bit weights into each byte of its storage.
            if type(parameter).__name__ == "Params4bit":
                numel *= 2 * parameter.element_size()
            everything += numel
        return trainable, everything

    def print_trainable_parameters(self) -> None:
        """Prints the share of trainable parameters, as PEFT does."""
        trainable, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trainable / everything:.4f}"
        )

    # The gate's input

    def gate_features(
        self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None, scalars: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What [`gate`] and [`critic`] read.

        Args:
            hidden: `(N, state_size)`: before the candidate (prefix features) or at it (candidate features), layers
                concatenated. With pooled features, the means of the states so far follow.
            token_ids: `(N,)` int64, the candidates; prefix features only.
            scalars: `(N, NUM_SCALARS)`, see `features.candidate_scalars`; prefix features only.

        Returns:
            `(N, feature_size)` in the dtype of `hidden` for candidate features, else float32.
        """
        if self.proxy_config.features == "candidate":
            return hidden
        return prefix_features(hidden, input_embeddings(self.lm)(token_ids), scalars)

    def rollout_features(self, rollout: Rollout, places: torch.Tensor | None = None) -> torch.Tensor:
        """Features of decisions of a rollout.

        Args:
            places: `(N,)` int64, which entries of the rollout's flattened `(B, D)` tensors; by default its decisions,
                the True entries of its mask, which a device has to count first.

        Returns:
            `(N, feature_size)` float32.
        """
        if places is None:
            places = rollout.mask.flatten().nonzero()[:, 0]
        rows = places // rollout.mask.shape[1]
        hidden = rollout.hidden.to(rows.device)[rows, rollout.hidden_index.flatten()[places]]
        token_ids, scalars = rollout.token_ids.flatten()[places], rollout.scalars.flatten(0, 1)[places]
        return self.gate_features(hidden, token_ids, scalars)

    # Forward and generate

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        labels: torch.Tensor | None = None,
        gate_features: torch.Tensor | None = None,
        output_lm_logits: bool = False,
        **kwargs,
    ) -> ModelOutput | tuple:
        """Gated next-token logits, or the gate's output for cached features.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, labels, kwargs: as for the LM.
            gate_features: `(N, feature_size)`; if given, the LM does not run and a [`ProxyOutput`] is returned. This
                is the only path that carries gradients.
            output_lm_logits: keep the LM's own logits too, as `lm_logits`.

        Returns:
            The LM's output, of the LM's own class, with `logits` `(batch, positions, vocab)` replaced by the
            log-probabilities of the closed form (`gate.gated_log_probs`): -inf for every token that is no candidate.
            With `return_dict=False` it is a tuple. For several positions without a cache a warning says so once,
            because a tool that compares given answers may find -inf for all. Inside [`disable_proxy`] it is the LM's
            own output.

        Raises:
            `ValueError`: candidate features, or `labels` whose loss is infinite, because one is not a candidate.
        """
        proxy = self.proxy
        if gate_features is not None:
            return ProxyOutput(accept_logits=proxy.gate(gate_features), state_values=proxy.critic(gate_features))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if self._proxy_disabled:
            return self.lm(**inputs, labels=labels)
        if proxy.config.features == "candidate":
            raise ValueError(
                "A proxy with features='candidate' has no next-token distribution in closed form: use `generate`, "
                f"train one with features='prefix', or {_SCORE}."
            )
        text = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        cache = past_key_values if past_key_values is not None else kwargs.get("cache_params")
        past = length_of(cache, text, attention_mask)
        in_tuple = inputs.pop("return_dict", None) is False
        with HiddenStateHook(self.lm, proxy.config.feature_layers) as tap:
            output = self.lm(**{name: value for name, value in inputs.items() if value is not None}, return_dict=True)
        hidden = tap.hidden.to(output.logits.device)
        length, seen = hidden.shape[1], None
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask[:, -length:].to(hidden.device)
        if position_ids is None or position_ids.dim() != 2:
            if attention_mask is not None and seen is not None:
                position_ids = (attention_mask.cumsum(-1) - 1)[:, -length:]
            else:
                position_ids = torch.arange(past, past + length, device=hidden.device)[None]
        if proxy.config.pooled_features:
            cache = cache if cache is not None else output.get("past_key_values", output.get("cache_params"))
            mask = torch.ones(hidden.shape[:2], device=hidden.device) if seen is None else seen
            hidden = with_mean(hidden, *cached_sums(cache, past, proxy.config.feature_layers, hidden, mask))
        keep = kwargs.get("logits_to_keep", 0)
        keep = slice(-keep, None) if isinstance(keep, int) else keep  # as transformers slices the hidden states
        hidden, positions = hidden[:, keep], (position_ids[:, keep] + 1).expand(output.logits.shape[:2])
        candidates = propose_for(proxy.config, output.logits.flatten(0, 1))
        positions = positions.to(hidden.device)
        logits = accept_logits(proxy, input_embeddings(self.lm), hidden.flatten(0, 1), candidates, positions.flatten())
        log_probs = gated_log_probs(logits - proxy.config.threshold, candidates.mask)
        logits = torch.full_like(output.logits, -torch.inf, dtype=torch.float32).flatten(0, 1)
        logits = logits.scatter_(-1, candidates.token_ids, log_probs).view(output.logits.shape)
        changed: dict[str, torch.Tensor] = {"logits": logits}
        if labels is not None:
            loss = self.lm.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
            if loss.isinf():
                raise ValueError(f"The loss is infinite: a label is no candidate of the LM; {_SCORE}.")
            changed["loss"] = loss
        elif logits.shape[1] > 1 and not output_lm_logits and past_key_values is None and "cache" not in kwargs:
            # Neither decoding nor the packed texts of continuous batching, which have a `cache`.
            logger.warning_once(
                f"The gated logits of tokens that are no candidates are -inf: {_SCORE}. The gate itself is measured "
                "by what it writes, in tasks that generate."
            )
        lm_logits = output.logits
        output = type(output)(**{**output, **changed})
        if output_lm_logits:
            output["lm_logits"] = lm_logits
        return output.to_tuple() if in_tuple else output

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *,
        gate_sample: bool = False,
        threshold: float | None = None,
        output_rollout: bool = False,
        tree: bool | None = None,
        proxy_names: list[str] | None = None,
        logits_processor: list | None = None,
        streamer=None,
        **kwargs,
    ):
        """Gated decoding with the options of the LM's own `generate`.

        Args:
            inputs: `(batch, prompt length)` int64, left-padded prompts; `input_ids` is the same.
            gate_sample: draw the gate's decisions (training) instead of taking the more probable one.
            threshold: in place of the configuration's; see `gate.decide`.
            output_rollout: also return what training needs, [`rollout.Rollout`] (implies `return_dict_in_generate`).
            tree: with candidate features, judge several candidates of a position in one forward. By default it is used
                for few rows, on a CPU in bfloat16 only. With prefix features all are judged at once anyway.
            proxy_names: a loaded proxy for each prompt, in place of the active one; `"__base__"` for the LM itself.
                Each has its own threshold; `threshold` is added.
            generation_config, logits_processor, streamer, kwargs: as for `generate` of transformers. `temperature` is
                that of the proposals. `do_sample` and the truncations (`top_k`, ...) do not apply: `p_t` and
                `max_candidates` of the configuration decide what is proposed. `num_beams` and assisted generation
                (`assistant_model`, `prompt_lookup_num_tokens`; it needs `gate_sample`) use the gated logits of
                `forward`. The caller's penalties and bans act on these logits. There is no record of decisions.

        Returns:
            `(batch, length)` int64, or with `return_dict_in_generate` a `ProxyGenerateOutput` with the record of
            decisions.

        Raises:
            `ValueError`: right-padded prompts, more tokens than the LM has positions, proxies that cannot be combined
                in one batch, or beams and assisted generation with candidate features.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        kwargs |= {"logits_processor": logits_processor, "streamer": streamer}
        if self._proxy_disabled:
            return self.lm.generate(input_ids, generation_config, **kwargs)
        return gated_generate(
            self,
            input_ids,
            generation_config,
            gate_sample=gate_sample,
            threshold=threshold,
            output_rollout=output_rollout,
            tree=tree,
            proxy_names=proxy_names,
            **kwargs,
        )

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, on the gated logits of `forward`, for `generate_batch` and transformers' server.

        Raises:
            `ValueError`: candidate features have no such logits, and pooled features need one text at a time.
        """
        if self._proxy_disabled:
            return self.lm.init_continuous_batching(*args, **kwargs)
        config = self.proxy_config
        if config.features == "candidate" or config.pooled_features:
            raise ValueError(
                "Continuous batching needs a proxy with features='prefix' and pooled_features=False: use `generate`."
            )
        return super().init_continuous_batching(*args, **kwargs)

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ) -> None:
        """Writes the active proxy, `proxy_config.json` and `proxy_model.safetensors`; never the LM.

        Args:
            save_directory: folder.
            is_main_process: False writes nothing.
            state_dict: of this model, if a trainer has gathered it because the model is sharded.
            push_to_hub: upload it too, to `repo_id` or to a repository with the folder's name.
            kwargs: for [`push_to_hub`]. How transformers cuts large weights into files does not matter here.

        Raises:
            `ValueError`: an argument that has no meaning here.
        """
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("max_shard_size", "safe_serialization")
        }
        if kwargs and not push_to_hub:
            raise ValueError(
                f"`save_pretrained` of a proxy does not take {', '.join(map(repr, kwargs))}: leave it out."
            )
        if not is_main_process:
            return
        save_proxy(self, save_directory, state_dict)
        if push_to_hub:
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload proxy",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the active proxy, never the LM. A repository without a card gets one.

        Args:
            repo_id: `name` or `owner/name`; it is made if it does not exist.
            private, token: of the repository.
            revision: the branch; it is made if it does not exist.
            create_pr: propose the upload instead of committing it.

        Returns:
            the URL of the commit.
        """
        commit = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
        return push_proxy(self, repo_id, private=private, token=token, revision=revision, **commit)

    @classmethod
    def from_pretrained(
        cls,
        lm: PreTrainedModel | str,
        folder_or_id: str | os.PathLike,
        *,
        check_base_model: bool = True,
        hub_kwargs: dict | None = None,
        **kwargs,
    ) -> "ProxyModelForCausalLM":
        """A trained proxy over its LM.

        Args:
            lm: the language model, or the name to load it by.
            folder_or_id: local folder or hub repository of the proxy.
            check_base_model: refuse a proxy that was trained over another LM of the same sizes.
            hub_kwargs: `revision`, `token`, ... for the proxy's own repository.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` if `lm` is a name (`quantization_config`, ...).

        Raises:
            `ValueError`: no proxy there, a damaged file, or one made for another LM.
        """
        hub_kwargs = hub_kwargs or {}
        config = ProxyConfig.from_pretrained(folder_or_id, **hub_kwargs)
        weights = proxy_file(folder_or_id, WEIGHTS_NAME, **hub_kwargs)
        if isinstance(lm, (str, os.PathLike)):
            name = lm
            with loading_model(name):
                lm = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        model = cls(lm, config)
        if check_base_model:
            check_trained_over(lm, config, model.proxy_config, folder_or_id)
        model.proxy.load_weights(weights)
        return model.eval()
