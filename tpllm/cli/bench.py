"""`tpllm bench`: latency and throughput of an engine, or of a named shape with random weights, under mpirun."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpllm.cli.options import add_quantization_arguments, quant_algo
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS
from tpllm.engine.base import BuildConfig
from tpllm.errors import UsageError
from tpllm.records import append_record

if TYPE_CHECKING:
    from tpllm.distributed import World

HELP = "latency and throughput of an engine (mpirun -n TP tpllm bench ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, metavar="DIR",
                        help="what is measured; where there is none, an engine of --model is built there")
    parser.add_argument("--model", metavar="NAME",
                        help="published shape, such as llama-3-8b, with random weights (default: llama-2-7b); of an "
                             "engine with weights, what records call it (default: its directory)")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="inductor", help="of an engine that is built")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="likewise")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="likewise")
    add_quantization_arguments(parser)
    parser.add_argument("--max-batch-size", type=int, metavar="N", help="likewise (default: what is measured)")
    parser.add_argument("--max-input-len", type=int, metavar="N", help="likewise")
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="likewise")
    parser.add_argument("--max-num-tokens", type=int, metavar="N", help="likewise")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32],
                        help="sequences at a time whose latency is measured; none: no latency")
    parser.add_argument("--prefill-lens", type=int, nargs="*", default=(), metavar="N",
                        help="lengths of prompts whose prefill rate is measured, one at a time")
    parser.add_argument("--num-requests", type=int, default=0, metavar="N",
                        help="measure the throughput of N requests too; 0: don't")
    parser.add_argument("--concurrency", type=int, metavar="N",
                        help="of them at a time (default: the engine's --max-batch-size)")
    parser.add_argument("--request-rate", type=float, metavar="R",
                        help="they come R a second on the average, as a Poisson process (default: all at once)")
    parser.add_argument("--seed", type=int, default=0, help="of their lengths and of the times at which they come")
    parser.add_argument("--mixed", action="store_true",
                        help="requests of 32 to --input-len tokens and answers of 16 to --output-len")
    parser.add_argument("--check-tokens", type=int, default=0, metavar="N",
                        help="record the greedy answers to N fixed prompts, which reports compare across tp sizes")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3, help="of a latency, of which the median is taken")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: bench(args, world))


def bench(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    from tpllm import bench
    from tpllm.ceilings import explain, measure_ceilings
    from tpllm.engine import build_engines

    world.together("bench", lambda: check(args))
    built, model = None, args.model or "llama-2-7b"
    if not world.broadcast(args.engine_dir.is_dir()):
        started = time.perf_counter()
        config = world.together("build", lambda: bench.random_engine(model, args.dtype, quant_algo(args), limits(args),
                                                                     world))
        build_engines(config, args.engine_dir, None, world)
        built = time.perf_counter() - started
    runner, weights, seconds = bench.load(args.engine_dir, world)
    if weights != "random":
        model = args.model or Path(weights).name

    def add(record: dict[str, Any]) -> None:
        record |= bench.circumstances(runner, model, weights)
        world.say(json.dumps(record))
        if args.output_file and world.is_first:
            append_record(args.output_file, record)

    if built:
        add({"kind": "build", "seconds": round(built, 2)})
    add({"kind": "load", "seconds": round(seconds, 2)})
    if args.check_tokens:
        add(bench.greedy(runner, args.check_tokens, args.input_len, args.output_len))
    if args.batch_sizes:
        ceilings = measure_ceilings(runner)
    for batch in args.batch_sizes:
        add(explain(bench.decode(runner, batch, args.input_len, args.output_len, args.repeats), runner, ceilings))
    for length in args.prefill_lens:
        add(bench.prefill(runner, length, args.repeats))
    if args.num_requests:
        load = bench.Load(args.num_requests, args.input_len, args.output_len, args.mixed, args.request_rate, args.seed)
        add(bench.throughput(runner, load, args.concurrency or runner.max_batch_size))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured."""
    quant_algo(args)
    lengths = [args.repeats, args.input_len, args.concurrency or 1, *args.batch_sizes, *args.prefill_lens]
    if min(lengths) < 1 or args.output_len < 2:
        raise UsageError("--batch-sizes, --prefill-lens, --repeats, --input-len and --concurrency start at 1, "
                         "--output-len at 2")
    if args.request_rate is not None and not 0 < args.request_rate < float("inf"):
        raise UsageError(f"--request-rate {args.request_rate:g}: give a number of requests a second above 0")
    if args.request_rate and not args.num_requests:
        raise UsageError("--request-rate needs --num-requests N")


def limits(args: argparse.Namespace) -> BuildConfig:
    """Of an engine for just what is to be measured."""
    batch = args.max_batch_size or args.concurrency or max([*args.batch_sizes, args.check_tokens]) or 8
    longest = args.max_input_len or max([args.input_len, *args.prefill_lens])
    total = args.max_seq_len or max(args.input_len + args.output_len, longest + 1)
    return BuildConfig(args.backend, args.device, batch, longest, total, args.max_num_tokens)
