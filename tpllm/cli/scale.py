"""`tpllm scale`: convert, build and measure at several tp sizes, resumable; then tables and figures of it all."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpllm import __version__
from tpllm.cli.options import add_quantization_arguments, quant_algo
from tpllm.config import DTYPES
from tpllm.engine import BACKENDS
from tpllm.errors import RankError, UsageError
from tpllm.files import source_key
from tpllm.launch.machine import program
from tpllm.records import append_record, read_records
from tpllm.report.tables import fits
from tpllm.runlog import date
from tpllm.settings import setting

HELP = "measure a model at several tp sizes and write a report of how it scales"
RESULTS = "results.jsonl"
Case = dict[str, Any]
SOURCES = ("meta_ckpt_dir", "hf_model_dir", "checkpoint_dir")
# What a task of an array job is told again.
PASSED = ("model", *SOURCES, "model_file", "tp_sizes", "batch_sizes", "prefill_lens", "input_len", "output_len",
          "num_requests", "concurrency", "request_rate", "mixed", "repeats", "check_tokens", "dtype", "backend",
          "device", "use_weight_only", "weight_only_precision", "output_dir", "work_dir", "launch")


class Numbers(argparse.Action):
    """`1,2,4` or `1 2 4`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option: str | None = None) -> None:
        try:
            found = [int(text) for word in values for text in word.split(",") if text]
        except ValueError:
            raise argparse.ArgumentError(self, f"{' '.join(values)} is no list of numbers such as 1,2,4") from None
        if any(number < 1 for number in found):
            raise argparse.ArgumentError(self, f"{' '.join(values)}: numbers start at 1")
        setattr(namespace, self.dest, sorted(set(found)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, metavar="DIR",
        help=f"where {RESULTS} and the report go; what is in {RESULTS} is not measured again")
    add("--model", metavar="NAME", help="published shape, such as llama-2-7b, with random weights; with weights, what "
                                        "records call them (default: their directory)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--meta-ckpt-dir", type=Path, metavar="DIR", help="Meta's weights, converted for each tp size")
    source.add_argument("--hf-model-dir", type=Path, metavar="DIR", help="Hugging Face's, likewise")
    source.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="TensorRT-LLM's, likewise")
    add("--model-file", type=Path, metavar="FILE.py", help="a model of your own")
    add("--tp-sizes", action=Numbers, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of ranks")
    add("--batch-sizes", action=Numbers, nargs="*", default=[1, 2, 4, 8, 16, 32], metavar="N",
        help="sequences at a time whose latency is measured")
    add("--prefill-lens", action=Numbers, nargs="*", metavar="N",
        help="prompts whose prefill rate is measured (default: one of --input-len)")
    add("--input-len", type=int, default=128, help="tokens of each prompt")
    add("--output-len", type=int, default=256, help="tokens of each answer")
    add("--num-requests", type=int, default=0, metavar="N", help="measure the throughput of N requests too; 0: don't")
    add("--concurrency", type=int, metavar="N", help="of them at a time (default: the largest of --batch-sizes)")
    add("--request-rate", type=float, metavar="R", help="they come R a second on the average (default: all at once)")
    add("--mixed", action="store_true", help="of mixed lengths, as in tpllm bench")
    add("--repeats", type=int, default=3, help="of a latency, of which the median is taken")
    add("--check-tokens", type=int, default=4, metavar="N",
        help="compare the greedy answers to N prompts across tp sizes; 0: don't")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is the weights', bfloat16 of a named shape")
    add_quantization_arguments(parser)
    add("--backend", choices=tuple(BACKENDS), default="inductor", help="of the engines")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where engines run")
    add("--work-dir", type=Path, metavar="DIR", help="where checkpoints and engines are made and kept, seen by all "
                                                     "hosts (default: scale in TPLLM_CACHE)")
    add("--launch", default="", metavar="OPTIONS",
        help="options of tpllm launch in one word, such as '--hostfile hosts --timeout 900'")
    add("--report-only", action="store_true", help=f"write the report of the {RESULTS} that is there")
    add("--against", type=Path, metavar="DIR", help="compare with the results in another directory")
    add("--sbatch", nargs="?", const="", metavar="OPTIONS",
        help="print the script of a Slurm array job, a task a tp size, with these options of tpllm sbatch in one word, "
             "such as '--gpus-per-node 8 --submit'; --report-only makes the report when they are done")
    add("--task", type=int, metavar="I", help=argparse.SUPPRESS)  # of an array job: tp size number I, without a report


def work(args: argparse.Namespace) -> int:
    if args.against and not (args.against / RESULTS).is_file():
        raise UsageError(f"--against {args.against}: there is no {RESULTS} in it")
    if args.report_only:
        return report(args)
    check(args)
    if args.sbatch is not None:
        return batch_script(args)
    if args.task is not None:
        args.tp_sizes = args.tp_sizes[args.task:args.task + 1]
    code = Sweep(args).run()
    return code if args.task is not None else report(args) or code


def report(args: argparse.Namespace) -> int:
    from tpllm.report.page import write_report

    results = args.output_dir / RESULTS
    records = read_records(results)
    if not records:
        raise UsageError(f"{results} has no records; measure first: tpllm scale --output-dir {args.output_dir} …")
    others = read_records(args.against / RESULTS) if args.against else []
    for note in write_report(args.output_dir, records, args.against, others):
        print(f"scale: {note}", file=sys.stderr)
    print(f"scale: {args.output_dir / 'report.md'}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what no tp size could measure, and fill in defaults that depend on other options."""
    if not args.model and not any(getattr(args, name) for name in SOURCES):
        raise UsageError("give --model NAME for random weights, or --meta-ckpt-dir, --hf-model-dir or --checkpoint-dir")
    if not any(getattr(args, name) for name in SOURCES):
        from tpllm.bench import named_config

        args.dtype = "bfloat16" if args.dtype == "auto" else args.dtype
        named_config(args.model, args.dtype)
    quant_algo(args)
    if args.prefill_lens is None:
        args.prefill_lens = [args.input_len]
    if min(args.repeats, args.input_len, args.concurrency or 1) < 1 or args.output_len < 2:
        raise UsageError("--repeats, --input-len and --concurrency start at 1, --output-len at 2")
    if min(args.num_requests, args.check_tokens) < 0:
        raise UsageError("--num-requests and --check-tokens start at 0")
    args.concurrency = args.concurrency or max(args.batch_sizes, default=8)


def batch_script(args: argparse.Namespace) -> int:
    """Print or submit the array job, through `tpllm sbatch`."""
    from tpllm.cli import main

    options = shlex.split(args.sbatch)
    if not any(word.startswith(("--ntasks-per-node", "--gpus-per-node")) for word in options):
        options += ["--ntasks-per-node", str(max(args.tp_sizes))]
    words = []
    for name in PASSED:
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [option, ",".join(map(str, value))]
        elif value not in (None, False, ""):
            words.append(f"{option}={value}")
    return main(["sbatch", "--array", f"0-{len(args.tp_sizes) - 1}", *options, "scale", *words, "--task",
                 "$SLURM_ARRAY_TASK_ID"])


@dataclass
class Done:
    """A command that has ended: its exit code, and the last it said."""

    code: int
    line: str


class Sweep:
    """All points of a command line; what is in the results already is left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: Path = args.output_dir / RESULTS
        source = next((name for name in SOURCES if getattr(args, name)), None)
        self.source = None if source is None else ("--" + source.replace("_", "-"), Path(getattr(args, source)))
        self.model = args.model or (self.source[1].resolve().name if self.source else "")
        self.limits = {"max-batch-size": max([*args.batch_sizes, args.concurrency, args.check_tokens]),
                       "max-input-len": max([args.input_len, *args.prefill_lens]),
                       "max-seq-len": max([args.input_len + args.output_len, *(n + 1 for n in args.prefill_lens)])}
        self.codes: list[int] = []  # of what failed

    def run(self) -> int:
        """The exit code: that of all failed points if it is the same, else that of failed ranks."""
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        for tp in self.args.tp_sizes:
            if self.missing(tp, read_records(self.results)):
                self.measure(tp)
            else:
                self.say(tp, "measured already")
        return self.codes[0] if len(set(self.codes)) == 1 else RankError.exit_code if self.codes else 0

    def cases(self, tp: int) -> list[Case]:
        """What is to be measured, in bench's order; each as far as it is known beforehand."""
        args = self.args
        common = {"model": self.model, "tp_size": tp, "backend": args.backend}
        common |= {} if args.dtype == "auto" else {"dtype": args.dtype}
        common |= {"quant_algo": quant_algo(args)} if args.use_weight_only or not self.source else {}
        lengths = {"input_len": args.input_len, "output_len": args.output_len}
        cases: list[Case] = []
        if args.check_tokens:
            cases.append({"kind": "tokens", "batch_size": args.check_tokens, **lengths})
        cases += [{"kind": "decode", "batch_size": batch, **lengths} for batch in args.batch_sizes]
        cases += [{"kind": "prefill", "input_len": length} for length in args.prefill_lens]
        if args.num_requests:
            cases.append({"kind": "mixed" if args.mixed else "throughput", "num_requests": args.num_requests,
                          "concurrency": args.concurrency, "request_rate": args.request_rate, **lengths})
        return [common | case for case in cases]

    def missing(self, tp: int, records: Sequence[Case]) -> list[Case]:
        return [case for case in self.cases(tp) if not any(fits(record, case) for record in records)]

    def measure(self, tp: int) -> None:
        """Everything of one tp size. A launch that fails has failed at its first case without a record; the next
        launch goes on after it."""
        failed: list[Case] = []
        engine = self.engine(tp)
        while engine and (left := [c for c in self.missing(tp, read_records(self.results)) if c not in failed]):
            before = len(read_records(self.results))
            done = self.call(tp, self.launch(tp, "bench", "--engine-dir", str(engine), *self.bench_words(left)))
            new = [record for record in read_records(self.results)[before:] if record["tp_size"] == tp]
            left = [case for case in left if not any(fits(record, case) for record in new)]
            if not any(record["kind"] == "load" for record in new):
                self.fail(tp, "load", done)
                return
            if left:
                failed.append(left[0])
                self.fail(tp, left[0], done)
            elif done.code:
                self.fail(tp, "end", done)

    def engine(self, tp: int) -> Path | None:
        """The engine's directory; of real weights converted and built now if it is not there, None if that fails."""
        args, home = self.args, self.args.work_dir or Path(setting("TPLLM_CACHE")).expanduser() / "scale"
        options = [__version__, args.dtype, str(quant_algo(args)), str(args.model_file), str(tp)]
        source = self.source[1] if self.source else Path(os.sep, self.model)
        checkpoint = home / f"{source.name}-tp{tp}-{source_key(source, options)[:16]}"
        options += [args.backend, args.device, json.dumps(self.limits)]
        engine = home / f"{source.name}-tp{tp}-engine-{source_key(source, options)[:16]}"
        home.mkdir(parents=True, exist_ok=True)
        if self.source is None or engine.is_dir():
            return engine
        model_file = ["--model-file", str(args.model_file)] if args.model_file else []
        convert = ["convert", self.source[0], str(source), "--output-dir", str(checkpoint), "--tp-size", str(tp),
                   "--dtype", args.dtype, *self.quantize_words(), *model_file]
        build = ["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine), "--backend", args.backend,
                 "--device", args.device, *self.limit_words(), *model_file]
        for kind, made, command in (("convert", checkpoint, convert), ("build", engine, self.launch(tp, *build))):
            if made.is_dir():
                continue
            started = time.perf_counter()
            if (done := self.call(tp, command)).code:
                self.fail(tp, kind, done)
                return None
            append_record(self.results, {
                "kind": kind, "model": self.model, "tp_size": tp, "backend": args.backend,
                "seconds": round(time.perf_counter() - started, 2), "command": shlex.join(["tpllm", *command]),
                "date": date()})
        return engine

    def launch(self, tp: int, *words: str) -> list[str]:
        return ["launch", "-n", str(tp), *shlex.split(self.args.launch), *words]

    def limit_words(self) -> list[str]:
        return [word for name, value in self.limits.items() for word in (f"--{name}", str(value))]

    def quantize_words(self) -> list[str]:
        precision = self.args.weight_only_precision
        return ["--use-weight-only"] * self.args.use_weight_only + (
            ["--weight-only-precision", precision] if precision else [])

    def bench_words(self, cases: Sequence[Case]) -> list[str]:
        """Bench's options for these cases."""
        args, kinds = self.args, {case["kind"] for case in cases}
        words = ["--model", self.model, "--backend", args.backend, "--device", args.device, *self.limit_words()]
        words += [] if self.source else ["--dtype", args.dtype, *self.quantize_words()]
        words += ["--input-len", str(args.input_len), "--output-len", str(args.output_len),
                  "--repeats", str(args.repeats), "--check-tokens", str(args.check_tokens * ("tokens" in kinds))]
        for kind, option, name in (("decode", "--batch-sizes", "batch_size"), ("prefill", "--prefill-lens",
                                                                               "input_len")):
            words += [option, *(str(case[name]) for case in cases if case["kind"] == kind)]
        if kinds & {"throughput", "mixed"}:
            words += ["--num-requests", str(args.num_requests), "--concurrency", str(args.concurrency)]
            words += ["--mixed"] if args.mixed else []
            words += ["--request-rate", str(args.request_rate)] if args.request_rate else []
        return [*words, "--output-file", str(self.results)]

    def call(self, tp: int, words: list[str]) -> Done:
        """Run `tpllm WORDS…`; what it says goes into a log of its own."""
        logs = self.args.output_dir / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"tp{tp}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        self.say(tp, "$ " + shlex.join(["tpllm", *words]))
        with log.open("ab") as file:
            code = subprocess.run([*program(), *words], stdin=subprocess.DEVNULL, stdout=file,
                                  stderr=subprocess.STDOUT).returncode
        if code == 130:
            raise KeyboardInterrupt
        return Done(code, last_line(log.read_text(encoding="utf-8", errors="replace")))

    def fail(self, tp: int, what: str | Case, done: Done) -> None:
        """Report and record a point that could not be measured."""
        case = what if isinstance(what, dict) else {"kind": what, "model": self.model, "tp_size": tp}
        code = done.code or RankError.exit_code
        self.codes.append(code)
        append_record(self.results, {
            "kind": "error", "model": self.model, "tp_size": tp, "case": case, "exit_code": code, "error": done.line,
            "date": date()})
        at = f" of batch {case['batch_size']}" if "batch_size" in case else ""
        self.say(tp, f"{case['kind']}{at} failed with exit code {code}: {done.line}", sys.stderr)

    def say(self, tp: int, text: str, file: Any = None) -> None:
        print(f"scale: tp {tp}: {text}", file=file, flush=True)


def last_line(text: str) -> str:
    """What ended a command: the last line that is tpllm's own error, else the last of all."""
    lines = [line.strip() for line in text.replace("\0", "").splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("tpllm: ")] or lines or ["it said nothing"])[-1]
