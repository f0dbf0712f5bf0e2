"""The program `tpllm`: one verb a module, each imported with nothing heavy until it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys

from tpllm import __version__
from tpllm.errors import TpllmError
from tpllm.launched import launched_by

VERBS = ("convert", "build", "run", "batch", "eval", "bench", "scale", "launch", "sbatch", "doctor", "inspect",
         "verify", "demo")
READER_LEFT = 141  # as a shell has it of programs that a closed pipe ends


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code tells the class of what went wrong (see `tpllm.errors`)."""
    args = make_parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.work(args))
    except TpllmError as e:
        if str(e):  # another process says it
            print(f"tpllm: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("tpllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # One of several ranks must not end as if all were well: the others would wait for it.
        launched = launched_by(os.environ)
        if (launched and launched.size > 1) or not reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes what is left at its end
        return READER_LEFT


def reader_left() -> bool:
    """Whether nobody reads what is printed any more: `head`, for one, has had enough."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default that is a value; options without one say in words what they mean when left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, ()) or action.const else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpllm", description="Tensor-parallel LLaMA inference: convert, then build and run under mpirun.")
    parser.add_argument("--version", action="version", version=f"tpllm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"tpllm.cli.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP,
                                formatter_class=HelpFormatter)
        module.add_arguments(verb)
        verb.set_defaults(work=module.work)
    return parser


def dashed(argv: list[str]) -> list[str]:
    """`--tp_size 2` and `--tp_size=2` as `--tp-size`: TensorRT-LLM's spelling is accepted everywhere."""
    def fix(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else word

    return [fix(word) for word in argv]
