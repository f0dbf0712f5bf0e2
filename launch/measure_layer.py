#!/usr/bin/env python3
"""Kernels of one layer of decode on this machine's GPU, behind each other as an engine launches them.

Products with what is done before and after them, and attention, of one rank, in a CUDA graph over so many layers that
no weights are read from a cache; each layer has keys and values of its own. What the rank would send to others comes
back to it. Beside `sweep_products.py` it shows what kernels cost each other; `--tiles` tries tiles of each product of
one row among all of them. Run it with a Python that has PyTorch for CUDA:

    PYTHONPATH=. python3 launch/measure_layer.py --output-file build/layers.jsonl
    PYTHONPATH=. python3 launch/measure_layer.py --tiles --models llama-2-7b llama-3-8b --tp-sizes 1 2 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sweep_products import BYTES, TILES, Matrix, made_by, make, matrices_of, microseconds, words

from tpllm.bench import SHAPES, named_config
from tpllm.engine.torch.kernels import few, gemv, gemv_quantized
from tpllm.engine.torch.kernels.decode import decode_attention
from tpllm.engine.torch.rehearsal import Alone
from tpllm.records import append_record

EPSILON = 1e-5
Weights = tuple[torch.Tensor, torch.Tensor | None]  # and, if they are quantized, scales
Layer = dict[str, Weights]


class Step:
    """One new token of each of some sequences, `length` long with it, whose cache has so many layers."""

    def __init__(self, model: str, rows: int, tp_size: int, length: int, layers: int) -> None:
        config = named_config(model, "bfloat16")
        local, hidden, self.size = config.local(tp_size), config.hidden_size, config.head_size
        self.heads = [local.num_heads, local.num_kv_heads, local.num_kv_heads]
        self.x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.keys, self.values = (
            torch.randn(layers, rows * length, heads, self.size, device="cuda", dtype=torch.bfloat16)
            for heads in self.heads[1:])
        self.length = torch.full((rows,), length, device="cuda", dtype=torch.int32)
        self.start = torch.arange(rows, device="cuda", dtype=torch.int32) * length
        self.angles = torch.randn(rows, self.size // 2, device="cuda")
        self.add_norm: Callable[..., torch.Tensor] = few.linear_add_norm
        if tp_size > 1:
            rank = Alone(0, tp_size, torch.device("cuda"), hidden, torch.bfloat16, "push")
            self.add_norm = rank.linear_all_reduce_add_norm
        self.run = self._fused if rows == tp_size == 1 else self._run

    def _attend(self, qkv: torch.Tensor, place: int) -> torch.Tensor:
        q, k, v = qkv.view(len(qkv), sum(self.heads), self.size).split(self.heads, 1)
        return decode_attention(q, k, v, self.angles, self.angles, self.keys[place], self.values[place],
                                self.start, self.length).view(len(qkv), -1)

    def _fused(self, layers: list[Layer]) -> None:
        """Of one sequence, where norms and residuals are the products' own."""
        residual = self.x
        for place, layer in enumerate(layers):
            attended = self._attend(multiply(residual, layer["qkv"], norm=self.norm), place)
            residual = multiply(attended, layer["dense"], residual=residual)
            inner = multiply(residual, layer["fc, gate"], norm=self.norm, swiglu=True)
            residual = multiply(inner, layer["proj"], residual=residual)

    def _run(self, layers: list[Layer]) -> None:
        residual, normed = self.x, self.x
        for place, layer in enumerate(layers):
            attended = self._attend(multiply(normed, layer["qkv"]), place)
            residual, normed = self.add_norm(attended, *layer["dense"], residual, self.norm, EPSILON)
            inner = multiply(normed, layer["fc, gate"], swiglu=True)
            residual, normed = self.add_norm(inner, *layer["proj"], residual, self.norm, EPSILON)


def multiply(x: torch.Tensor, weights: Weights, norm: torch.Tensor | None = None,
             residual: torch.Tensor | None = None, swiglu: bool = False) -> torch.Tensor:
    weight, scale = weights
    if len(x) > 1:
        return (few.linear_swiglu if swiglu else few.linear)(x, weight, scale)
    if scale is None:
        return gemv.gemv(x, weight, norm, EPSILON, residual, swiglu)
    return gemv_quantized.gemv(x, weight, scale, norm, EPSILON, residual, swiglu)


def make_layer(kind: str, model: str, tp_size: int) -> Layer:
    made = {name: make(kind, matrix) for name, matrix in matrices_of(model, tp_size).items()}
    return {name: (weights[0], weights[1] if len(weights) > 1 else None) for name, weights in made.items()}


def tile_for_one(matrix: Matrix, tile: tuple[int, int]) -> Callable[[int, int, bool], gemv.Tile]:
    """`gemv.tile_for` where one matrix's products have this tile, the others their own."""
    own = gemv.tile_for

    def chosen(lines: int, columns: int, swiglu: bool) -> gemv.Tile:
        if (lines, columns, swiglu) != (matrix.rows, matrix.columns, matrix.swiglu):
            return own(lines, columns, swiglu)
        return gemv.Tile.of(*tile, swiglu)

    return chosen


def try_tiles(time: Callable[[], float], model: str, tp_size: int) -> Iterator[dict[str, Any]]:
    """Records of a layer of one row with each tile of each product."""
    for name, matrix in matrices_of(model, tp_size).items():
        took = {}
        for tile in TILES["bf16"]:
            with patch.object(gemv, "tile_for", tile_for_one(matrix, tile)):
                took[tile] = time()
        as_it_is, best = time(), sorted(took, key=lambda tile: took[tile])
        print(f"{model} tp {tp_size} {name}, as it is {as_it_is:.1f} us a layer: " +
              ", ".join(f"{tile} {took[tile]:.1f}" for tile in best[:5]), flush=True)
        yield {"kind": "layer tiles", "matrix": name, "us": round(as_it_is, 2),
               "us_with": {words(tile): round(us, 2) for tile, us in took.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=["llama-2-7b"])
    parser.add_argument("--weights", nargs="*", choices=["bf16", "int8", "int4"], default=["bf16", "int8", "int4"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32], help="sequences")
    parser.add_argument("--tp-sizes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="*", type=int, default=[256], help="tokens of each sequence")
    parser.add_argument("--tiles", action="store_true", help="try tiles of products of one row in bfloat16")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    for model, kind, tp_size in product(args.models, ["bf16"] if args.tiles else args.weights, args.tp_sizes):
        layers = [make_layer(kind, model, tp_size)]
        size = sum(t.nbytes for weights in layers[0].values() for t in weights if t is not None)
        layers += [make_layer(kind, model, tp_size) for _ in range(4 * BYTES // size)]
        for rows, length in product([1] if args.tiles else args.rows, args.lengths):
            step = Step(model, rows, tp_size, length, len(layers))
            time = partial(microseconds, partial(step.run, layers), len(layers))
            us = time()
            print(f"{model} {kind} tp {tp_size}, {rows} row(s) of {length} tokens: {us:.1f} us a layer", flush=True)
            found = try_tiles(time, model, tp_size) if args.tiles else [{"kind": "layer", "us": round(us, 2)}]
            for record in found:
                if args.output_file:
                    append_record(args.output_file, record | {
                        "model": model, "weights": kind, "tp_size": tp_size, "x_rows": rows, "length": length,
                        "bytes": size, **made_by()})


if __name__ == "__main__":
    main()
