"""Reads a GGUF file and writes it as safetensors in bfloat16: the program that [`embedded.lm`] runs once per machine.

    python trl_proxy/embedded/convert.py <file.gguf> <folder>

It runs in a separate process, so that the caller cannot change the result. Under torch.distributed, transformers saves
weights on one rank only, and FSDP and ZeRO-3 load parts of a model. The program ends when its standard input closes,
that is, with the process that started it. If it fails, its last line of output is the reason.
"""

import os
import sys
import threading

READ_FAILED, WRITE_FAILED = 3, 4


def _end_with_parent() -> None:
    def wait():
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(gguf: str, folder: str) -> int:
    """Converts `gguf` into the existing `folder`; returns the exit status."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    status = READ_FAILED
    try:
        source, name = os.path.split(gguf)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        status = WRITE_FAILED
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the GGUF reader raises many kinds of errors on a damaged file
        print(" ".join(str(error).split()) or type(error).__name__)
        return status
    return 0


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(*sys.argv[1:]))
