"""Decodes and trains on pretended devices, and writes what it found as JSON:

    python tests/on_pretended_devices.py <folder of an LM> <output file> <waits, trained or decoded> [<kind> [<dtype>]]

In a process of its own, since the pretended devices are there for the whole process. Attention is "eager": torch has a
fused kernel for the CPU alone, which rounds differently.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pretended_device as pretended
import torch
from accelerate import PartialState, dispatch_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import set_seed

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer

ONE, OTHER = "pretended:0", "pretended:1"
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
# Where each of the parts is.
PLACES = {
    "one device": (ONE,) * 6,
    "head on the other": (ONE, ONE, ONE, OTHER, OTHER, OTHER),
    "embedding on the other": (OTHER, ONE, ONE, ONE, ONE, ONE),
    "head and embedding offloaded": ("cpu", ONE, ONE, OTHER, OTHER, "cpu"),
}
KINDS = {
    "prefix": {"pooled_features": False},
    "pooled": {},
    "layers": {"feature_layers": [1, -1]},
    "sampled": {"proposal": "sampled"},
    "candidate": {"features": "candidate", "pooled_features": False},
    "candidate, pooled": {"features": "candidate", "feature_layers": [1, -1]},
}
BY_HAND, BY_MAP = "split by hand", "head on the other"
LENGTHS = (9, 5, 7, 9)


def gated(lm, kind: str) -> ProxyModelForCausalLM:
    """With two proxies that reject some candidates, the same at every call."""
    torch.manual_seed(1)
    model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.001, max_candidates=4, gate_hidden_sizes=[16], **KINDS[kind]))
    model.proxies["other"] = model._new_proxy(model.proxy_config)
    for name in model.proxies:
        last = model.proxies[name].gate.mlp[-1]
        weight = torch.randn(last.weight.shape)
        last.weight.data.copy_(weight.to(last.weight.device))
        last.bias.data.fill_(-2.0)
    return model


def loaded(folder: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def placed(folder: str, place: str, dtype=torch.float32):
    lm = loaded(folder, dtype)
    if place == "one device":
        return pretended.move(lm, ONE)
    return dispatch_model(lm, dict(zip(PARTS, PLACES[place], strict=True)), main_device=ONE)


def split_by_hand(folder: str, dtype):
    """As a script without accelerate does it: what a part reads is moved to it, and nothing is moved back."""
    lm = loaded(folder, dtype)
    for name, device in zip(PARTS, PLACES["head on the other"], strict=True):
        part = pretended.move(lm.get_submodule(name), device)

        def to_part(_part, args, kwargs, device=device):
            def moved(x):
                return x.to(device) if isinstance(x, torch.Tensor) else x

            return pretended.tree_map(moved, args), {
                key: x if key == "past_key_values" else pretended.tree_map(moved, x) for key, x in kwargs.items()
            }

        part.register_forward_pre_hook(to_part, with_kwargs=True)
    return lm


def prompts(device: str | None) -> dict[str, torch.Tensor]:
    generator, width = torch.Generator().manual_seed(0), max(LENGTHS)
    ids = torch.randint(4, 96, (len(LENGTHS), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: x.to(device) for name, x in batch.items()} if device else batch


def decoded(model, batch, whole: bool = True) -> dict:
    """What the ways to decode give, as lists; one way alone unless `whole`."""

    def ids(**options):
        torch.manual_seed(2)
        return model.generate(**batch, max_new_tokens=4, **options)

    rollout = ids(output_rollout=True, num_return_sequences=2)
    found = {
        "sequences": rollout.sequences,
        "rejections": rollout.decisions.rank_sum,
        "mask": rollout.rollout.mask,
        "accept": rollout.rollout.accept,
    }
    if whole:
        names = ["other", "default", "__base__", "other"]
        found["by row"] = ids(proxy_names=names, repetition_penalty=1.3)
        if model.proxy_config.features == "candidate":
            found["tree"] = ids(tree=True)
        else:
            with torch.no_grad():
                found["forward"] = model(**batch).logits[:, -1].isfinite()
    return {name: pretended.to_cpu(x).tolist() for name, x in found.items()}


def waits(folder: str) -> dict:
    """Waits for the device per token, of this project by line, and in all, and forwards per token; from runs of two
    lengths, so that what comes once per call does not count."""

    def counted(generate) -> tuple[Counter, int]:
        counts, forwards = [], []
        for length in (2, 8):
            with pretended.Pretending() as counting:
                before = len(forwards)
                generate(length, forwards)
                forwards[before:] = [len(forwards) - before]
            counts.append(counting.waits)
        more = Counter({key: n - counts[0][key] for key, n in counts[1].items()})
        return +more, forwards[1] - forwards[0]

    found = {}
    for kind in ("transformers", "pooled", "candidate, pooled"):
        with pretended.Pretending():
            lm = placed(folder, "one device")
            model = lm if kind == "transformers" else gated(lm, kind)
            batch = prompts(ONE)

        def generate(length, forwards, model=model, lm=lm, batch=batch):
            hook = lm.register_forward_hook(lambda *_: forwards.append(1))
            model.generate(**batch, min_new_tokens=length, max_new_tokens=length)
            hook.remove()

        more, forwards = counted(generate)
        ours = {f"{line} {what}": n / 6 for (what, line), n in more.items() if line.startswith("trl_proxy")}
        found[kind] = {"by_line": ours, "ours": sum(ours.values()), "all": sum(more.values()) / 6}
        found[kind]["forwards"] = forwards / 6
    return found


def trained(folder: str, place: str | None, output_dir: str, kind: str, **options) -> dict:
    """The proxy after two rollouts, and how often the losses of the updates waited, by line."""
    set_seed(0)
    args = ProxyPPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_iterations=1,
        num_generations=2,
        max_completion_length=4,
        max_steps=4,
        replay_rollouts=2,
        learning_rate=0.01,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )

    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    def make(lm):
        return ProxyPPOTrainer(
            model=gated(lm, kind),
            reward_funcs=length,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["abc", "Hello", "to be", "x"]}),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        )

    if place is None:
        trainer = make(loaded(folder))
        trainer.train()
        return {"proxy": [x.tolist() for x in trainer.model.proxy.state_dict().values()]}
    on_cpu, in_updates = PartialState._shared_state["device"], Counter()
    with pretended.Pretending() as counting:
        try:
            if place == "one device":
                trainer = make(loaded(folder))
                pretended.move(trainer.model, ONE)
            else:
                trainer = make(placed(folder, place))
            PartialState._shared_state["device"] = torch.device(ONE)
            trainer.accelerator.state._shared_state["device"] = torch.device(ONE)
            trainer.args.__dict__["_setup_devices"] = torch.device(ONE)
            compute_loss = trainer._compute_loss

            def counted(*args):
                before = counting.waits.copy()
                loss = compute_loss(*args)
                in_updates.update(counting.waits - before)
                return loss

            trainer._compute_loss = counted
            trainer.train()
        finally:
            PartialState._shared_state["device"] = on_cpu
        proxy = [pretended.to_cpu(x).tolist() for x in trainer.model.proxy.state_dict().values()]
        devices = sorted({str(x.device) for x in trainer.model.lm.parameters()})
    return {"proxy": proxy, "waits": {" ".join(key): n for key, n in in_updates.items()}, "devices": devices}


def main(folder: str, output: str, what: str, kind: str = "pooled", dtype: str = "float32") -> None:
    if what == "waits":
        found = waits(folder)
    elif what == "trained":
        options = {"beta": 0.1, "lm_logp_coef": 0.1, "reward_shaping_tokens": 2, "offload_rollouts": True}
        run = str(Path(output).parent / "run")
        found = {
            place or "cpu": trained(folder, place, run, kind, **options) for place in (None, "one device", BY_MAP)
        }
    else:
        as_dtype = getattr(torch, dtype)
        found = {"cpu": decoded(gated(loaded(folder, as_dtype), kind), prompts(None))}
        for place in (*PLACES, BY_HAND):
            with pretended.Pretending():
                lm = split_by_hand(folder, as_dtype) if place == BY_HAND else placed(folder, place, as_dtype)
                found[place] = decoded(gated(lm, kind), prompts(ONE), whole=place == "one device")
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
