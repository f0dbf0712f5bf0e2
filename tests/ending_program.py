"""Ranks of which the last never leaves MPI: `ending_program.py KIND`, KIND `finish` or `abort`."""

from __future__ import annotations

import ctypes
import sys

import tpllm.distributed
from tpllm.distributed import World

if __name__ == "__main__":
    tpllm.distributed.FINALIZE_SECONDS = 1.0
    tpllm.distributed.ABORT_SECONDS = 1.0
    world = World.start()
    if world.rank == world.size - 1:
        # In C and without the interpreter's lock, as the library's own calls are made.
        tpllm.distributed.mpi_call = lambda *_: ctypes.CDLL(None).pause()
    print(f"rank {world.rank} is done")
    if sys.argv[1] == "abort" and world.rank == world.size - 1:
        world.abort(12)
    if sys.argv[1] == "abort":
        world.barrier()
