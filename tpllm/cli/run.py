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
from tpllm.cli.options import add_sampling_arguments, sampling_params
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS
from tpllm.engine.base import BuildConfig
from tpllm.launched import CONSOLE

if TYPE_CHECKING:
    from tpllm.answer import GenerationOutput
    from tpllm.distributed import World
    from tpllm.inputs import Request
    from tpllm.runner import ModelRunner
    from tpllm.sampling import SamplingParams

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
    parser.add_argument("--chat", action="store_true",
                        help="put each text into the model's chat template; typed lines are one conversation")
    add_sampling_arguments(parser)
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: run(args, world))


def run(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    from tpllm.distributed import SharedError
    from tpllm.errors import InterruptedRun
    from tpllm.runner import ModelRunner

    requests, params = world.together("input", lambda: read_input(args) if world.is_first else ([], []))
    engine_dir = args.engine_dir or cached_engine(args, world)
    started = time.perf_counter()
    runner = ModelRunner.from_dir(engine_dir, args.tokenizer_dir, args.checkpoint_dir, world)
    loaded = time.perf_counter()
    if interactive.wants_lines(args):
        interactive.converse(world, lambda prompt: stream(runner, [prompt], params, []),
                             interactive.Conversation(runner) if args.chat else None)
        return 0
    chats = world.together("chat", lambda: [request.templated(runner.tokenizer) for request in requests])
    prompts = [request.prompt for request in chats]
    said = [request.prompt or prompt for request, prompt in zip(requests, prompts, strict=True)]
    if args.streaming:
        outputs = stream(runner, prompts, params, said)
    else:
        outputs = runner.generate(prompts, params)
    seconds = time.perf_counter() - loaded
    if world.is_first:
        for output, request, text in zip(outputs, requests, said, strict=True):
            output.id, output.prompt = request.id, text if isinstance(text, str) else None  # not as templated
        report(outputs, args)
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        print(f"run: {len(outputs)} prompt(s), {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s) on "
              f"{world.size} rank(s); engine loaded in {loaded - started:.2f} s")
    if world.broadcast(world.draining):
        raise SharedError("interrupted: the answers above are not all finished", InterruptedRun.exit_code)
    return 0


def read_input(args: argparse.Namespace) -> tuple[list[Request], list[SamplingParams]]:
    """The prompts and each one's sampling: the command line's, with what its own line sets."""
    from tpllm.errors import DataError, UsageError
    from tpllm.inputs import Request, read_requests

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
    common = sampling_params(args)
    if args.input_file:
        requests = read_requests(args.input_file)
    else:
        requests = [Request(i, text, {}) for i, text in enumerate(args.input_text or [""])]
    if args.chat:
        requests = [replace(r, messages=[{"role": "user", "content": r.prompt}])
                    if isinstance(r.prompt, str) and r.messages is None else r for r in requests]
    params = []
    for request in requests:
        try:
            params.append(replace(common, **request.sampling))
        except UsageError as e:
            raise DataError(f"{request.place}: {e}") from None
    return requests, params


def stream(runner: ModelRunner, prompts: list[str | list[int]], params: list[SamplingParams],
           said: list[str | list[int]]) -> list[GenerationOutput]:
    """Generate, printing a single answer's text as it comes; of several, a prompt's answers when all have ended."""
    results = runner.collector(prompts, params)
    for event in results:
        if len(prompts) == 1 and len(event.answer.outputs) == 1:
            piece = event.text if event.text is not None else f"{event.token_id} "
            print(piece, end="\n" if event.finish_reason else "", flush=True)
        elif event.last:
            print_answer(event.index, said[event.index], event.answer)
    return results.outputs


def report(outputs: list[GenerationOutput], args: argparse.Namespace) -> None:
    """Print the answers and write `--output-json`."""
    from tpllm.files import write_json

    if not args.streaming:
        for i, output in enumerate(outputs):
            print_answer(i, output.prompt_token_ids if output.prompt is None else output.prompt, output)
    if args.output_json:
        write_json(args.output_json, [output.to_json() for output in outputs])


def print_answer(number: int, prompt: str | list[int], output: GenerationOutput) -> None:
    """In TensorRT-LLM's words; token ids where there is no text."""
    print(f'Input [Text {number}]: "{prompt}"')
    for i, answer in enumerate(output.outputs):
        which = f" Seq {i}" if len(output.outputs) > 1 else ""
        print(f'Output [Text {number}{which}]: "{answer.text if answer.text is not None else answer.token_ids}"',
              flush=True)
