"""`tpllm launch run` without prompts: each line that a user types is answered, on the ranks' side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpllm.distributed import World
    from tpllm.launch.console import ConsoleLines

PROMPT = "> "


def wants_lines(args: argparse.Namespace) -> bool:
    """No prompts were given: they will be typed."""
    return args.input_text is None and args.input_file is None


def converse(world: World, answer: Callable[[str], object]) -> None:
    """Answer line after line, on every rank, until the end of the input or `/quit`."""
    from tpllm.distributed import SharedError
    from tpllm.errors import InterruptedRun
    from tpllm.launch.console import ConsoleLines

    lines = world.together("console", lambda: ConsoleLines() if world.is_first else None)
    if lines and lines.is_terminal:
        print("run: type a prompt; an empty line is ignored, /quit or Ctrl-D ends", flush=True)
    while True:
        line = next_line(world, lines) if lines else None
        world.barrier()  # the others sleep in it for as long as a user thinks; a broadcast would keep their cores busy
        line = world.broadcast(line)
        if line is None:
            break
        try:
            answer(line)
        except SharedError as e:  # such as a prompt that is too long
            world.say(f"tpllm: {e}")
    if world.broadcast(world.draining):
        raise SharedError("interrupted by SIGUSR1", InterruptedRun.exit_code)


def next_line(world: World, lines: ConsoleLines) -> str | None:
    """The next line that asks something; None at the end."""
    while True:
        if lines.is_terminal:
            print(PROMPT, end="", flush=True)
        line = lines.next(lambda: world.draining)
        if line is None or line.strip() == "/quit":
            return None
        if line.strip():
            return line
