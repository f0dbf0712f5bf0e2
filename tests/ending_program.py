"""Ranks of which the last never leaves MPI: `ending_program.py KIND`, KIND `finish`, `abort` or `twice`."""

from __future__ import annotations

import ctypes
import sys
import threading

import tpllm.distributed
from tpllm.distributed import World


def stuck(name: str, *_: object) -> None:
    """In C and without the interpreter's lock, as the library's own calls are made."""
    print(f"called {name}", flush=True)
    ctypes.CDLL(None).pause()


if __name__ == "__main__":
    tpllm.distributed.FINALIZE_SECONDS = 1.0
    tpllm.distributed.ABORT_SECONDS = 1.0
    world = World.start()
    if world.rank == world.size - 1:
        tpllm.distributed.mpi_call = stuck
    print(f"rank {world.rank} is done")
    if sys.argv[1] != "finish" and world.rank == world.size - 1:
        if sys.argv[1] == "twice":
            threading.Thread(target=world.abort, args=(12,)).start()
        world.abort(12)
    if sys.argv[1] != "finish":
        world.barrier()
