"""The proxies of one frozen LM: creates, loads, chooses and adds them by name, as PEFT handles adapters."""

import dataclasses
import os
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.config import WEIGHTS_NAME, ProxyConfig, proxy_file
from ..core.gate import ProxyMLP
from ..decoding.candidate import check_overwritable
from ..decoding.hidden_states import embedding_size_of, reader_of, state_size_of, without_peft
from .fingerprint import lm_sha256
from .proxies import LM_ITSELF, Proxy, RowProxies, WeightedProxy
from .saving import check_trained_over


def check_causal_lm(lm: PreTrainedModel) -> None:
    """`ValueError` for a model that does not continue its own text token by token, or cannot be gated."""
    name, base = type(lm).__name__, without_peft(lm)
    if getattr(lm, "active_peft_config", None) is not None and lm.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The LM has a {lm.active_peft_config.peft_type.value.lower().replace('_', ' ')} adapter, which puts "
            "virtual tokens before every text: use an adapter of the weights, such as LoRA."
        )
    if lm.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: a causal LM, which is a decoder alone, is needed.")
    if not base.can_generate() or lm.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language modelling head: a causal LM is needed.")


class ModelWithProxies(PreTrainedModel):
    """A frozen LM and its proxies, one of which is active. [`~trl_proxy.ProxyModelForCausalLM`] decodes with it."""

    def __init__(self, lm: PreTrainedModel, proxy_config: ProxyConfig | None = None):
        check_causal_lm(lm)
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

    # The LM's configuration was checked when the LM was made; transformers would change it here.

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        return attn_implementation

    def _check_and_adjust_experts_implementation(self, experts_implementation):
        return experts_implementation

    def _new_proxy(self, config: ProxyConfig) -> Proxy:
        sizes: dict[str, Any] = {
            "hidden_size": state_size_of(self.lm),
            "embedding_size": embedding_size_of(self.lm),
        }
        for key, size in sizes.items():
            if getattr(config, key) not in (None, size):
                raise ValueError(
                    f"The proxy was made for an LM with {key}={getattr(config, key)}, this one has {size}: "
                    "load it with the LM that it was trained on."
                )
        if config.features == "candidate" and not any(p.config.features == "candidate" for p in self.proxies.values()):
            check_overwritable(self.lm)
        readers = [reader_of(self.lm, layer) for layer in config.feature_layers]
        if len(set(readers)) < len(readers):
            raise ValueError(f"`feature_layers` {config.feature_layers} names a layer twice: leave one of them out.")
        base = config.base_model_name_or_path or self.lm.config._name_or_path or None
        # A copy: the caller may make proxies over other LMs with the same configuration.
        sha256 = lm_sha256(self.lm) or config.base_model_sha256
        config = dataclasses.replace(config, base_model_name_or_path=base, base_model_sha256=sha256, **sizes)
        return Proxy(config).to(next(self.lm.get_output_embeddings().parameters()).device)

    @property
    def proxy(self) -> "Proxy | WeightedProxy":
        """The active proxy."""
        return self.proxies[self.active_proxy]

    def proxy_by_row(self, names: list[str] | None, batch_size: int, repeats: int, device) -> "Proxy | RowProxies":
        """The active proxy, or one proxy per row of a batch by name. Every row is decoded `repeats` times.

        Raises:
            `ValueError`: not one name per row, a proxy that was not loaded, or proxies that cannot be combined, see
                [`~trl_proxy.modeling.proxies.RowProxies`].
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
        return self.proxy.gate  # type: ignore[return-value]  # a method for a sum of proxies, which is never trained

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
        if check_base_model:
            check_trained_over(self.lm, config, proxy.config, folder_or_id)
        proxy.load_weights(weights)
        self.proxies[name] = proxy  # last: a file that fails to load leaves no untrained proxy
        self._let_only_the_active_one_learn()

    def set_proxy(self, name: str) -> None:
        """Makes the proxy `name` the active one; `ValueError` if it was not loaded."""
        self._check_loaded(name)
        self.active_proxy = name
        self._let_only_the_active_one_learn()

    def _let_only_the_active_one_learn(self) -> None:
        """With several processes, every parameter that requires a gradient must get one in each update."""
        self.proxies.requires_grad_(False)
        self.proxy.requires_grad_(not isinstance(self.proxy, WeightedProxy))

    def _check_loaded(self, name: str) -> None:
        if name not in self.proxies:
            raise ValueError(f"There is no proxy {name!r}; loaded: {', '.join(self.proxies)}.")

    def delete_proxy(self, name: str) -> None:
        """Deletes the proxy `name`; `ValueError` if it was not loaded or is the active one."""
        if name == self.active_proxy:
            raise ValueError(f"The proxy {name!r} is the active one: `set_proxy` another one first.")
        self._check_loaded(name)
        del self.proxies[name]

    def add_weighted_proxy(self, proxies: list[str], weights: list[float], name: str) -> None:
        """Adds the weighted sum of the accept logits of loaded proxies under `name`; [`set_proxy`] makes it the active
        one. It can decode, but cannot be trained or saved.

        Raises:
            `ValueError`: one was not loaded or is a sum itself, or they cannot be combined, see [`WeightedProxy`].
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
