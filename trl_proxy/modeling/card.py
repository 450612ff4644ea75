"""The model card of a proxy: its LM, how to load it, its training and its measured results."""

import dataclasses
import json
import os
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..core.config import ProxyConfig
from ..files import write_text

CITATION = """\
@article{zhu2024proxyrlhf,
    title   = {{Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with Proxy}},
    author  = {Yu Zhu and Chuxiong Sun and Wenfei Yang and Wenqiang Wei and Bo Tang and Tianzhu Zhang and Zhiyu Li and Shifeng Zhang and Feiyu Xiong and Jie Hu and Mingchuan Yang},
    year    = 2024,
    eprint  = {arXiv:2403.04283},
}"""  # noqa: E501
_TEXT = """# {name}

A proxy (Proxy-RLHF, [arXiv 2403.04283](https://huggingface.co/papers/2403.04283)) over the frozen language model
`{base}`{revision}: it accepts or rejects the tokens that the LM proposes. The LM itself is not part of this repository
and was not changed; its own licence applies to it. The proxy has {trainable:,} parameters, {share:.2f} % of the LM's.

```python
from transformers import AutoModelForCausalLM
from trl_proxy import ProxyModelForCausalLM

lm = AutoModelForCausalLM.from_pretrained({base_argument}{revision_argument})
model = ProxyModelForCausalLM.from_pretrained(lm, "this folder or repository")
model.generate(**inputs, max_new_tokens=64)
```

{training}

{settings}

{results}

```bibtex
{citation}
```
"""
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"
# Key of a record -> what it is, and the key of its 95 % interval.
_MEASURED = {
    "reward_mean": ("reward", "reward_ci95"),
    "delta_vs_sft": ("gain over the LM's greedy decoding", "delta_ci95"),
    "gold_delta_vs_sft": ("the same by the gold reward", None),
    "win_rate_vs_sft": ("win rate against the LM's greedy decoding", "win_rate_ci95"),
    "lm_logprob_per_token": ("the LM's log-probability per token", None),
}


def _without_marks(text: str) -> str:
    """The text with no mark in it, whatever the values in it hold."""
    return text.replace("<!--", "<! --")


def _literal(value: str) -> str:
    """A text as a literal of JSON and of Python that holds no mark."""
    return json.dumps(value).replace("<", "\\u003c")


def _plain(value) -> str:
    """A value as text of one line that cannot end the code or the list in which it stands."""
    return " ".join(str(value).replace("`", "'").split())


def proxy_card(
    config: ProxyConfig,
    trainable: int,
    total: int,
    *,
    revision: str | None = None,
    training: str = "How it was trained is not recorded here.",
    name: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = ("trl-proxy",),
) -> ModelCard:
    """The card of a proxy, from what is known.

    Args:
        config: the proxy's.
        trainable, total: numbers of the proxy's parameters, and of the LM's with it.
        revision: the LM's commit on the hub.
        training: what it was trained on and by which reward, a paragraph.
        name, dataset, tags: for the card's metadata.
    """
    base = config.base_model_name_or_path or "the LM that it was trained on"
    on_hub = "/" in base and not os.path.exists(base)
    metadata = ModelCardData(
        library_name="trl-proxy",
        base_model=base if on_hub else None,
        tags=list(tags),
        datasets=[dataset] if dataset and "/" in dataset and not os.path.exists(dataset) else None,
        model_name=name,
    )

    def filled(template: str) -> str:
        text = template.format(
            name=name or "proxy",
            base=_plain(base),
            base_argument=_literal(base),
            revision=f" (revision `{_plain(revision)}`)" if revision else "",
            revision_argument=f", revision={_literal(revision)}" if revision else "",
            trainable=trainable,
            share=100 * trainable / (total - trainable),
            training=training,
            settings="\n".join(
                f"- `{k}`: {_plain(v)}" for k, v in dataclasses.asdict(config).items() if v is not None
            ),
            citation=CITATION,
        )
        return _without_marks(text)

    before, after = map(filled, _TEXT.split("{results}"))
    text = f"{before}{_BEGIN}\n{_END}{after}"
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def add_results(path: str | os.PathLike, record: dict) -> None:
    """Writes the results of an evaluation into a proxy's card, as text and as the hub's metadata. It replaces earlier
    results.

    Args:
        path: the card, `README.md` of a proxy's folder.
        record: of the evaluation, as `scripts/compare.py` writes it.
    """
    results, lines = [], []
    for key, (title, interval) in _MEASURED.items():
        if record.get(key) is None:
            continue
        low_high = record.get(interval) if interval else None
        suffix = f" (95 % interval {low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
        lines.append(f"- {title}: {record[key]:.3f}{suffix}")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="prompts",
                dataset_name=record["dataset"],
                metric_type=key,
                metric_name=title,
                metric_value=round(record[key], 4),
            )
        )
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.model_name = card.data.model_name or "proxy"
    card.data.eval_results = results
    before, _, rest = card.text.partition(_BEGIN)
    heading = (
        f"Measured on {record['n_prompts']} prompts ({_plain(record['dataset'])}) with the reward "
        f"`{_plain(record['reward_model'])}`, greedy decisions, at most {record['max_new_tokens']} new tokens:"
    )
    card.text = "\n".join([before + _BEGIN, _without_marks(heading), "", *lines, _END + rest.partition(_END)[2]])
    write_text(path, str(card))
