"""`tpllm doctor` on ranks of which one has a planted fault: `doctor_program.py FAULT ARGUMENTS…`."""

from __future__ import annotations

import sys
import time

import tpllm.doctor
from tpllm.cli import main
from tpllm.devices import Device
from tpllm.distributed import World
from tpllm.runlog import installed_versions


def plant(fault: str, rank: int) -> None:
    """Make this rank see what `fault` says; the other ranks see what is."""
    if fault == "one-gpu-for-all":
        tpllm.doctor.inventory = lambda: [Device(0, "Fake GPU", "GPU-1234", 80 << 30, ())]
    elif fault == "more-ranks-than-gpus":
        tpllm.doctor.inventory = lambda: [Device(i, "Fake GPU", f"GPU-{i}", 80 << 30, (1 - i,)) for i in range(2)]
    elif rank == 1 and fault == "version":
        tpllm.doctor.installed_versions = lambda: installed_versions() | {"torch": "1.2.3"}
    elif rank == 1 and fault == "memory":
        tpllm.doctor.memory_limit = lambda: (1024, "a planted limit")
    elif rank == 1 and fault == "slow":
        tpllm.doctor.STAGES = tuple((name, 2.0, (lambda _: time.sleep(60) or "") if name == "files" else check)
                                    for name, _, check in tpllm.doctor.STAGES)
    elif fault == "slow":
        tpllm.doctor.STAGES = tuple((name, 2.0, check) for name, _, check in tpllm.doctor.STAGES)
    elif rank == 1 and fault == "sum":
        from tpllm.engine.torch import collectives

        right = collectives.all_reduce
        collectives.all_reduce = lambda x: right(x) + (x.numel() > 1 << 20)


if __name__ == "__main__":
    plant(sys.argv[1], World.start().rank)
    sys.exit(main(["doctor", *sys.argv[2:]]))
