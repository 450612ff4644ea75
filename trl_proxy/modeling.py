"""[`ProxyModelForCausalLM`]: a frozen language model with a gate on it.

With prefix features the gated LM is an ordinary LM: `forward` returns the logits of the closed form, and transformers'
`generate`, pipelines and scoring tools work on it. With candidate features only `generate` is defined.
"""

import dataclasses
import hashlib
import os
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from .candidates import NUM_SCALARS, Candidates, candidate_scalars
from .config import WEIGHTS_NAME, ProxyConfig, proxy_file
from .decoding import HiddenTap, propose_for, record_body
from .gate import ProxyMLP, gated_log_probs
from .generation import GatedGeneration
from .rollout import Rollout


@dataclass
class ProxyOutput(ModelOutput):
    """What the gate says of decisions: `(N,)` float32 each. (Not `values`: DDP calls that name as a method.)"""

    accept_logits: torch.Tensor | None = None
    state_values: torch.Tensor | None = None


@dataclass
class GatedCausalLMOutput(CausalLMOutputWithPast):
    """The LM's output with gated `logits`; `lm_logits`, of the same shape, are the LM's own where asked for."""

    lm_logits: torch.Tensor | None = None


def _sha256(weights: dict[str, torch.Tensor]) -> str:
    """Checksum of tensors by name; safetensors itself notices truncation but no flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    return digest.hexdigest()


class Proxy(nn.Module):
    """One proxy: its configuration, its gate (the policy) and its critic."""

    def __init__(self, config: ProxyConfig):
        super().__init__()
        self.config = config
        prefix = config.features == "prefix"
        sizes: list[Any] = [config.hidden_size, config.embedding_size] if prefix else [config.hidden_size]
        if config.pooled_features:
            sizes.insert(1, config.hidden_size)
        scalars = NUM_SCALARS if prefix else 0
        self.gate = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, config.initial_accept_bias)
        self.critic = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, 0.0)

    def load_weights(self, path: str) -> None:
        """Loads `proxy_model.safetensors`; `ValueError` where the file is damaged or of another shape."""
        try:
            weights = load_file(path)
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("sha256")
            if expected not in (None, _sha256(weights)):
                raise RuntimeError("its checksum is another")
            self.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path} does not fit its {type(self.config).__name__} (damaged, or made with other sizes): {error}"
            ) from error


class WeightedProxy(nn.Module):
    """Several proxies as one: its accept logit is the weighted sum of what each has above its own threshold.

    Raises:
        `ValueError`: the proxies do not read, or are not offered, the same.
    """

    def __init__(self, proxies: dict[str, Proxy], weights: list[float]):
        super().__init__()
        if not proxies or len(proxies) != len(weights):
            raise ValueError(f"There are {len(weights)} weights for {len(proxies)} proxies.")
        (first, config), *others = [(name, proxy.config) for name, proxy in proxies.items()]
        own = {"gate_hidden_sizes", "initial_accept_bias", "threshold", "base_model_name_or_path"}
        for name, other in others:
            for key in (field.name for field in dataclasses.fields(config)):
                if key not in own and getattr(other, key) != getattr(config, key):
                    raise ValueError(
                        f"The proxies {first} and {name} cannot be added: `{key}` is {getattr(config, key)!r} in the "
                        f"one and {getattr(other, key)!r} in the other."
                    )
        self.parts, self.weights = nn.ModuleList(proxies.values()), list(weights)
        # Each part's own threshold is taken off in `gate`.
        self.config = dataclasses.replace(config, threshold=0.0)

    def gate(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., feature_size)` -> accept logits `(...)`."""
        parts = zip(self.weights, self.parts, strict=True)
        return sum(weight * (part.gate(features) - part.config.threshold) for weight, part in parts)


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
        # Sum and number of the hidden states that a cache stands for, where pooled features need them.
        self._pools: WeakKeyDictionary = WeakKeyDictionary()
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
        base = config.base_model_name_or_path or self.lm.config._name_or_path or None
        # A copy: the caller may make proxies over other LMs with the same configuration.
        config = dataclasses.replace(config, base_model_name_or_path=base, **sizes)
        return Proxy(config).to(self.lm.get_output_embeddings().weight.device)

    @property
    def proxy(self) -> "Proxy | WeightedProxy":
        """The active proxy."""
        return self.proxies[self.active_proxy]

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

    def load_proxy(self, folder_or_id: str | os.PathLike, name: str, **hub_kwargs) -> None:
        """Loads another trained proxy over the same LM under `name`; [`set_proxy`] makes it the active one."""
        config = ProxyConfig.from_pretrained(folder_or_id, **hub_kwargs)
        weights = proxy_file(folder_or_id, WEIGHTS_NAME, **hub_kwargs)
        proxy = self._new_proxy(config)
        proxy.load_weights(weights)
        self.proxies[name] = proxy  # only now: a file that does not load leaves no untrained proxy behind

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
            hidden: `(N, state_size)`: before the candidate (prefix features; with pooled features the mean of the
                states so far behind it) or at it (candidate features).
            token_ids: `(N,)` int64, the candidates; prefix features only.
            scalars: `(N, NUM_SCALARS)`, see `candidates.candidate_scalars`; prefix features only.

        Returns:
            `(N, feature_size)` in the dtype of `hidden` for candidate features, else float32.
        """
        if self.proxy_config.features == "candidate":
            return hidden
        embeddings = self.get_input_embeddings()(token_ids)
        parts: list[Any] = [hidden, embeddings.to(hidden.device), scalars]
        return torch.cat([part.float() for part in parts], dim=-1)

    def rollout_features(self, rollout: Rollout) -> torch.Tensor:
        """Features `(N, feature_size)` of a rollout's N decisions (where its mask is True, row by row)."""
        rows, _ = rollout.mask.nonzero(as_tuple=True)
        hidden = rollout.hidden[rows, rollout.hidden_index[rollout.mask]]
        return self.gate_features(hidden, rollout.token_ids[rollout.mask], rollout.scalars[rollout.mask])

    def _judge_prefix(self, hidden: torch.Tensor, candidates: Candidates, positions: torch.Tensor) -> torch.Tensor:
        """Accept logits `(B, K)` of candidates at positions with the hidden states `(B, d)`; 0 where masked."""
        logits = hidden.new_zeros(candidates.mask.shape, dtype=torch.float32)
        # A position with one candidate asks nothing, and most positions of a good LM have one.
        asked = candidates.mask & (candidates.counts > 1)[:, None]
        rows, _ = asked.nonzero(as_tuple=True)
        scalars = candidate_scalars(candidates, positions)[asked]
        logits[asked] = self.gate(self.gate_features(hidden[rows], candidates.token_ids[asked], scalars))
        return logits

    def _judge_candidate(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gate(self.gate_features(hidden))

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
        pooled_features = self.proxy_config.pooled_features
        pooling: Any = record_body(self.lm) if pooled_features else nullcontext()
        with HiddenTap(self.lm) as tap, pooling as body:
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
        if pooled_features:
            pooled = self._pool_so_far(body[0], attention_mask, past, past_key_values, output)
            hidden = torch.cat([hidden, pooled[:, keep].to(hidden.dtype)], dim=-1)
        accept_logits = self._judge_prefix(hidden.flatten(0, 1), candidates, positions)
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

    def _pool_so_far(self, hidden, attention_mask, past: int, cache, output) -> torch.Tensor:
        """Mean `(batch, length, hidden_size)` of the hidden states up to each position, the cache's included."""
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -hidden.shape[1] :].to(mask)
        total, count = (hidden.float() * mask[..., None]).cumsum(1), mask.cumsum(1)
        if past:
            if cache not in self._pools:
                raise ValueError("Pooled features need to have seen the whole text: this cache was filled elsewhere.")
            total, count = total + self._pools[cache][0][:, None], count + self._pools[cache][1][:, None]
        if output.get("past_key_values") is not None:
            self._pools[output.past_key_values] = (total[:, -1], count[:, -1])
        return total / count.clamp(min=1)[..., None]

    # Saving and loading

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """Writes the active proxy, `proxy_config.json` and `proxy_model.safetensors`; never the LM."""
        if not is_main_process:
            return
        if isinstance(self.proxy, WeightedProxy):
            raise ValueError(f"The proxy {self.active_proxy!r} is a sum of others: save those.")
        self.proxy_config.save_pretrained(save_directory)
        path = os.path.join(save_directory, WEIGHTS_NAME)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.proxy.state_dict().items()}
        save_file(weights, path + ".tmp", metadata={"format": "pt", "sha256": _sha256(weights)})
        os.replace(path + ".tmp", path)
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.normpath(save_directory)))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs) -> str:
        """Uploads the active proxy; returns the URL of the commit."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
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
        cls, lm: PreTrainedModel | str, folder_or_id: str | os.PathLike, *, hub_kwargs: dict | None = None, **kwargs
    ) -> "ProxyModelForCausalLM":
        """A trained proxy over its LM.

        Args:
            lm: the language model, or the name to load it by.
            folder_or_id: local folder or hub repository of the proxy.
            hub_kwargs: `revision`, `token`, ... for the proxy's own repository.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` where `lm` is a name (`quantization_config`, ...).

        Raises:
            `ValueError`: no proxy there, a damaged file, or an LM of other sizes.
        """
        config = ProxyConfig.from_pretrained(folder_or_id, **(hub_kwargs or {}))
        weights = proxy_file(folder_or_id, WEIGHTS_NAME, **(hub_kwargs or {}))
        if isinstance(lm, (str, os.PathLike)):
            lm = AutoModelForCausalLM.from_pretrained(lm, **kwargs)
        model = cls(lm, config)
        model.proxy.load_weights(weights)
        return model.eval()
