"""Lets judges decide the pairs of a comparison: every method and seed against SFT, on the same prompts.

The rewards that the records hold already, and the embedded LM as a judge, on CPU:

    python scripts/judge.py --judges reward transformers --output_dir outputs/compare

Any causal LM of the hub, in 4 bit on a GPU:

    python scripts/judge.py --judges transformers \\
        --model_name_or_path Qwen/Qwen2.5-14B-Instruct --load_in_4bit --output_dir outputs/compare

A model behind an OpenAI-compatible endpoint (`pip install -e ".[judge]"`), at OpenAI or on your own server:

    OPENAI_API_KEY=... python scripts/judge.py --judges openai --judge_model gpt-4.1 --requests_per_minute 500 \\
        --price_prompt 2 --price_completion 8 --output_dir outputs/compare
    python scripts/judge.py --judges openai --judge_model Qwen/Qwen2.5-72B-Instruct \\
        --judge_base_url http://localhost:8000/v1 --output_dir outputs/compare

A model that thinks before it answers needs room for it:

    ... --judge_request '{"max_completion_tokens": 4000, "reasoning_effort": "low"}'

People who do not know which method wrote what (blind reading). The first command writes a page and a CSV file for each
sitting into `<output_dir>/readers/reader<k>`; once verdicts are in `<output_dir>/readers/verdicts`, the same command
counts them, and writes what readers said into the records:

    python scripts/judge.py --judges readers --output_dir outputs/compare
    python scripts/judge.py --judges readers --reader_pairs proxy:sft proxy:best_of_n --output_dir outputs/compare

Reads `<output_dir>/records`; all judges but readers leave them alone. Writes
`<output_dir>/judgements/<judge>/<record>.json` and prints all judgements there. The same command resumes an
interrupted run: judgements are kept, and so is every reply of an endpoint, in
`<output_dir>/judgements/replies.sqlite`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from eval.judges.judging import judge, make_parser
from eval.judges.pairwise import JudgeError
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("judge", lambda: judge(*make_parser().parse_args_and_config()), errors=(JudgeError,), goes_on=True)
