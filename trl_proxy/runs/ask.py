"""Asks a model with or without a proxy one question, and traces its proposals."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from transformers import HfArgumentParser, TextStreamer, set_seed

from ..core.config import ProxyConfig
from ..decoding.hidden_states import execution_device
from ..decoding.settings import DecodingSettings
from ..decoding.trace import trace, trace_texts
from ..devices import best_device
from ..loading import EMBEDDED
from ..modeling.causal_lm import ProxyModelForCausalLM
from .arguments import DecodingArguments, FrozenModelConfig, load_policy, to_device
from .parsing import OneSentenceMixin, OptionsFormatter

_BOOLEANS = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")  # as transformers' parser reads them
# The LM's options that the help lists; it takes every one of the other scripts.
_SHOWN = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")


@dataclass
class AskedModelConfig(FrozenModelConfig):
    """The model arguments of the other scripts, for the embedded LM and the dtype of its weights by default."""

    model_name_or_path: str | None = field(
        default=EMBEDDED, metadata={"help": "`embedded`, a folder or a hub id of a causal LM."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Of the LM. `auto`: as stored, or one that the device computes in.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )


class _QuestionParser(OneSentenceMixin, HfArgumentParser):
    """Also takes a question right after a flag, as in `--load_in_4bit "How are you?"`."""

    def parse_known_args(self, args=None, namespace=None):
        words, given = [], list(sys.argv[1:] if args is None else args)
        for word, following in zip(given, [*given[1:], ""]):
            words.append(word)
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs == "?" and following.lower() not in _BOOLEANS:
                words[-1] = f"{word}=true"
        return super().parse_known_args(words, namespace)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the question and its options."""
    parser = _QuestionParser(
        AskedModelConfig,
        description="Ask a model with or without a proxy one question on the command line.",
        formatter_class=OptionsFormatter,
    )
    for action in parser._actions:
        if action.dest not in ("help", *_SHOWN):
            action.help = argparse.SUPPRESS
    parser.add_argument("prompt", help="The question.")
    parser.add_argument("--proxy", help="Folder or hub id of a proxy; the plain LM if not set.")
    parser.add_argument("--system_prompt", "--system", help="System message; default: that of the proxy's training.")
    parser.add_argument(
        "--generation_kwargs",
        help="Options of `generate` that replace the LM's generation_config.json, as JSON; default: as in training.",
    )
    parser.add_argument(
        "--chat_template_kwargs", help="Arguments of the chat template, as JSON; default: as in training."
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest response.")
    parser.add_argument("--threshold", type=float, help="Alignment strength: above 0 the gate rejects more.")
    parser.add_argument("--gate_sample", action="store_true", help="Draw the gate's decisions.")
    parser.add_argument("--trace", action="store_true", help="Show each proposal: accepted, or rejected and marked.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the LM's own code of the hub.")
    parser.add_argument("--use_cpu", action="store_true", help="Run on the CPU, whatever else this machine has.")
    parser.add_argument("--seed", type=int, default=0, help="For --gate_sample.")
    return parser


class TracedText(NamedTuple):
    """The text of a token, whether it was accepted by a decision, and the texts that were rejected before it."""

    text: str
    asked: bool
    rejected: list[str]


def read_trace(tokenizer, output, prompt_width: int) -> list[TracedText]:
    """The tokens of the first row's response. Unprintable characters in rejected texts are escaped."""
    response = output.sequences[0, prompt_width : prompt_width + int(output.decisions.tokens[0])].tolist()
    tokens = trace(output.rollout, [response])[0]
    return [
        TracedText(text, token.asked, list(map(visible, rejected)))
        for token, (text, rejected) in zip(tokens, trace_texts(tokens, tokenizer), strict=True)
    ]


def visible(text: str) -> str:
    """The text on one line: a line break, what cannot be printed and a backslash are escaped as in Python."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def colored_trace(tokens: list[TracedText]) -> Text:
    """A legend, and the response in colours with its rejected texts struck out."""
    text = Text.assemble(("accepted", "green"), ", ", ("rejected", "red strike"), ", taken without a decision\n")
    for token in tokens:
        for rejected in token.rejected:
            text.append(rejected, "red strike")
        text.append(token.text, "green" if token.asked else None)
    return text


def plain_trace(tokens: list[TracedText]) -> str:
    """A legend, and the response with its rejected texts as `[-text-]`.

    All marks have the same number of dashes. It is the smallest number for which the response has no `[-` and no
    rejected text has `-]`. So a mark ends at the first `-]` after its `[-`.
    """
    response = "".join(token.text for token in tokens)
    dashes = "-"
    while f"[{dashes}" in response or any(f"{dashes}]" in rejected for token in tokens for rejected in token.rejected):
        dashes += "-"
    mark = f"[{dashes}{{}}{dashes}]".format
    legend = f"{mark('text')} was rejected; the text after it was accepted in its place\n"
    return legend + "".join("".join(map(mark, token.rejected)) + token.text for token in tokens)


def print_trace(console: Console, tokens: list[TracedText]) -> None:
    """Prints the trace in colours if the console has them; neither form is wrapped."""
    if console.color_system is None or console.no_color:
        print(plain_trace(tokens), file=console.file)  # rich would write spaces for a tab
    else:
        console.print(colored_trace(tokens), soft_wrap=True)


def ask(args: argparse.Namespace) -> None:
    """Loads the LM and the proxy and prints the response."""
    if args.trace and not args.proxy:
        raise ValueError("--trace shows the decisions of a proxy: name one with --proxy.")
    given = DecodingArguments(args.system_prompt, args.generation_kwargs, args.chat_template_kwargs)
    trained = (ProxyConfig.from_pretrained(args.proxy).decoding or {}) if args.proxy else {}
    options = {**trained, **{name: value for name, value in dataclasses.asdict(given).items() if value is not None}}
    set_seed(args.seed)
    model_args = AskedModelConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(AskedModelConfig)})
    device = best_device(args.use_cpu)
    lm, tokenizer = load_policy(model_args, args, device)
    lm = to_device(lm, device)
    decoding = DecodingSettings.of(lm, tokenizer, max_new_tokens=args.max_new_tokens, **options)
    inputs = decoding.pad(decoding.encode([[{"role": "user", "content": args.prompt}]]), execution_device(lm))
    console = Console(highlight=False)
    streamer = None if args.trace else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not args.proxy:
        with torch.no_grad():
            decoding.generate(lm, inputs, do_sample=False, streamer=streamer)
        return
    model = ProxyModelForCausalLM.from_pretrained(lm, args.proxy)
    gate = {"gate_sample": args.gate_sample, "threshold": args.threshold}
    *_, output = decoding.generate(model, inputs, output_rollout=True, streamer=streamer, **gate)
    decisions = output.decisions
    if args.trace:
        print_trace(console, read_trace(tokenizer, output, inputs["input_ids"].shape[1]))
    console.print(
        f"{int(decisions.tokens[0])} tokens, {int(decisions.proposals[0])} proposals: {int(decisions.rank_sum[0])} "
        f"rejected, {int(decisions.accepts[0])} accepted, {int(decisions.forced[0])} without asking; "
        f"{int(decisions.lm_forwards[0])} LM forwards",
        style="dim",
        soft_wrap=True,
    )
