"""Ask a model with a proxy, or without, one question on the command line.

    python scripts/generate.py --proxy outputs/demo/proxy "How can I get my deposit back?"
    python scripts/generate.py --proxy outputs/demo/proxy --trace "How can I get my deposit back?"
    python scripts/generate.py "How can I get my deposit back?"                 # the plain LM

`--trace` shows every proposal (figure 1 of arXiv 2403.04283), below a line that says how to read it. In colours,
accepted tokens are green, and rejected ones are red and struck out before the token accepted in their place. Without
colours (a pipe, a log file, NO_COLOR) rejected tokens are marked: `[-like this-]`. They show a line break as Python
writes it, and bytes of an incomplete character as `<0xF0 0x9F>`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

from trl_proxy.runs.ask import ask, make_parser
from trl_proxy.runs.process import run_script

if __name__ == "__main__":
    run_script("generate", lambda: ask(make_parser().parse_args()))
