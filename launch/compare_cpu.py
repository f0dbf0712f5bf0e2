#!/usr/bin/env python3
"""Decode speed on this machine's CPU beside Hugging Face transformers: the same random weights, in turns.

Each round measures both, one after the other, so that a machine that slows down slows both. Run it with the Python of
the virtual environment, on an idle machine:

    .venv/bin/python launch/compare_cpu.py --output-file launch/results/cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TPLLM = [sys.executable, "-m", "tpllm"]
SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "intermediate_size": 2048, "max_position_embeddings": 2048}
INPUT_LEN, OUTPUT_LEN = 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="tpllm's; transformers gets as many threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where the record is added")
    parser.add_argument("--transformers", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # this script's other half
    args = parser.parse_args()
    if args.transformers:
        print(transformers_rate(args.transformers, args.ranks))
        return
    with tempfile.TemporaryDirectory(prefix="tpllm-") as scratch:
        compare(args, Path(scratch))


def compare(args: argparse.Namespace, scratch: Path) -> None:
    make_model(scratch / "hf", args.dtype)
    run([*TPLLM, "convert", "--hf-model-dir", str(scratch / "hf"), "--output-dir", str(scratch / "checkpoint"),
         "--tp-size", str(args.ranks)])
    launch = [*TPLLM, "launch", "-n", str(args.ranks)]
    run([*launch, "build", "--checkpoint-dir", str(scratch / "checkpoint"), "--output-dir", str(scratch / "engine"),
         "--max-batch-size", "1", "--max-seq-len", str(INPUT_LEN + OUTPUT_LEN)])
    bench = [*launch, "bench", "--engine-dir", str(scratch / "engine"), "--batch-sizes", "1", "--input-len",
             str(INPUT_LEN), "--output-len", str(OUTPUT_LEN), "--repeats", "1", "--output-file"]
    other = [sys.executable, __file__, "--ranks", str(args.ranks), "--transformers", str(scratch / "hf")]
    records, theirs = [], []
    for number in range(args.rounds):
        run([*bench, str(scratch / f"{number}.jsonl")])
        records.append(json.loads((scratch / f"{number}.jsonl").read_text().splitlines()[-1]))
        theirs.append(float(run(other)))
        print(f"round {number + 1}: tpllm {records[-1]['tokens_per_s']}, transformers {theirs[-1]:.1f} tokens/s",
              flush=True)
    ratios = [record["tokens_per_s"] / rate for record, rate in zip(records, theirs, strict=True)]  # in turns
    import transformers

    records.sort(key=lambda record: float(record["tokens_per_s"]))
    middle = records[len(records) // 2]
    result = middle | {
        "model": "llama-134m", "weights": "random", "repeats": args.rounds, "command": command_line(),
        "spread": [records[0]["tokens_per_s"], records[-1]["tokens_per_s"]],
        "versions": middle["versions"] | {"transformers": transformers.__version__},
        "transformers_tokens_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 2), "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)]}
    print(json.dumps(result))
    if args.output_file:
        with args.output_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def command_line() -> str:
    return " ".join(["python", "launch/compare_cpu.py", *sys.argv[1:]])


def run(command: list[str]) -> str:
    """What a command prints; its messages go to the terminal when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def make_model(directory: Path, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).save_pretrained(directory)


def transformers_rate(directory: Path, threads: int) -> float:
    """Tokens/s of `generate` after the first token, as tpllm's bench counts; a first run warms up."""
    import torch
    from transformers import LlamaForCausalLM

    class Clock:
        """A streamer: `generate` gives it the prompt, then each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(directory, dtype="auto").eval()
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, INPUT_LEN), generator=torch.Generator().manual_seed(1))
    for length in (8, OUTPUT_LEN):
        clock = Clock()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length,
                           min_new_tokens=length, do_sample=False, pad_token_id=0, streamer=clock)
    tokens = clock.times[1:]
    return (len(tokens) - 1) / (tokens[-1] - tokens[0])


if __name__ == "__main__":
    main()
