"""`tpllm bench`: latency of a named shape with random weights, under mpirun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS

if TYPE_CHECKING:
    from tpllm.distributed import World

HELP = "latency of a named shape with random weights (mpirun -n TP tpllm bench ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-7b", metavar="NAME", help="published shape, such as llama-3-8b")
    parser.add_argument("--engine-dir", type=Path, required=True, metavar="DIR",
                        help="its engine; built there first if there is none")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="inductor", help="of an engine that is built")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="likewise")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="likewise")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="sequences at a time")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: bench(args, world))


def bench(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    import json

    import torch

    from tpllm.bench import build_random, load_random, measure, named_config
    from tpllm.engine.base import BuildConfig

    records = []
    if not world.broadcast(args.engine_dir.is_dir()):
        model = named_config(args.model, args.dtype)
        limits = BuildConfig(args.backend, args.device, max(args.batch_sizes), args.input_len,
                             args.input_len + args.output_len)
        records.append({"kind": "build", "seconds": build_random(args.engine_dir, model, limits, world)})
        world.say(json.dumps(records[-1]))
    runner, seconds = load_random(args.engine_dir, world)
    records.append({"kind": "load", "seconds": seconds})
    world.say(json.dumps(records[-1]))
    for batch in args.batch_sizes:
        records.append(measure(runner, batch, args.input_len, args.output_len, args.repeats))
        world.say(json.dumps(records[-1]))
    config = runner.engine.config
    cuda = config.build.device == "cuda"
    common = {"model": args.model, "tp_size": config.tp_size, "dtype": config.model.dtype, "quant_algo": None,
              "backend": config.build.backend, "device": torch.cuda.get_device_name() if cuda else "cpu",
              "weights": "random", "versions": config.versions}
    if args.output_file and world.is_first:
        with args.output_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record | common) + "\n" for record in records)
    return 0
