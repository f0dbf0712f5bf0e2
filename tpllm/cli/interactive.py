"""`tpllm launch run` without prompts: each line that a user types is answered, on the ranks' side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpllm.answer import GenerationOutput
    from tpllm.distributed import World
    from tpllm.launch.console import ConsoleLines
    from tpllm.runner import ModelRunner

PROMPT = "> "


def wants_lines(args: argparse.Namespace) -> bool:
    """No prompts were given: they will be typed."""
    return args.input_text is None and args.input_file is None


class Conversation:
    """What user and model have said; rank 0 has it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._messages: list[dict[str, str]] = []

    def answer(self, line: str, generate: Callable[[str | list[int]], list[GenerationOutput]]) -> None:
        """Generate what the model says to `line`; a failure leaves the conversation as it was. Collective."""
        from tpllm.inputs import Request

        if line.strip() == "/new":
            self._messages.clear()
            return
        asked = [*self._messages, {"role": "user", "content": line}]
        request = Request(0, "", {}, messages=asked if self._runner.world.is_first else None)
        chat = self._runner.world.together("chat", lambda: request.templated(self._runner.tokenizer))
        for output in generate(chat.prompt):
            self._messages = [*asked, {"role": "assistant", "content": output.outputs[0].text or ""}]


def converse(world: World, generate: Callable[[str | list[int]], list[GenerationOutput]],
             conversation: Conversation | None) -> None:
    """Answer line after line, on every rank, until the end of the input or `/quit`; each alone if there is no chat."""
    from tpllm.distributed import SharedError
    from tpllm.errors import InterruptedRun
    from tpllm.launch.console import ConsoleLines

    lines = world.together("console", lambda: ConsoleLines() if world.is_first else None)
    if lines and lines.is_terminal:
        new = ", /new begins another conversation" if conversation else ""
        print(f"run: type a prompt; an empty line is ignored{new}, /quit or Ctrl-D ends", flush=True)
    while True:
        line = next_line(world, lines) if lines else None
        world.barrier()  # the others sleep in it for as long as a user thinks; a broadcast would keep their cores busy
        line = world.broadcast(line)
        if line is None:
            break
        try:
            conversation.answer(line, generate) if conversation else generate(line)
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
