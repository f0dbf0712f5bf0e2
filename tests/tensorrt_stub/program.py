"""Runs under mpirun, with the stand-in for TensorRT or itself: a list of jobs on every rank.

`mpirun -n N python program.py LIBRARIES JOBS.json`, with `-` for LIBRARIES to let TensorRT itself do them. Each job
is `{"tpllm": [argv…]}` or `{"engine": DIR, "sequences": […], "prompts": […], "out": FILE}`, with the environment it
runs in, `"env": {…}`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tensorrt_stub
from tpllm import ModelRunner, SamplingParams
from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine.base import EngineConfig, StepInput, read_engine
from tpllm.mapping import Mapping


def all_logits(runner: ModelRunner, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position, from prefill, decode and steps that mix them, with members chosen at random."""
    chance, unit = random.Random(4), runner.engine.unit
    slots = list(range(len(sequences)))
    chance.shuffle(slots)
    cached = [0] * len(sequences)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]

    def step(parts: list[tuple[int, int]]) -> None:
        ends = np.cumsum([0, *(n for _, n in parts)], dtype=np.int32)
        tokens = [token for i, n in parts for token in sequences[i][cached[i]:cached[i] + n]]
        starts, lengths = [slots[i] * unit for i, _ in parts], [cached[i] + n for i, n in parts]
        arrays = [np.array(values, np.int32) for values in (tokens, ends, starts, lengths, range(len(tokens)))]
        logits = runner.engine.step(StepInput(*arrays)).split([n for _, n in parts])
        for (i, n), part in zip(parts, logits, strict=True):
            found[i].append(part.clone())
            cached[i] += n

    step([(i, len(ids) // 2) for i, ids in enumerate(sequences)])  # prompts of all sequences, ragged
    while left := [i for i, ids in enumerate(sequences) if cached[i] < len(ids)]:
        members = [i for i in left if chance.random() < 0.8]
        chance.shuffle(members)
        if members:
            step([(i, min(chance.choice([1, 1, 1, 5]), len(sequences[i]) - cached[i])) for i in members])
    return [torch.cat(parts) for parts in found]


def describe(engine: Path, world: World) -> list[dict[str, Any]]:
    """Of every rank: what its engine file says, its plan's collectives in order, and new CUDA graphs."""
    from tensorrt_stub.builder import Builder, read_plan
    from tensorrt_stub.runtime import CAPTURES

    config = EngineConfig.load(engine)
    meta, members = read_engine(engine, config, Mapping(config.tp_size, world.rank))
    plan = read_plan(members["plan.trt"])
    assert plan is not None
    kinds = [layer["kind"] for layer in plan["layers"]]
    captures = len(CAPTURES)
    CAPTURES.clear()
    return world.allgather({
        "captures": captures, "tf32": plan["tf32"],
        "counted": meta.collectives, "made_for": json.loads(members["made_for.json"]), "measured": Builder._measured,
        "collectives": [layer["name"] for layer in plan["layers"] if layer["kind"] == "IDistCollectiveLayer"],
        "kinds": {kind: kinds.count(kind) for kind in set(kinds)}})


def run_job(job: dict[str, Any], world: World) -> None:
    os.environ.update(job.get("env", {}))
    try:
        do_job(job, world)
    finally:
        for name in job.get("env", {}):
            del os.environ[name]


def do_job(job: dict[str, Any], world: World) -> None:
    if "tpllm" in job:
        code = main(job["tpllm"])
        if code:
            raise RuntimeError(f"exit code {code}: {job['tpllm']}")
        return
    runner = ModelRunner.from_dir(job["engine"], world=world)
    logits = all_logits(runner, job["sequences"])
    params = SamplingParams(max_output_len=8, ignore_eos=True)
    answers = [output.outputs[0].token_ids for output in runner.generate(job["prompts"], params)]
    ranks = describe(Path(job["engine"]), world) if "tensorrt_stub.builder" in sys.modules else []
    if world.is_first:
        torch.save({"logits": logits, "answers": answers, "ranks": ranks}, job["out"])


if __name__ == "__main__":
    if sys.argv[1] != "-":
        tensorrt_stub.install(Path(sys.argv[1]))
    the_world = World.start()
    for the_job in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        run_job(the_job, the_world)
