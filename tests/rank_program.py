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


def all_logits(runner: ModelRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of every prompt.

    Each prompt is fed in three steps of different kinds: all prompts' first parts packed into one ragged step,
    then the middles likewise, then the last tokens one prompt at a time, as decode does.
    """
    cuts = [(len(p) // 2, len(p) - 1) for p in prompts]
    starts = [sum(len(p) + 3 for p in prompts[:i]) for i in range(len(prompts))]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]

    def step(which: list[int], bounds: list[tuple[int, int]]) -> None:
        which = [i for i in which if bounds[i][1] > bounds[i][0]]
        sizes = [bounds[i][1] - bounds[i][0] for i in which]
        tokens = [t for i in which for t in prompts[i][bounds[i][0]:bounds[i][1]]]
        logits = runner.engine.step(StepInput(
            np.array(tokens, np.int32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
            np.array([starts[i] for i in which], np.int32), np.array([bounds[i][1] for i in which], np.int32),
            np.arange(len(tokens), dtype=np.int32)))
        for i, part in zip(which, logits.split(sizes), strict=True):
            found[i].append(part.clone())

    everyone = list(range(len(prompts)))
    step(everyone, [(0, first) for first, _ in cuts])
    step(everyone, cuts)
    for i in everyone:
        step([i], [(last, last + 1) for _, last in cuts])
    return [torch.cat(parts) for parts in found]


def last_logits(runner: ModelRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits behind every prompt's last token, by steps of the same shapes until graphs of these are made, and after.

    First all but the last tokens at once, then the last token of each other prompt, and of the rest up to ten.
    """
    starts = [sum(len(p) + 3 for p in prompts[:i]) for i in range(len(prompts))]

    def step(bounds: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
        which = sorted(bounds, key=lambda i: bounds[i][1] - bounds[i][0] > 1)
        ends = np.cumsum([0, *(bounds[i][1] - bounds[i][0] for i in which)])
        logits = runner.engine.step(StepInput(
            np.array([t for i in which for t in prompts[i][slice(*bounds[i])]], np.int32), ends.astype(np.int32),
            np.array([starts[i] for i in which], np.int32), np.array([bounds[i][1] for i in which], np.int32),
            (ends[1:] - 1).astype(np.int32)))
        return dict(zip(which, logits, strict=True))

    found = []
    for _ in range(OFTEN + 1):
        step({i: (0, len(p) - 1) for i, p in enumerate(prompts) if len(p) > 1})
        last = step({i: (len(p) - (1 if i % 2 == 0 else min(10, len(p))), len(p)) for i, p in enumerate(prompts)})
        found.append(torch.stack([last[i] for i in range(len(prompts))]))
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
        first = gpus.linear_all_reduce_add_norm(x, weight, residual, norm, 1e-5)
        second = gpus.linear_all_reduce_add_norm(x, weight, first[0], norm, 1e-5)
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
