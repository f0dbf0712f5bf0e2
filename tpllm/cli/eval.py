"""`tpllm eval`: perplexity, MMLU and summaries of local data, under mpirun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpllm.cli.options import add_engine_arguments
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.distributed import SharedError, World
from tpllm.errors import InterruptedRun, UsageError
from tpllm.evaluate import TASKS, Settings, Task
from tpllm.files import write_json
from tpllm.sampling import SamplingParams

if TYPE_CHECKING:
    from tpllm.runner import ModelRunner

HELP = "perplexity, MMLU or summaries of local data -> scores (mpirun -n TP tpllm eval ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tuple(TASKS), required=True, help="what to measure")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR",
                        help="perplexity: .txt files; mmlu: dev/*_dev.csv and test/*_test.csv; summarize: .jsonl of "
                             "document and summary; a single .txt or .jsonl file too")
    add_engine_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N",
                        help="the first N windows, questions of each subject, or documents (default: all)")
    parser.add_argument("--stride", type=int, metavar="N",
                        help="perplexity: tokens between the starts of two windows (default: half a window)")
    parser.add_argument("--max-output-len", type=int, default=Settings.max_output_len,
                        help="summarize: tokens of a summary")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write scores and answers here")
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: evaluate(args, world))


def evaluate(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank; rank 0 alone reads the data and scores."""
    from tpllm.runner import ModelRunner

    task = world.together("data", lambda: read_data(args) if world.is_first else None)
    runner = ModelRunner.from_dir(args.engine_dir, args.tokenizer_dir, args.checkpoint_dir, world)
    prompts, params = world.together("prompts", lambda: make_prompts(task, runner))
    world.say(f"eval: {len(prompts)} prompts of {sum(map(len, prompts))} tokens")
    outputs = runner.generate(prompts, params)
    if world.broadcast(world.draining):
        raise SharedError("interrupted by SIGUSR1: not all prompts are scored", InterruptedRun.exit_code)
    if task:
        config = runner.engine.config
        scores = task.scores(outputs)
        about = {"task": args.task, "data_dir": str(args.data_dir), "limit": args.limit,
                 "engine_dir": str(args.engine_dir), "tp_size": config.tp_size, "dtype": config.model.dtype}
        report(about | task.details | {"scores": [vars(score) for score in scores]}, args.output_json)
    return 0


def read_data(args: argparse.Namespace) -> Task:
    if args.output_json and not args.output_json.parent.is_dir():
        raise UsageError(f"--output-json {args.output_json}: there is no directory {args.output_json.parent}")
    return TASKS[args.task](Settings(args.data_dir, args.limit, args.stride, args.max_output_len))


def make_prompts(task: Task | None, runner: ModelRunner) -> tuple[list[list[int]], SamplingParams]:
    if task is None:
        return [], SamplingParams()
    if runner.tokenizer is None:
        raise UsageError("this model has no tokenizer: give --tokenizer-dir DIR")
    return task.prompts(runner.tokenizer, runner.engine.config.build)


def report(result: dict[str, Any], path: Path | None) -> None:
    """The table on the console, everything in the file."""
    width = max(len(score["name"]) for score in result["scores"])
    for score in result["scores"]:
        error = score["standard_error"]
        print(f"{score['name']:<{width}}  {score['value']:10.4f} ± {'?' if error is None else f'{error:.4f}':<8} "
              f"of {score['count']}")
    rest = {name: value for name, value in result.items() if name not in ("scores", "answers")}
    print("eval: " + ", ".join(f"{name} {value}" for name, value in rest.items()), flush=True)
    if path:
        write_json(path, result)
