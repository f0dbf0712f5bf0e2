#!/usr/bin/env python3
"""One rank of several, alone on this machine's GPU: `tpllm bench` of its part of a published shape.

What it would send to its peers comes back to itself through its own memory, and the sums of long steps, which are
NCCL's or copy engines', are left out. So it says what a rank's kernels take, for more ranks than there are GPUs here;
links, and ranks that wait for each other, come on top. Records of it say `alone`. Run it with a Python that has PyTorch
for CUDA:

    PYTHONPATH=. python3 launch/measure_rank.py 4 --model llama-2-70b --engine-dir build/rank-of-4 --batch-sizes 1 8
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import torch

from tpllm import bench
from tpllm.cli import bench as verb
from tpllm.distributed import World
from tpllm.engine.base import EngineConfig
from tpllm.engine.torch import base, rehearsal
from tpllm.errors import TpllmError
from tpllm.runner import ModelRunner

said_by_bench = bench.circumstances


def stand_in(config: EngineConfig, device: torch.device, world: World) -> rehearsal.Alone:
    """In place of the ranks' GPUs."""
    return rehearsal.first_alone(config, device, "push")


def circumstances(runner: ModelRunner, model: str, weights: str) -> dict[str, Any]:
    command = shlex.join(["launch/measure_rank.py", *sys.argv[1:]])
    return said_by_bench(runner, model, weights) | {"alone": True, "command": command}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tp_size", type=int, help="ranks of which this is the first")
    verb.add_arguments(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    world = World()
    world.size = args.tp_size
    base.connect_gpus, bench.circumstances = stand_in, circumstances
    try:
        return verb.bench(args, world)
    except TpllmError as e:
        parser.exit(e.exit_code, f"{e}\n")


if __name__ == "__main__":
    sys.exit(main())
