"""`generate` of a gated LM: checks the call, then decodes by prefix features, candidate features, or gated logits."""

import torch
from transformers import GenerationMixin

from .candidate import generate_by_candidate
from .options import (
    Settings,
    check_closed_form,
    checked_prompts,
    merged,
    read_call,
    refuse_what_has_no_meaning,
)
from .prefix import generate_by_prefix
from .settings import TRUNCATIONS


@torch.no_grad()
def gated_generate(
    model,
    input_ids: torch.Tensor | None,
    generation_config,
    *,
    gate_sample: bool,
    threshold: float | None,
    output_rollout: bool,
    tree: bool | None,
    proxy_names: list[str] | None,
    logits_processor: list | None,
    streamer,
    **kwargs,
):
    """Implements [`~trl_proxy.ProxyModelForCausalLM.generate`], with the same arguments and result."""
    settings = Settings(kwargs, generation_config, model.generation_config)
    refuse_what_has_no_meaning(settings, gate_sample)
    prompts = checked_prompts(model.config, input_ids, kwargs.pop("attention_mask", None), settings)
    if settings.is_assisted or (settings["num_beams"] or 1) > 1:
        by_decision = {"threshold": threshold, "tree": tree, "proxy_names": proxy_names}
        by_decision |= {"temperature": kwargs.get("temperature"), "output_rollout": output_rollout or None}
        given = [name for name, value in by_decision.items() if value is not None]
        with model.use_proxy(model.proxy):  # for all tokens, even if another one becomes active
            check_closed_form(model.proxy_config, settings.is_assisted, gate_sample, given)
            return _generate_by_logits(
                model,
                *prompts,
                generation_config,
                **{**kwargs, "do_sample": gate_sample},
                logits_processor=logits_processor,
                streamer=streamer,
            )

    repeats = settings["num_return_sequences"] or 1
    proxy = model.proxy_by_row(proxy_names, len(prompts[0]), repeats, prompts[0].device)
    call = read_call(
        prompts,
        proxy,
        settings,
        generation_config,
        kwargs,
        sample=gate_sample,
        threshold=threshold,
        output_rollout=output_rollout,
        tree=tree,
        logits_processor=logits_processor,
        streamer=streamer,
    )
    by_candidate = call.config.features == "candidate"
    output = generate_by_candidate(model.lm, call) if by_candidate else generate_by_prefix(model.lm, call)
    return output if call.return_dict else output.sequences


def _generate_by_logits(model, input_ids, attention_mask, generation_config, **options):
    """transformers' own `generate` on the gated logits of `forward`."""
    options |= {**dict.fromkeys(TRUNCATIONS), "temperature": 1.0}
    generation_config, options = merged(generation_config, options)
    return GenerationMixin.generate(model, input_ids, generation_config, attention_mask=attention_mask, **options)
