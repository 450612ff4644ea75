"""Imported before everything else: keeps a message of bitsandbytes off every start of every command.

On CPUs with bfloat16 it says, whenever it is imported, that an optional kernel could not be downloaded.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
