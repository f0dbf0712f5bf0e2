"""Runs under mpirun: a list of jobs on every rank, so that all cases of one rank count share a start.

`mpirun -n N python rank_program.py JOBS.json`; each job is `{"tpllm": [argv…]}` or `{"logits": engine_dir,
"prompts": […], "out": file}`, `{"last logits": …}` likewise, `{"in parts": engine_dir}`, `{"hosts": N}`: the ranks then
look to NCCL like N hosts, `{"part rows": N}`: products of twice as many rows are then summed in parts,
`{"share": true}`: they have one GPU, or `{"keep": engine_dir}`: an engine that is there when the program ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sharing import share

from tpllm import ModelRunner
from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine.base import StepInput
from tpllm.engine.torch import exchange
from tpllm.engine.torch.collectives import communicator
from tpllm.engine.torch.padded import OFTEN

KEPT: list[ModelRunner] = []


def step(runner: ModelRunner, prompts: list[list[int]], bounds: dict[int, tuple[int, int]],
         last: bool = False) -> dict[int, torch.Tensor]:
    """One step of the tokens of prompts that lie within `bounds`; logits after each of them, or after the last one.

    In the cache the prompts lie side by side, with a few rows between.
    """
    starts = [sum(len(p) + 3 for p in prompts[:i]) for i in range(len(prompts))]
    tokens = [t for i, (first, stop) in bounds.items() for t in prompts[i][first:stop]]
    sizes = [stop - first for first, stop in bounds.values()]
    ends = np.cumsum([0, *sizes], dtype=np.int32)
    logits = runner.engine.step(StepInput(
        np.array(tokens, np.int32), ends, np.array([starts[i] for i in bounds], np.int32),
        np.array([stop for _, stop in bounds.values()], np.int32),
        ends[1:] - 1 if last else np.arange(len(tokens), dtype=np.int32)))
    parts = logits.split([1] * len(sizes) if last else sizes)
    return {i: part.clone() for i, part in zip(bounds, parts, strict=True)}


def all_logits(runner: ModelRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of every prompt.

    Each prompt is fed in three steps of different kinds: all prompts' first parts packed into one ragged step,
    then the middles likewise, then the last tokens one prompt at a time, as decode does.
    """
    cuts = {i: (len(p) // 2, len(p) - 1) for i, p in enumerate(prompts)}
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for bounds in ({i: (0, first) for i, (first, _) in cuts.items()}, cuts,
                   *({i: (last, last + 1)} for i, (_, last) in cuts.items())):
        for i, part in step(runner, prompts, {i: (a, b) for i, (a, b) in bounds.items() if b > a}).items():
            found[i].append(part)
    return [torch.cat(parts) for parts in found]


def last_logits(runner: ModelRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits behind every prompt's last token, by steps of the same shapes until graphs of these are made, and after.

    First all but the last tokens at once, then the last token of each other prompt, and of the rest up to ten; parts
    of one token first.
    """
    before = {i: (0, len(p) - 1) for i, p in enumerate(prompts) if len(p) > 1}
    ends = {i: (len(p) - (1 if i % 2 == 0 else min(10, len(p))), len(p)) for i, p in enumerate(prompts)}
    before, ends = (dict(sorted(bounds.items(), key=lambda part: part[1][1] - part[1][0] > 1))
                    for bounds in (before, ends))
    found = []
    for _ in range(OFTEN + 1):
        step(runner, prompts, before, last=True)
        last = step(runner, prompts, ends, last=True)
        found.append(torch.cat([last[i] for i in range(len(prompts))]))
    return found


def check_in_parts(world: World) -> None:
    """Products of more rows than one message has, whose sums over the GPUs go part by part.

    One is launched behind the other, without a wait, so that none may touch what another still needs, and each pair
    like the two of a layer, of which the second adds to the first's sum. The last has more rows than a step.
    """
    gpus = communicator()
    assert gpus is not None
    given, found = [], []
    for turn, rows in enumerate((4500, 8192, 4096, 7001, 8192, 9000)):
        torch.manual_seed(turn)
        residual, norm = torch.randn(rows, gpus.width), torch.randn(gpus.width)
        torch.manual_seed(100 + turn * world.size + world.rank)
        x, weight = torch.randn(rows, 96), torch.randn(gpus.width, 96) / 10
        given.append([t.to(gpus.dtype) for t in (x, weight, residual, norm)])
    on_gpus = [[t.to(gpus.device) for t in each] for each in given]
    for x, weight, residual, norm in on_gpus:
        first = gpus.linear_all_reduce_add_norm(x, weight, None, residual, norm, 1e-5)
        second = gpus.linear_all_reduce_add_norm(x, weight, None, first[0], norm, 1e-5)
        some = gpus.select_rows(first[0], torch.arange(0, len(x), 7, device=gpus.device))
        found.append((gpus.select_rows(first[0], None), first[1], gpus.select_rows(second[0], None), second[1], some))
    for (x, weight, residual, norm), results in zip(given, found, strict=True):
        results = [result.cpu() for result in results]
        product = sum(world.allgather(x.double() @ weight.double().T))
        totals = residual.double() + product, residual.double() + 2 * product
        expected = [t for total in totals for t in (
            total, total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * norm.double())]
        for result, wanted in zip(results, [*expected, totals[0][::7]], strict=True):
            assert (result.double() - wanted).norm() < 1e-2 * wanted.norm()
            assert all(torch.equal(result, others) for others in world.allgather(result))


def run_job(job: dict[str, Any], world: World) -> None:
    if "tpllm" in job:
        code = main(job["tpllm"])
        if code:
            raise RuntimeError(f"exit code {code}: {job['tpllm']}")
    elif "hosts" in job:
        os.environ["NCCL_HOSTID"] = f"host{world.rank * job['hosts'] // world.size}"
    elif "share" in job:
        share(world)
    elif "part rows" in job:
        exchange.PART_ROWS = job["part rows"]
    elif "keep" in job:
        KEPT.append(ModelRunner.from_dir(job["keep"], world=world))
    elif "in parts" in job:
        ModelRunner.from_dir(job["in parts"], world=world)
        check_in_parts(world)
    else:
        kind, logits_of = ("logits", all_logits) if "logits" in job else ("last logits", last_logits)
        logits = logits_of(ModelRunner.from_dir(job[kind], world=world), job["prompts"])
        if world.is_first:
            torch.save(logits, job["out"])


if __name__ == "__main__":
    the_world = World.start()
    for the_job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_job(the_job, the_world)
