"""`tpllm demo`: the whole flow with the shipped model on this machine, each command shown as it runs."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tpllm.errors import DataError, RankError
from tpllm.launch.machine import program

HELP = "the shipped small model through the whole flow: convert, build, run on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--ranks", type=int, default=2, metavar="N", help="tensor-parallel ranks: 1, 2, 4 or 8")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor",
                        help="without a C++ compiler, eager is used")
    parser.add_argument("--work-dir", type=Path, metavar="DIR",
                        help="keep checkpoint, engines and answers here (default: a scratch directory, removed)")


def work(args: argparse.Namespace) -> int:
    if args.work_dir is None:
        with tempfile.TemporaryDirectory(prefix="tpllm-demo-") as scratch:
            return demo(args, Path(scratch))
    return demo(args, args.work_dir)


def demo(args: argparse.Namespace, directory: Path) -> int:
    """Convert, build, run, and check the answers that can be checked."""
    from tpllm.demo import DEMO_PROMPTS, MODEL_DIR
    from tpllm.launch.launchers import Job, find_launcher
    from tpllm.launch.machine import cores

    if not (MODEL_DIR / "params.json").is_file():
        raise DataError(f"the demo model is not in this installation ({MODEL_DIR})")
    launcher, n, started = find_launcher(), args.ranks, time.perf_counter()
    backend = usable_backend(args.backend)
    environment = {**launcher.environment(str(directory)), "TPLLM_LOG_DIR": str(directory / "logs")}

    def on_ranks(argv: list[str]) -> list[str]:
        return launcher.command(Job(n, argv, oversubscribe=n > cores())).argv

    checkpoint, engine, answers = directory / "checkpoint", directory / "engine", directory / "answers.json"
    prompts = directory / "prompts.jsonl"
    print(f"demo: a LLaMA of 2.6 million parameters over {n} rank(s), launched by {launcher.path}")
    step(1, "Meta's two shards -> one file a rank",
         [*program(), "convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(checkpoint),
          "--tp-size", str(n), "--dtype", "float32"], environment)
    step(2, f"every rank builds its engine ({backend})",
         on_ranks(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine),
                   "--backend", backend]), environment)
    prompts.write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in DEMO_PROMPTS), encoding="utf-8")
    step(3, "the ranks generate text",
         on_ranks(["run", "--engine-dir", str(engine), "--input-file", str(prompts), "--max-output-len", "150",
                   "--output-json", str(answers)]), environment)
    right = wrong = 0
    for prompt, output in zip(DEMO_PROMPTS, json.loads(answers.read_text(encoding="utf-8")), strict=True):
        if prompt.expected is not None:
            correct = prompt.accepts(output["outputs"][0]["text"])
            right, wrong = right + correct, wrong + (not correct)
    print(f"demo: {right} of {right + wrong} checkable answers are right, "
          f"{time.perf_counter() - started:.0f} s in all")
    if args.work_dir:
        print(f"demo: the files are in {directory}")
    return 0 if not wrong else RankError.exit_code


def usable_backend(wanted: str) -> str:
    """`wanted`, or eager, saying so, where inductor has no compiler."""
    from tpllm.errors import PreflightError

    if wanted == "inductor":
        from tpllm.compiler import find_compiler

        try:
            find_compiler()
        except PreflightError as e:
            print(f"demo: {e}; going on with --backend eager")
            return "eager"
    return wanted


def step(number: int, title: str, command: list[str], environment: dict[str, str]) -> None:
    """Run one command, shown as a user would type it."""
    shown = shlex.join(command).replace(shlex.join(program()), "tpllm")
    if shutil.which("mpirun") == command[0]:
        shown = shown.replace(command[0], "mpirun")
    print(f"\n[{number}/3] {title}\n$ {shown}", flush=True)
    code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
    if code:
        raise RankError(f"step {number} failed with exit code {code}: {shown}")
