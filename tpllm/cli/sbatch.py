"""`tpllm sbatch`: the batch script of any verb, printed or submitted."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from tpllm.cli.launch import RANKED
from tpllm.errors import PreflightError, UsageError
from tpllm.launch.estimate import read_model, tp_size
from tpllm.launch.sbatch import BatchOptions, read_profile, render, with_tasks

HELP = "print, or submit, the Slurm batch script of a verb"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for f in fields(BatchOptions):
        kind, text = f.metadata["kind"], f.metadata["help"]
        if f.default not in (MISSING, None, False):
            text += f" (default: {f.default})"
        options: dict[str, Any] = {"type": kind, "metavar": "N" if kind is int else "X"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif kind is list:
            options = {"action": "append", "metavar": "LINE"}
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=text.replace("%", "%%"), **options)
    parser.add_argument("--profile", type=Path, metavar="FILE",
                        help="TOML with the site's values of these (default: $TPLLM_SITE or ~/.config/tpllm/site.toml)")
    parser.add_argument("--submit", action="store_true", help="submit the script and print the job's number")
    parser.add_argument("batch_verb", metavar="VERB", help="any verb of tpllm")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="its options")


def work(args: argparse.Namespace) -> int:
    verb = parse_verb(args.batch_verb, args.rest)
    given = {f.name: value for f in fields(BatchOptions) if (value := getattr(args, f.name)) is not None}
    options = BatchOptions(**(read_profile(args.profile) | given))
    if options.requeue and args.batch_verb == "batch" and "--resume" not in args.rest:
        raise UsageError("--requeue starts the job again, which then finds its output: add --resume after batch")
    ranked = args.batch_verb in RANKED
    model, _ = read_model(getattr(verb, "engine_dir", None), getattr(verb, "checkpoint_dir", None))
    options = with_tasks(options, tp_size(model) if ranked else None)
    script = render(options, args.batch_verb, args.rest, ranked)
    if args.submit:
        print(submit(script, options.output or "logs/%x-%j.out"))
    else:
        print(script, end="")
    return 0


def parse_verb(verb: str, rest: list[str]) -> argparse.Namespace:
    """The verb's own options, so that what is wrong with them is said now and not when the job starts."""
    from tpllm.cli import VERBS, dashed, make_parser

    if verb in ("launch", "sbatch"):
        inner = next((word for word in rest if word in RANKED), "VERB")
        raise UsageError(f"sbatch starts the ranks itself; type: tpllm sbatch {inner} …")
    if verb not in VERBS:
        raise UsageError(f"no such verb: {verb}; the verbs are {', '.join(VERBS)}")
    if any("$SLURM_" in word or "${SLURM_" in word for word in rest):
        return argparse.Namespace()  # only the job itself will know
    return make_parser().parse_args([verb, *dashed(rest)])


def submit(script: str, output: str) -> str:
    """Hand the script to sbatch; returns the job's number."""
    if shutil.which("sbatch") is None:
        raise PreflightError("no sbatch on this machine: leave out --submit to have the script printed")
    if "%" not in (directory := str(Path(output).parent)):
        Path(directory).mkdir(parents=True, exist_ok=True)  # Slurm drops the job without a word if it is missing
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise PreflightError("sbatch did not answer within 120 s; squeue shows whether it took the job") from None
    if done.returncode:
        raise PreflightError(f"sbatch refused the script: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
