#!/usr/bin/env python3
"""Products of one row or a few on this machine's GPU: tiles of a program, for the matrices of published shapes.

The `TILES` in `tpllm/engine/torch/kernels`, and what `cut_for` gives there, are the fastest of these, or close to it.
Tiles of one row in bfloat16 are chosen among a layer's other kernels (`measure_layer.py --tiles`).
Each is timed in a CUDA graph over so many matrices of its shape that none is read from a cache. Run it with a Python
that has PyTorch for CUDA:

    PYTHONPATH=. python3 launch/sweep_products.py --output-file build/products.jsonl
    PYTHONPATH=. python3 launch/sweep_products.py --rows 8 32 --weights int8 int4
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpllm.bench import SHAPES, commit, named_config
from tpllm.engine.torch.graphs import graph_seconds
from tpllm.engine.torch.kernels import few, few_quantized, gemv, gemv_quantized, int4
from tpllm.records import append_record
from tpllm.runlog import date

BYTES, REPEATS = 400 << 20, 5
TILES = {"bf16": [*product((2, 4, 8), (4, 8)), (16, 8)], "int8": list(product((4, 8, 16), (1, 2, 4, 8))),
         "int4": list(product((16, 32), (4, 8, 16)))}
# Of several rows: lines of a program, parts, tiles ahead, turned, warps; tensor cores take 16 lines a warp at least.
QUANTIZED = [few_quantized.Cut(*cut) for cut in product((32, 64, 128), (1, 2, 4, 8), (3, 4, 6), (False, True), (2, 4))
             if cut[0] >= 16 * cut[4]]
PLAIN = [few.Cut(*cut) for cut in (*product((1, 2, 4), (3, 4, 5)), *product((1, 2), (4, 8), (64,)),
                                   *product((1, 2), (5, 8), (128,), (32,)))]
CUTS: dict[str, list[Any]] = {"bf16": PLAIN, "int8": QUANTIZED,
                              "int4": [cut for cut in QUANTIZED if cut.lines > 32]}
FEWEST, MOST = 60, 1100  # programs


class Matrix(NamedTuple):
    """What a product of a layer is: results, columns, and what is done before and after it."""

    size: int
    columns: int
    norm: bool
    swiglu: bool = False

    @property
    def rows(self) -> int:
        return 2 * self.size if self.swiglu else self.size


Weights = tuple[torch.Tensor, ...]
Tile = tuple[int, int] | few.Cut | few_quantized.Cut


def matrices_of(model: str, tp_size: int) -> dict[str, Matrix]:
    """One rank's of a layer of a published shape, by their names in checkpoints."""
    config = named_config(model, "bfloat16")
    local, hidden, size = config.local(tp_size), config.hidden_size, config.head_size
    return {"qkv": Matrix((local.num_heads + 2 * local.num_kv_heads) * size, hidden, True),
            "dense": Matrix(hidden, local.num_heads * size, False),
            "fc, gate": Matrix(local.intermediate_size, hidden, True, swiglu=True),
            "proj": Matrix(hidden, local.intermediate_size, False)}


def make(kind: str, matrix: Matrix) -> Weights:
    """Random bits; of scales and bfloat16 small numbers."""
    rows, groups = matrix.rows, -(-matrix.columns // 128)
    if kind == "bf16":
        return (torch.randn(rows, matrix.columns, device="cuda", dtype=torch.bfloat16),)
    if kind == "int8":
        return (torch.randint(-127, 128, (rows, matrix.columns), device="cuda", dtype=torch.int8),
                torch.rand(rows, device="cuda"))
    return (torch.randint(-2 ** 31, 2 ** 31 - 1, (rows, groups * 16), device="cuda", dtype=torch.int32),
            torch.rand(rows, groups, device="cuda").bfloat16())


def tiles_for(kind: str, matrix: Matrix, rows: int) -> list[Tile]:
    """Those to be tried for a product of so many rows."""
    if rows == 1:
        return list(TILES[kind])
    return [cut for cut in CUTS[kind] if not (matrix.swiglu and cut.parts > 1) and matrix.columns // cut.parts >= 512
            and FEWEST <= cut.parts * matrix.rows / cut.lines <= MOST
            and (not isinstance(cut, few.Cut) or fits(cut, matrix, rows))]


def fits(cut: few.Cut, matrix: Matrix, rows: int) -> bool:
    """Whether its tiles cover the matrix and have room."""
    whole = matrix.columns % cut.columns == matrix.rows % cut.lines == 0
    return whole and few.shared(cut, rows) <= few.room(torch.device("cuda"))


def products(kind: str, matrix: Matrix, rows: int, tile: Tile, weights: list[Weights]) -> Callable[[], None]:
    """What multiplies the rows with each of them."""
    x, residual = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (matrix.columns, matrix.size))
    if rows > 1:
        multiply: Callable[..., torch.Tensor] = few.few if kind == "bf16" else few_quantized.few

        def run_few() -> None:
            for each in weights:
                multiply(x, *each, tile, swiglu=matrix.swiglu)

        return run_few
    norm = torch.ones(matrix.columns, device="cuda", dtype=torch.bfloat16) if matrix.norm else None
    module = gemv if kind == "bf16" else gemv_quantized
    rest = (norm, 1e-5, None if matrix.norm else residual, matrix.swiglu)

    def run() -> None:
        use_tile(kind, tile)
        for each in weights:
            module.gemv(x, *each, *rest)

    return run


def use_tile(kind: str, tile: Tile) -> None:
    """For all products of one row from now on."""
    if kind == "bf16":
        gemv.tile_for = lambda lines, columns, swiglu: gemv.Tile.of(tile[0], tile[1], swiglu)
    elif kind == "int4":
        int4.TILES = {1 << 31: tile}  # type: ignore[dict-item]
    else:
        gemv_quantized.TILES = {1 << 31: tile}  # type: ignore[dict-item]


def compile_cases(cases: list[tuple[str, Matrix, int, Tile]]) -> None:
    """Into Triton's cache, from where the process that measures takes them."""
    for kind, matrix, rows, tile in cases:
        products(kind, matrix, rows, tile, [make(kind, matrix)])()
    torch.cuda.synchronize()


def microseconds(run: Callable[[], None], count: int) -> float:
    """Of one of the `count` things that are run."""
    run()  # kernels load at their first call, which must not be inside of a capture
    torch.cuda.synchronize()
    return graph_seconds(run, REPEATS) * 1e6 / count


def words(tile: Tile) -> str:
    named = (tile._asdict() if isinstance(tile, (few.Cut, few_quantized.Cut))
             else {"rows": tile[0], "warps": tile[1]})
    return ", ".join(f"{value} {name}" for name, value in named.items())


def record_of(kind: str, name: str, matrix: Matrix, rows: int, size: int, took: dict[Tile, float]) -> dict[str, Any]:
    return {"kind": "products", "weights": kind, "matrix": name, "rows": matrix.rows, "columns": matrix.columns,
            "x_rows": rows, "bytes": size, "us": {words(tile): round(us, 2) for tile, us in took.items()},
            **made_by()}


def made_by() -> dict[str, Any]:
    """What a record of one of these scripts says of its machine, code and command."""
    return {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}, "commit": commit(),
            "command": " ".join([f"launch/{Path(sys.argv[0]).name}", *sys.argv[1:]]), "date": date()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=["llama-2-7b"])
    parser.add_argument("--tp-sizes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--weights", nargs="*", choices=list(TILES), default=list(TILES))
    parser.add_argument("--rows", nargs="*", type=int, default=[1], help="of x, up to 128")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where records are added")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    matrices = {f"{model} tp {tp_size} {name}": matrix for model, tp_size in product(args.models, args.tp_sizes)
                for name, matrix in matrices_of(model, tp_size).items()}
    cases = [(kind, matrix, rows, tile) for kind, matrix, rows in product(args.weights, matrices.values(), args.rows)
             for tile in tiles_for(kind, matrix, rows)]
    workers = min(12, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_cases, [cases[i::workers] for i in range(workers)]))
    for kind, (name, matrix), rows in product(args.weights, matrices.items(), args.rows):
        size = sum(t.nbytes for t in make(kind, matrix))
        weights = [make(kind, matrix) for _ in range(max(4, BYTES // size))]
        took = {tile: microseconds(products(kind, matrix, rows, tile, weights), len(weights))
                for tile in tiles_for(kind, matrix, rows)}
        best = sorted(took, key=lambda tile: took[tile])
        print(f"{kind} {name}, {rows} row(s): " + ", ".join(f"{tuple(t)} {took[t]:.1f} us" for t in best[:5]) +
              f"; {size / took[best[0]] / 1e6:.2f} TB/s", flush=True)
        if args.output_file:
            append_record(args.output_file, record_of(kind, name, matrix, rows, size, took))


if __name__ == "__main__":
    main()
