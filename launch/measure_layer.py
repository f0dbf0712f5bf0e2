#!/usr/bin/env python3
"""Kernels of one layer of decode on this machine's GPU, behind each other as an engine launches them.

Products with what is done before and after them, and attention, of one rank (whose sums with the others are left out),
in a CUDA graph over so many layers that no weights are read from a cache. Beside `sweep_products.py` it shows what
kernels cost each other. Run it with a Python that has PyTorch for CUDA:

    PYTHONPATH=. python3 launch/measure_layer.py --output-file build/layers.jsonl
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch
from sweep_products import BYTES, made_by, make, matrices_of, microseconds

from tpllm.bench import SHAPES, named_config
from tpllm.engine.torch.kernels import few, gemv, gemv_quantized
from tpllm.engine.torch.kernels.decode import decode_attention
from tpllm.records import append_record

EPSILON = 1e-5
Layer = dict[str, tuple[torch.Tensor, torch.Tensor | None]]  # weights and, if they are quantized, scales


class Step:
    """One new token of each of some sequences, `length` long with it."""

    def __init__(self, model: str, rows: int, tp_size: int, length: int) -> None:
        config = named_config(model, "bfloat16")
        local, hidden, self.size = config.local(tp_size), config.hidden_size, config.head_size
        self.heads = [local.num_heads, local.num_kv_heads, local.num_kv_heads]
        self.x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.keys, self.values = (torch.randn(rows * length, heads, self.size, device="cuda", dtype=torch.bfloat16)
                                  for heads in self.heads[1:])
        self.length = torch.full((rows,), length, device="cuda", dtype=torch.int32)
        self.start = torch.arange(rows, device="cuda", dtype=torch.int32) * length
        self.angles = torch.randn(rows, self.size // 2, device="cuda")

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.view(len(qkv), sum(self.heads), self.size).split(self.heads, 1)
        return decode_attention(q, k, v, self.angles, self.angles, self.keys, self.values, self.start,
                                self.length).view(len(qkv), -1)

    def one(self, layers: list[Layer]) -> None:
        """Of one sequence."""
        residual = self.x
        for layer in layers:
            attended = self._attend(multiply(residual, *layer["qkv"], norm=self.norm))
            residual = multiply(attended, *layer["dense"], residual=residual)
            inner = multiply(residual, *layer["fc, gate"], norm=self.norm, swiglu=True)
            residual = multiply(inner, *layer["proj"], residual=residual)

    def several(self, layers: list[Layer]) -> None:
        residual, normed = self.x, self.x
        for layer in layers:
            attended = self._attend(few.linear(normed, *layer["qkv"]))
            residual, normed = few.linear_add_norm(attended, *layer["dense"], residual, self.norm, EPSILON)
            inner = few.linear_swiglu(normed, *layer["fc, gate"])
            residual, normed = few.linear_add_norm(inner, *layer["proj"], residual, self.norm, EPSILON)


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, norm: torch.Tensor | None = None,
             residual: torch.Tensor | None = None, swiglu: bool = False) -> torch.Tensor:
    if scale is None:
        return gemv.gemv(x, weight, norm, EPSILON, residual, swiglu)
    return gemv_quantized.gemv(x, weight, scale, norm, EPSILON, residual, swiglu)


def make_layer(kind: str, model: str, tp_size: int) -> Layer:
    made = {name: make(kind, matrix) for name, matrix in matrices_of(model, tp_size).items()}
    return {name: (weights[0], weights[1] if len(weights) > 1 else None) for name, weights in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--weights", nargs="*", choices=["bf16", "int8", "int4"], default=["bf16", "int8", "int4"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32], help="sequences")
    parser.add_argument("--tp-sizes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    for kind, tp_size in product(args.weights, args.tp_sizes):
        layers = [make_layer(kind, args.model, tp_size)]
        size = sum(t.nbytes for weights in layers[0].values() for t in weights if t is not None)
        layers += [make_layer(kind, args.model, tp_size) for _ in range(4 * BYTES // size)]
        for rows in args.rows:
            step = Step(args.model, rows, tp_size, args.length)
            us = microseconds(partial(step.one if rows == 1 else step.several, layers), len(layers))
            print(f"{kind} tp {tp_size}, {rows} row(s): {us:.1f} us a layer, {size / us / 1e6:.2f} TB/s", flush=True)
            if args.output_file:
                append_record(args.output_file, {
                    "kind": "layer", "model": args.model, "weights": kind, "tp_size": tp_size, "x_rows": rows,
                    "length": args.length, "bytes": size, "us": round(us, 2), **made_by()})


if __name__ == "__main__":
    main()
