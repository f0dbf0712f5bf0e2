"""`tpllm bench`: latency and throughput of an engine, or of a named shape with random weights, under mpirun."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpllm.cli.options import add_quantization_arguments, quant_algo
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS
from tpllm.engine.base import BuildConfig

if TYPE_CHECKING:
    from tpllm.distributed import World

HELP = "latency and throughput of an engine (mpirun -n TP tpllm bench ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, metavar="DIR",
                        help="what is measured; where there is none, an engine of --model is built there")
    parser.add_argument("--model", default="llama-2-7b", metavar="NAME",
                        help="published shape, such as llama-3-8b, with random weights")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="inductor", help="of an engine that is built")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="likewise")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="likewise")
    add_quantization_arguments(parser)
    parser.add_argument("--max-batch-size", type=int, metavar="N", help="likewise (default: what is measured)")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32],
                        help="sequences at a time whose latency is measured; none: no latency")
    parser.add_argument("--num-requests", type=int, default=0, metavar="N",
                        help="measure the throughput of N requests too; 0: don't")
    parser.add_argument("--concurrency", type=int, metavar="N",
                        help="of them at a time (default: the engine's --max-batch-size)")
    parser.add_argument("--mixed", action="store_true",
                        help="requests of 32 to --input-len tokens and answers of 16 to --output-len")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3, help="of a latency, of which the median is taken")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: bench(args, world))


def bench(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    import json

    from tpllm import bench
    from tpllm.engine import build_engines

    world.together("bench", lambda: check(args))
    common: dict[str, Any] = {}

    def add(record: dict[str, Any]) -> None:
        line = json.dumps(record | common)
        world.say(line)
        if args.output_file and world.is_first:
            with args.output_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    built = None
    if not world.broadcast(args.engine_dir.is_dir()):
        started = time.perf_counter()
        build_engines(bench.random_engine(args.model, args.dtype, quant_algo(args), limits(args), world),
                      args.engine_dir, None, world)
        built = time.perf_counter() - started
    runner, weights, seconds = bench.load(args.engine_dir, world)
    model = args.model if weights == "random" else Path(weights).name
    common = bench.circumstances(runner, model, weights)
    if built:
        add({"kind": "build", "seconds": round(built, 2)})
    add({"kind": "load", "seconds": round(seconds, 2)})
    bandwidth = bench.memory_bandwidth(world, runner.engine.config.build.device)
    for batch in args.batch_sizes:
        record = bench.decode(runner, batch, args.input_len, args.output_len, args.repeats)
        record = bench.explain(record, runner, bandwidth)
        common = bench.circumstances(runner, model, weights)
        add(record)
    if args.num_requests:
        concurrency = args.concurrency or runner.max_batch_size
        record = bench.throughput(runner, args.num_requests, args.input_len, args.output_len, args.mixed, concurrency)
        common = bench.circumstances(runner, model, weights)
        add(record)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured."""
    from tpllm.errors import UsageError

    quant_algo(args)
    if min([args.repeats, args.input_len, args.concurrency or 1, *args.batch_sizes]) < 1 or args.output_len < 2:
        raise UsageError("--batch-sizes, --repeats, --input-len and --concurrency start at 1, --output-len at 2")


def limits(args: argparse.Namespace) -> BuildConfig:
    """Of an engine for just what is to be measured."""
    batch = args.max_batch_size or args.concurrency or max(args.batch_sizes, default=BuildConfig().max_batch_size)
    return BuildConfig(args.backend, args.device, batch, args.input_len, args.input_len + args.output_len)
