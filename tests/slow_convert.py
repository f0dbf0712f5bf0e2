"""`tpllm convert` that takes its time: `slow_convert.py SHARE convert …`.

Weights go to the files in small pieces with pauses, so that a kill finds tensors half-written. After SHARE of the
bytes, if that is less than 1, the last rank kills itself. Prints "ready" when all is imported, and at its end
"wrote N", the bytes of tensors that it wrote and the headers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import tpllm.checkpoint.convert
from tpllm.checkpoint.safetensors_file import SafetensorsFile
from tpllm.cli import main
from tpllm.launched import launched_by

PIECE, PAUSE = 8192, 0.003
SHARE = float(sys.argv[1])
LAUNCHED = launched_by(os.environ)
total = written = 0
lock = threading.Lock()
pwrite, opened = os.pwrite, SafetensorsFile.__init__


def slow(fd: int, data: Any, offset: int) -> int:
    global written
    time.sleep(PAUSE)
    count = pwrite(fd, data[:PIECE], offset)
    with lock:
        written += count
        if SHARE < 1 and written > SHARE * total and (LAUNCHED is None or LAUNCHED.rank == LAUNCHED.size - 1):
            os.kill(os.getpid(), signal.SIGKILL)
    return count


def counted(self: SafetensorsFile, *arguments: Any) -> None:
    global total
    opened(self, *arguments)
    total += self.size


os.pwrite = slow
SafetensorsFile.__init__ = counted  # type: ignore[method-assign]
print("ready", flush=True)
assert tpllm.checkpoint.convert
code = main(sys.argv[2:])
print(f"wrote {written}", flush=True)
sys.exit(code)
