"""The demo model for the cluster tests: an engine over four ranks, and the answers of a plain run on this machine."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import mpirun

from tpllm.cli import main
from tpllm.demo import DEMO_PROMPTS, MODEL_DIR

TPLLM = [sys.executable, "-m", "tpllm"]
RANKS = 4
ANSWER = 60  # tokens at most
BATCH = ["--backend", "eager", "--max-batch-size", "3"]


@dataclass(frozen=True)
class DemoEngine:
    """The answers are those of one process without a launcher; every number of ranks gives the same tokens."""

    checkpoint: Path
    engine: Path
    prompts: Path
    answers: list[dict[str, Any]]

    def run_argv(self, output: Path, engine: Path | None = None) -> list[str]:
        """`run` and its options, for all demo prompts."""
        return ["run", "--engine-dir", str(engine or self.engine), "--input-file", str(self.prompts),
                "--max-output-len", str(ANSWER), "--output-json", str(output)]

    def check(self, output: Path) -> None:
        """The same tokens as those of the plain run, and right where that can be told."""
        answers = json.loads(output.read_text(encoding="utf-8"))
        assert answers == self.answers
        for prompt, answer in zip(DEMO_PROMPTS, answers, strict=True):
            assert answer["prompt"] == prompt.text
            if prompt.expected is not None:
                assert prompt.accepts(answer["outputs"][0]["text"])

    def least_bytes(self) -> int:
        """What two hosts have to send each other: every layer's two sums, for each token that was computed."""
        shape = json.loads((MODEL_DIR / "params.json").read_text(encoding="utf-8"))
        # The last token of an answer is not computed with.
        tokens = sum(len(a["prompt_token_ids"]) + len(a["outputs"][0]["token_ids"]) - 1 for a in self.answers)
        return int(2 * shape["n_layers"] * tokens * shape["dim"] * 4)


def convert_argv(checkpoint: Path, ranks: int = RANKS) -> list[str]:
    return ["convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(checkpoint), "--dtype", "float32",
            "--tp-size", str(ranks)]


def build_argv(checkpoint: Path, engine: Path) -> list[str]:
    return ["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine), *BATCH]


@functools.cache
def demo_engine(base: Path) -> DemoEngine:
    """Made once in a session, under `base`."""
    work = base / "cluster-demo"
    work.mkdir()
    prompts = work / "prompts.txt"
    prompts.write_text("".join(prompt.text + "\n" for prompt in DEMO_PROMPTS), encoding="utf-8")
    checkpoint, engine, alone, answers = work / "checkpoint", work / "engine", work / "alone", work / "answers.json"
    assert main(convert_argv(checkpoint)) == 0 and main(convert_argv(work / "whole", 1)) == 0
    mpirun(RANKS, ["-m", "tpllm", *build_argv(checkpoint, engine)], timeout=300)
    plain = DemoEngine(checkpoint, engine, prompts, [])
    for argv in (build_argv(work / "whole", alone), plain.run_argv(answers, alone)):
        subprocess.run([*TPLLM, *argv], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=300)
    return DemoEngine(checkpoint, engine, prompts, json.loads(answers.read_text(encoding="utf-8")))


def long_run(demo: DemoEngine, directory: Path) -> list[str]:
    """`run` and its options, for minutes of work; it prints each answer when that is whole."""
    prompts = directory / "many.txt"
    prompts.write_text(demo.prompts.read_text(encoding="utf-8") * 100, encoding="utf-8")
    return ["run", "--engine-dir", str(demo.engine), "--input-file", str(prompts), "--max-output-len", "100",
            "--ignore-eos", "--streaming"]


def line(*argv: str | Path) -> str:
    """A command line of a shell script; the first words may name the program."""
    return shlex.join([str(word) for word in argv])


def tpllm(*argv: str | Path) -> str:
    return line(*TPLLM, *argv)


def script(*lines: str, options: Sequence[str] = ()) -> str:
    """A batch script that ends at the first command that fails."""
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "set -e", *lines, ""])
