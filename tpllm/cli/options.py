"""Options that several verbs share: an engine, and the fields of `SamplingParams`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tpllm.errors import UsageError
from tpllm.quantization import ALGOS
from tpllm.sampling import SamplingParams


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, metavar="DIR", help="made by tpllm build")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="the engine's weights, if they were moved")
    parser.add_argument("--tokenizer-dir", type=Path, metavar="DIR", help="default: the checkpoint's own")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--use-weight-only", action="store_true",
                        help="quantize the layers' matrices; TensorRT-LLM itself cannot read the result")
    parser.add_argument("--weight-only-precision", choices=tuple(ALGOS),
                        help="int8: a scale a row; int4: a scale for each 128 columns of it (default: int8)")


def quant_algo(args: argparse.Namespace) -> str | None:
    """What the two options ask for."""
    if args.weight_only_precision and not args.use_weight_only:
        raise UsageError(f"--weight-only-precision {args.weight_only_precision} needs --use-weight-only beside it")
    return ALGOS[args.weight_only_precision or "int8"] if args.use_weight_only else None


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One option a field, with its default."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-output-len", type=int, metavar="N", help="tokens to generate")
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0 is off")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens that reach P together; 1 is off")
    add("--min-p", type=float, metavar="P", help="draw among tokens at least P times as likely as the best; 0 is off")
    add("--repetition-penalty", type=float, metavar="X", help="against tokens of prompt and answer; 1 is off")
    add("--presence-penalty", type=float, metavar="X", help="against tokens of the answer; 0 is off")
    add("--frequency-penalty", type=float, metavar="X", help="the same, times how often they came; 0 is off")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="never the same N tokens again; 0 is off")
    add("--min-length", type=int, metavar="N", help="tokens before an end token may come")
    add("--seed", "--random-seed", type=int, metavar="N", help="of each prompt's draws")
    add("--stop-words", nargs="+", metavar="W", help="text that ends an answer")
    add("--bad-words", nargs="+", metavar="W", help="words that never come")
    add("--allowed-token-ids", nargs="+", type=int, metavar="ID", help="no other tokens come")
    add("--logprobs", type=int, metavar="N", help="report log-probabilities of each token and of the N likeliest")
    add("--prompt-logprobs", type=int, metavar="N", help="the same for the prompt's tokens")
    add("--num-return-sequences", type=int, metavar="N", help="answers to each prompt")
    add("--num-beams", type=int, metavar="N", help="beam search with N beams; 1 is off")
    add("--length-penalty", type=float, metavar="X", help="beam search: above 0 favours long answers, below 0 short")
    add("--early-stopping", type=early_stopping, metavar="true|false|never",
        help="beam search: true stops at num-beams answers, never only when none can get better, false in between")
    add("--ignore-eos", action="store_true", help="go on after the end token")
    add("--end-id", type=int, metavar="ID", help="end token (default: the tokenizer's)")
    parser.set_defaults(**asdict(SamplingParams()))


def early_stopping(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the command line asks for; raises UsageError."""
    return SamplingParams(**{name: getattr(args, name) for name in SamplingParams.__dataclass_fields__})
