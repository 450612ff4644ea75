"""Ask a model with a proxy, or without, one question on the command line.

    python scripts/generate.py --proxy outputs/demo/proxy "How can I get my deposit back?"
    python scripts/generate.py --proxy outputs/demo/proxy --trace "How can I get my deposit back?"
    python scripts/generate.py "How can I get my deposit back?"                 # the plain LM

`--trace` shows every proposal (figure 1 of arXiv 2403.04283): accepted tokens in green, rejected ones in red and
struck out before the token that was accepted in their place, tokens that nobody was asked about as they are.
"""

import argparse

import torch
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer, set_seed

from trl_proxy import ProxyModelForCausalLM
from trl_proxy.actor_critic import check_chat_template
from trl_proxy.defaults import EMBEDDED, load_lm
from trl_proxy.rollout import trace
from trl_proxy.runs import run_script


def make_parser() -> argparse.ArgumentParser:
    """What to ask, whom, and how."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", help="The question.")
    parser.add_argument("--proxy", help="Folder or hub id of a proxy; the plain LM if not set.")
    parser.add_argument("--model_name_or_path", default=EMBEDDED, help="`embedded`, a folder or a hub id.")
    parser.add_argument("--system", help="System prompt.")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest response.")
    parser.add_argument("--threshold", type=float, help="Alignment strength: above 0 the gate rejects more.")
    parser.add_argument("--gate_sample", action="store_true", help="Draw the gate's decisions.")
    parser.add_argument("--trace", action="store_true", help="Show what was proposed, accepted and rejected.")
    parser.add_argument("--dtype", help="Of the LM, e.g. float32; default: as stored.")
    parser.add_argument("--seed", type=int, default=0, help="For --gate_sample.")
    return parser


def trace_text(tokenizer, output, prompt_width: int) -> Text:
    """The response of the first row with its rejected proposals, for a terminal."""
    response = output.sequences[0, prompt_width : prompt_width + int(output.decisions.tokens[0])].tolist()
    text = Text()
    for token in trace(output.rollout, [response])[0]:
        for candidate in token.rejected:
            # A line break that was rejected must not break the line.
            text.append(tokenizer.decode([candidate]).replace("\n", "\\n"), "red strike")
        text.append(tokenizer.decode([token.token_id]), "green" if token.asked else None)
    return text


def main(args: argparse.Namespace) -> None:
    """Loads the LM and the proxy and prints the response."""
    if args.trace and not args.proxy:
        raise ValueError("--trace shows the decisions of a proxy: name one with --proxy.")
    set_seed(args.seed)
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": args.prompt})
    check_chat_template(messages, tokenizer)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(lm.device)
    console = Console(highlight=False)
    if not args.proxy:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            lm.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=streamer)
        return
    model = ProxyModelForCausalLM.from_pretrained(lm, args.proxy)
    streamer = None if args.trace else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        gate_sample=args.gate_sample,
        threshold=args.threshold,
        output_rollout=True,
        streamer=streamer,
    )
    decisions = output.decisions
    if args.trace:
        console.print(trace_text(tokenizer, output, inputs["input_ids"].shape[1]))
    console.print(
        f"{int(decisions.tokens[0])} tokens, {int(decisions.proposals[0])} proposals: {int(decisions.rank_sum[0])} "
        f"rejected, {int(decisions.accepts[0])} accepted, {int(decisions.forced[0])} without asking; "
        f"{int(decisions.lm_forwards[0])} LM forwards",
        style="dim",
    )


if __name__ == "__main__":
    run_script("generate", lambda: main(make_parser().parse_args()))
