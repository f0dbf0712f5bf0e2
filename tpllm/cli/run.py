"""`tpllm run`: prompts → text, under mpirun."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli import interactive
from tpllm.cli.cached import cached_engine
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS
from tpllm.engine.base import BuildConfig
from tpllm.launch import CONSOLE
from tpllm.sampling import SamplingParams

if TYPE_CHECKING:
    from tpllm.answer import GenerationOutput
    from tpllm.distributed import World
    from tpllm.inputs import Request
    from tpllm.runner import ModelRunner

HELP = "prompts -> text (mpirun -n TP tpllm run ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, metavar="DIR", help="made by tpllm build")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                        help="with --engine-dir: its weights, if they were moved; without: build into a cache and run")
    parser.add_argument("--meta-ckpt-dir", type=Path, metavar="DIR",
                        help="Meta's weights in place of an engine: convert and build into a cache and run")
    parser.add_argument("--hf-model-dir", "--model-dir", type=Path, metavar="DIR",
                        help="Hugging Face's weights, likewise")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of an engine made from weights")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default=BuildConfig().backend,
                        help="of an engine built into the cache")
    parser.add_argument("--model-file", type=Path, metavar="FILE.py", help="a model of your own, for the same")
    parser.add_argument("--tokenizer-dir", type=Path, metavar="DIR", help="default: the checkpoint's own")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input-text", nargs="+", metavar="TEXT",
                        help="one or more prompts (default: under tpllm launch, the lines typed)")
    source.add_argument("--input-file", type=Path, metavar="FILE",
                        help=".txt one prompt a line, .jsonl, .csv or .npy of token ids")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write prompts, tokens and text here")
    parser.add_argument("--streaming", action="store_true", help="print text as it is generated")
    add_sampling_arguments(parser)
    add_rank_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that are fields of `SamplingParams`, with its defaults."""
    default = SamplingParams()
    parser.add_argument("--max-output-len", type=int, default=default.max_output_len, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=default.top_k, help="0 is off")
    parser.add_argument("--top-p", type=float, default=default.top_p, help="1 is off")
    parser.add_argument("--seed", "--random-seed", type=int, default=default.seed, help="of each prompt's draws")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument("--end-id", type=int, metavar="ID", help="end token (default: the tokenizer's)")


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: run(args, world))


def run(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    from tpllm.distributed import SharedError
    from tpllm.errors import InterruptedRun
    from tpllm.inputs import Request
    from tpllm.runner import ModelRunner

    requests, params = world.together("input", lambda: read_input(args) if world.is_first else ([], []))
    engine_dir = args.engine_dir or cached_engine(args, world)
    started = time.perf_counter()
    runner = ModelRunner.from_dir(engine_dir, args.tokenizer_dir, args.checkpoint_dir, world)
    loaded = time.perf_counter()
    if interactive.wants_lines(args):
        interactive.converse(world, lambda line: stream(runner, [Request(0, line, {})], params))
        return 0
    prompts = [request.prompt for request in requests]
    if args.streaming:
        outputs = stream(runner, requests, params)
    else:
        outputs = runner.generate(prompts, params)
    seconds = time.perf_counter() - loaded
    if world.is_first:
        for output, request in zip(outputs, requests, strict=True):
            output.id = request.id
        report(outputs, args)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(f"run: {len(outputs)} prompt(s), {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s) on "
              f"{world.size} rank(s); engine loaded in {loaded - started:.2f} s")
    if world.broadcast(world.draining):
        raise SharedError("interrupted by SIGUSR1: the answers above are not all finished", InterruptedRun.exit_code)
    return 0


def read_input(args: argparse.Namespace) -> tuple[list[Request], list[SamplingParams]]:
    """The prompts and each one's sampling: the command line's, with what its own line sets."""
    from tpllm.errors import DataError, UsageError
    from tpllm.inputs import SAMPLING_FIELDS, Request, read_requests

    weights = [args.meta_ckpt_dir, args.hf_model_dir, args.engine_dir or args.checkpoint_dir]
    if sum(directory is not None for directory in weights) > 1:
        raise UsageError("--meta-ckpt-dir and --hf-model-dir go without each other, --engine-dir and --checkpoint-dir")
    if not any(weights):
        raise UsageError("give --engine-dir DIR, or weights in its place: --meta-ckpt-dir, --hf-model-dir or "
                         "--checkpoint-dir DIR")
    if interactive.wants_lines(args) and CONSOLE not in os.environ:
        raise UsageError("give --input-text TEXT or --input-file FILE; for a prompt to type at: tpllm launch run …")
    if interactive.wants_lines(args) and args.output_json:
        raise UsageError("--output-json needs --input-text or --input-file")
    common = SamplingParams(**{name: getattr(args, name) for name in SAMPLING_FIELDS if hasattr(args, name)})
    if args.input_file:
        requests = read_requests(args.input_file)
    else:
        requests = [Request(i, text, {}) for i, text in enumerate(args.input_text or [""])]
    params = []
    for request in requests:
        try:
            params.append(replace(common, **request.sampling))
        except UsageError as e:
            raise DataError(f"{request.place}: {e}") from None
    return requests, params


def stream(runner: ModelRunner, requests: list[Request], params: list[SamplingParams]) -> list[GenerationOutput]:
    """Generate, printing a single prompt's text as it comes; of several, each answer when it ends."""
    results = runner.collector([request.prompt for request in requests], params)
    for event in results:
        if len(requests) == 1:
            piece = event.text if event.text is not None else f"{event.token_id} "
            print(piece, end="\n" if event.finish_reason else "", flush=True)
        elif event.finish_reason:
            print_answer(event.index, results.outputs[event.index])
    return results.outputs


def report(outputs: list[GenerationOutput], args: argparse.Namespace) -> None:
    """Print the answers and write `--output-json`."""
    from tpllm.files import write_json

    if not args.streaming:
        for i, output in enumerate(outputs):
            print_answer(i, output)
    if args.output_json:
        partial = args.output_json.with_name(args.output_json.name + ".partial")
        write_json(partial, [output.to_json() for output in outputs])
        partial.replace(args.output_json)


def print_answer(number: int, output: GenerationOutput) -> None:
    """In TensorRT-LLM's words; token ids where there is no text."""
    answer = output.outputs[0]
    print(f'Input [Text {number}]: "{output.prompt if output.prompt is not None else output.prompt_token_ids}"')
    print(f'Output [Text {number}]: "{answer.text if answer.text is not None else answer.token_ids}"', flush=True)
