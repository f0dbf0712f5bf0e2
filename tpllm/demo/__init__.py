"""The shipped demo model, trained by demo/train.py: where its weights are, and prompts with answers to check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Prompt:
    """A text to continue and, where a program can check it, the rest of its line.

    The answer of a `held_out` one was kept out of the training text.
    """

    text: str
    expected: str | None = None
    held_out: bool = False

    def accepts(self, continuation: str) -> bool:
        """True if the first line of `continuation` is exactly the expected one."""
        return continuation.strip().partition("\n")[0].rstrip() == self.expected

    @property
    def line(self) -> str:
        """The text with its answer, as it is written in the training text."""
        return f"{self.text} {self.expected}"


DEMO_PROMPTS = (
    Prompt("Once upon a time, there was a clever girl named Mia. Mia had a red ball and"),
    Prompt("It was a windy day, and Tom took his blue kite to the"),
    Prompt("On a cold morning, Anna found a tiny hedgehog"),
    Prompt("Question: What is 27 plus 28? Answer:", "55.", held_out=True),
    Prompt("42 - 18 =", "24", held_out=True),
    Prompt("Tom has 3 apples. Anna gives him 5 more apples. Now Tom has", "8 apples."),
    Prompt("The day after Monday is", "Tuesday."),
    Prompt("Count from three to seven:", "three, four, five, six, seven."),
)
