"""A verb on ranks of which one has a planted fault: `doctor_program.py FAULT VERB ARGUMENTS…`."""

from __future__ import annotations

import os
import sys
import tempfile
import time

import tpllm.doctor
from tpllm.cli import main
from tpllm.devices import Device
from tpllm.distributed import World
from tpllm.runlog import installed_versions


def plant(fault: str, rank: int) -> None:
    """Make this rank see what `fault` says; the other ranks see what is."""
    if fault == "one-gpu-for-all":
        tpllm.devices.inventory = lambda: [Device(0, "Fake GPU", "GPU-1234", 80 << 30, ())]
    elif fault == "more-ranks-than-gpus":
        tpllm.devices.inventory = lambda: [Device(i, "Fake GPU", f"GPU-{i}", 80 << 30, (1 - i,)) for i in range(2)]
    elif fault == "one-gpu-each":
        tpllm.devices.inventory = lambda: [Device(0, "Fake GPU", f"GPU-{rank}", 80 << 30, (), 7 + rank)]
    elif rank == 1 and fault == "elsewhere":
        os.chdir(tempfile.mkdtemp(prefix="tpllm-test-"))
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
    if sys.argv[2] == "build":  # which asks torch before it asks for the inventory
        import torch

        torch.cuda.is_available = lambda: True
    sys.exit(main(sys.argv[2:]))
