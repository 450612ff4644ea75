"""[`ProxyModelForCausalLM`]: a frozen language model with a gate on it.

With prefix features the gated LM is an ordinary LM: `forward` returns the logits of the closed form, and transformers'
`generate`, pipelines and scoring tools work on it. With candidate features only `generate` is defined.
"""

import dataclasses
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from .caches import sums_so_far
from .candidates import Candidates, candidate_scalars
from .card import proxy_card
from .config import WEIGHTS_NAME, ProxyConfig, proxy_file
from .decoding import propose_for
from .files import make_readable
from .gate import ProxyMLP, gated_log_probs
from .generation import GatedGeneration
from .proxies import LM_ITSELF, Proxy, RowProxies, WeightedProxy, sha256_of
from .rollout import Rollout
from .taps import HiddenTap, reader_of


@dataclass
class ProxyOutput(ModelOutput):
    """What the gate says of decisions: `(N,)` float32 each. (Not `values`: DDP calls that name as a method.)"""

    accept_logits: torch.Tensor | None = None
    state_values: torch.Tensor | None = None


@dataclass
class GatedCausalLMOutput(CausalLMOutputWithPast):
    """The LM's output with gated `logits`; `lm_logits`, of the same shape, are the LM's own where asked for."""

    lm_logits: torch.Tensor | None = None


def lm_sha256(lm: PreTrainedModel) -> str | None:
    """Checksum of what makes an LM this one: its sizes, and the signs of its input embeddings (of 4,096 rows at most),
    which no dtype, quantisation or adapter changes. None where the embeddings are not in memory (offloaded, sharded).
    """
    weight, config = lm.get_input_embeddings().weight, lm.config.get_text_config()
    if weight.device.type == "meta" or weight.dim() != 2:
        return None
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    text = ", ".join([config.model_type, *(f"{name}={getattr(config, name, None)}" for name in sizes)])
    signs = torch.signbit(weight.detach()[:: -(-len(weight) // 4096)]).to("cpu", torch.uint8)
    return sha256_of({text: signs})


class ProxyModelForCausalLM(GatedGeneration, PreTrainedModel, GenerationMixin):
    """A frozen causal LM and a trainable proxy that accepts or rejects the tokens it proposes (arXiv 2403.04283).

    Args:
        lm ([`~transformers.PreTrainedModel`]): the language model, in any dtype or 4 bit. It is frozen and put in
            evaluation mode.
        proxy_config ([`ProxyConfig`], *optional*): the new proxy. Sizes that it leaves open are taken from `lm`.

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
        if lm.get_output_embeddings() is None:
            raise ValueError(f"{type(lm).__name__} has no language modelling head: a causal LM is needed.")
        super().__init__(lm.config)
        self.lm = lm.requires_grad_(False).eval()
        self.generation_config = lm.generation_config
        self.proxies = nn.ModuleDict()
        self.active_proxy = "default"
        self._proxy_disabled = False
        self.proxies["default"] = self._new_proxy(proxy_config or ProxyConfig())
        # Neither broadcast nor reduced by DDP: every process loads the same frozen LM.
        self._ddp_params_and_buffers_to_ignore = [
            f"lm.{name}" for name, _ in [*lm.named_parameters(), *lm.named_buffers()]
        ]

    # Proxies

    def _new_proxy(self, config: ProxyConfig) -> Proxy:
        sizes = {
            "hidden_size": self.lm.config.get_text_config().hidden_size,
            "embedding_size": self.lm.get_input_embeddings().embedding_dim,
        }
        for key, size in sizes.items():
            if getattr(config, key) not in (None, size):
                raise ValueError(
                    f"The proxy was made for an LM with {key}={getattr(config, key)}, this one has {size}: "
                    "load it with the LM that it was trained on."
                )
        readers = [reader_of(self.lm, layer) for layer in config.feature_layers]
        if len(set(readers)) < len(readers):
            raise ValueError(f"`feature_layers` {config.feature_layers} names a layer twice: leave one of them out.")
        base = config.base_model_name_or_path or self.lm.config._name_or_path or None
        # A copy: the caller may make proxies over other LMs with the same configuration.
        sha256 = lm_sha256(self.lm) or config.base_model_sha256
        config = dataclasses.replace(config, base_model_name_or_path=base, base_model_sha256=sha256, **sizes)
        return Proxy(config).to(self.lm.get_output_embeddings().weight.device)

    @property
    def proxy(self) -> "Proxy | WeightedProxy":
        """The active proxy."""
        return self.proxies[self.active_proxy]

    def proxy_by_row(self, names: list[str] | None, batch_size: int, repeats: int, device) -> "Proxy | RowProxies":
        """The active proxy, or that of each row of a batch by name, every row being decoded `repeats` times.

        Raises:
            `ValueError`: not one name per row, one that was not loaded, or proxies that do not go together, see
                [`~trl_proxy.proxies.RowProxies`].
        """
        if names is None:
            return self.proxy
        if len(names) != batch_size:
            raise ValueError(f"`proxy_names` has {len(names)} names for {batch_size} prompts.")
        for name in names:
            if name != LM_ITSELF:
                self._check_loaded(name)
        return RowProxies(self.proxies, [name for name in names for _ in range(repeats)], device)

    @property
    def proxy_config(self) -> ProxyConfig:
        """Configuration of the active proxy."""
        return self.proxy.config

    @property
    def gate(self) -> ProxyMLP:
        """The active gate: features `(..., feature_size)` -> accept logits `(...)`."""
        return self.proxy.gate  # type: ignore[return-value]  # of a sum of proxies, which is not trained, a method

    @property
    def critic(self) -> ProxyMLP:
        """The active critic: features `(..., feature_size)` -> state values `(...)`."""
        return self.proxy.critic

    def load_proxy(
        self, folder_or_id: str | os.PathLike, name: str, *, check_base_model: bool = True, **hub_kwargs
    ) -> None:
        """Loads another trained proxy over the same LM under `name`; [`set_proxy`] makes it the active one.

        Args:
            folder_or_id: local folder or hub repository.
            check_base_model: refuse a proxy that was trained over another LM of the same sizes.
            hub_kwargs: `revision`, `token`, ... of its repository.

        Raises:
            `ValueError`: no proxy there, a damaged file, or one made for another LM.
        """
        config = ProxyConfig.from_pretrained(folder_or_id, **hub_kwargs)
        weights = proxy_file(folder_or_id, WEIGHTS_NAME, **hub_kwargs)
        proxy = self._new_proxy(config)
        self._load_trained(proxy, config, folder_or_id, weights, check_base_model)
        self.proxies[name] = proxy  # only now: a file that does not load leaves no untrained proxy behind

    def _load_trained(self, proxy: Proxy, saved: ProxyConfig, source: str | os.PathLike, weights: str, check: bool):
        """Loads a trained proxy's weights; `ValueError` where, with `check`, it was saved over another LM, or the file
        is damaged."""
        trained, here = saved.base_model_sha256, proxy.config.base_model_sha256
        if check and None not in (trained, here) and trained != here:
            raise ValueError(
                f"The proxy {source} was trained over {saved.base_model_name_or_path or 'another LM'}, whose sizes or "
                f"embeddings differ from those of {self.lm.config._name_or_path or 'this LM'}: load that LM, or pass "
                "`check_base_model=False`."
            )
        proxy.load_weights(weights)

    def set_proxy(self, name: str) -> None:
        """Makes the proxy `name` the active one; `ValueError` where it was not loaded."""
        self._check_loaded(name)
        self.active_proxy = name

    def _check_loaded(self, name: str) -> None:
        if name not in self.proxies:
            raise ValueError(f"There is no proxy {name!r}; loaded: {', '.join(self.proxies)}.")

    def delete_proxy(self, name: str) -> None:
        """Forgets the proxy `name`; `ValueError` where it was not loaded, or is the active one."""
        if name == self.active_proxy:
            raise ValueError(f"The proxy {name!r} is the active one: `set_proxy` another before it is deleted.")
        self._check_loaded(name)
        del self.proxies[name]

    def add_weighted_proxy(self, proxies: list[str], weights: list[float], name: str) -> None:
        """Adds the weighted sum of loaded proxies, of their accept logits, under `name`; [`set_proxy`] makes it the
        active one. It decodes and cannot be trained or saved.

        Raises:
            `ValueError`: one was not loaded or is a sum itself, or they do not go together, see [`WeightedProxy`].
        """
        for part in proxies:
            if part not in self.proxies or isinstance(self.proxies[part], WeightedProxy):
                raise ValueError(f"There is no proxy {part!r} to add; loaded: {', '.join(self.proxies)}.")
        self.proxies[name] = WeightedProxy({part: self.proxies[part] for part in proxies}, weights)

    @contextmanager
    def disable_proxy(self):
        """Inside, `forward` and `generate` are the plain LM's."""
        self._proxy_disabled, before = True, self._proxy_disabled
        try:
            yield
        finally:
            self._proxy_disabled = before

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

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """The LM's."""
        return self.lm.prepare_inputs_for_generation(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters, 4-bit weights counted as what they stand for."""
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
            hidden: `(N, state_size)`: before the candidate (prefix features) or at it (candidate features), layer
                beside layer; with pooled features the means of the states so far behind them.
            token_ids: `(N,)` int64, the candidates; prefix features only.
            scalars: `(N, NUM_SCALARS)`, see `candidates.candidate_scalars`; prefix features only.

        Returns:
            `(N, feature_size)` in the dtype of `hidden` for candidate features, else float32.
        """
        return hidden if self.proxy_config.features == "candidate" else self._with_token(hidden, token_ids, scalars)

    def _with_token(self, hidden: torch.Tensor, token_ids: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        embeddings = self.get_input_embeddings()(token_ids)
        parts: list[Any] = [hidden, embeddings.to(hidden.device), scalars]
        return torch.cat([part.float() for part in parts], dim=-1)

    def rollout_features(self, rollout: Rollout) -> torch.Tensor:
        """Features `(N, feature_size)` of a rollout's N decisions (where its mask is True, row by row)."""
        rows, _ = rollout.mask.nonzero(as_tuple=True)
        hidden = rollout.hidden.to(rows.device)[rows, rollout.hidden_index[rollout.mask]]
        return self.gate_features(hidden, rollout.token_ids[rollout.mask], rollout.scalars[rollout.mask])

    def _judge(self, proxy, hidden: torch.Tensor, candidates: Candidates, positions: torch.Tensor) -> torch.Tensor:
        """Accept logits `(B, K)` of candidates at positions with the hidden states `(B, d)`; 0 where masked."""
        logits = hidden.new_zeros(candidates.mask.shape, dtype=torch.float32)
        # A position with one candidate asks nothing, and most positions of a good LM have one.
        asked = candidates.mask & (candidates.counts > 1)[:, None]
        rows, _ = asked.nonzero(as_tuple=True)
        scalars = candidate_scalars(candidates, positions)[asked]
        features = self._with_token(hidden[rows], candidates.token_ids[asked], scalars)
        logits[asked] = proxy.accept_logits(features, rows)
        return logits

    # Forward; `generate` is in generation.py

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
    ) -> GatedCausalLMOutput | CausalLMOutputWithPast | ProxyOutput:
        """Gated next-token logits, or the gate's opinion of cached features.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, labels, kwargs: as for the LM.
            gate_features: `(N, feature_size)`; if given, the LM does not run and a [`ProxyOutput`] is returned. This
                is the only path that carries gradients.
            output_lm_logits: keep the LM's own logits too, as `lm_logits`.

        Returns:
            The LM's output with `logits` `(batch, positions, vocab)` replaced by the log-probabilities of the closed
            form (`gate.gated_log_probs`): -inf for every token that is no candidate. The LM's output itself inside
            [`disable_proxy`].
        """
        if gate_features is not None:
            return ProxyOutput(accept_logits=self.gate(gate_features), state_values=self.critic(gate_features))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if self._proxy_disabled:
            return self.lm(**inputs, labels=labels)
        if self.proxy_config.features == "candidate":
            raise ValueError(
                "A proxy with features='candidate' has no next-token distribution in closed form: use `generate`, or "
                "train one with features='prefix'."
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        with HiddenTap(self.lm, self.proxy_config.feature_layers) as tap:
            output = self.lm(**inputs)
        length = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[1]
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.cumsum(-1) - 1)[:, -length:]
            else:
                position_ids = torch.arange(past, past + length, device=output.logits.device)[None]
        keep = kwargs.get("logits_to_keep", 0)
        keep = slice(-keep, None) if isinstance(keep, int) else keep  # as transformers slices the hidden states
        positions = (position_ids[:, keep] + 1).expand(output.logits.shape[:2]).flatten()
        candidates = propose_for(self.proxy_config, output.logits.flatten(0, 1))
        hidden = tap.hidden
        if self.proxy_config.pooled_features:
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
            if attention_mask is not None and attention_mask.dim() == 2:
                mask = attention_mask[:, -length:].to(mask)
            cache = output.get("past_key_values") if past_key_values is None else past_key_values
            total, count = sums_so_far(cache, past, self.proxy_config.feature_layers, hidden, mask)
            hidden = torch.cat([hidden, (total / count.clamp(min=1)).to(hidden.dtype)], dim=-1)
        hidden = hidden[:, keep]
        accept_logits = self._judge(self.proxy, hidden.flatten(0, 1), candidates, positions)
        log_probs = gated_log_probs(accept_logits - self.proxy_config.threshold, candidates.mask)
        logits = torch.full_like(output.logits, -torch.inf, dtype=torch.float32).flatten(0, 1)
        logits.scatter_(-1, candidates.token_ids, log_probs)
        lm_logits = output.logits if output_lm_logits else None
        output = GatedCausalLMOutput(**{**output, "logits": logits.view(output.logits.shape)}, lm_logits=lm_logits)
        if labels is not None:
            output.loss = self.lm.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size
            )
        return output

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """Writes the active proxy, `proxy_config.json` and `proxy_model.safetensors`; never the LM.

        Args:
            save_directory: folder.
            is_main_process: False writes nothing.
            state_dict: of this model, where its own is sharded and a trainer has gathered it.
            kwargs: `push_to_hub`, `repo_id`.
        """
        if not is_main_process:
            return
        if isinstance(self.proxy, WeightedProxy):
            raise ValueError(f"The proxy {self.active_proxy!r} is a sum of others: save those.")
        self.proxy_config.save_pretrained(save_directory)
        path = os.path.join(save_directory, WEIGHTS_NAME)
        weights = self.proxy.state_dict()
        if state_dict is not None:
            weights = {name: state_dict[f"proxies.{self.active_proxy}.{name}"] for name in weights}
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(weights, path + ".tmp", metadata={"format": "pt", "sha256": sha256_of(weights)})
        make_readable(path + ".tmp")
        os.replace(path + ".tmp", path)
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.normpath(save_directory)))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs) -> str:
        """Uploads the active proxy; returns the URL of the commit."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not api.file_exists(repo_id, "README.md"):  # a card of its training, say
                revision = getattr(self.lm.config, "_commit_hash", None)
                card = proxy_card(self.proxy_config, *self.get_nb_trainable_parameters(), revision=revision)
                card.save(os.path.join(folder, "README.md"))
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=kwargs.get("commit_message", "Upload proxy"),
                    revision=kwargs.get("revision"),
                )
            )

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
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` where `lm` is a name (`quantization_config`, ...).

        Raises:
            `ValueError`: no proxy there, a damaged file, or one made for another LM.
        """
        hub_kwargs = hub_kwargs or {}
        config = ProxyConfig.from_pretrained(folder_or_id, **hub_kwargs)
        weights = proxy_file(folder_or_id, WEIGHTS_NAME, **hub_kwargs)
        if isinstance(lm, (str, os.PathLike)):
            lm = AutoModelForCausalLM.from_pretrained(lm, **kwargs)
        model = cls(lm, config)
        model._load_trained(model.proxy, config, folder_or_id, weights, check_base_model)
        return model.eval()
