"""Engines over several GPUs of one machine: logits, and the same answers whatever way their all-reduces take.

On a machine with one GPU the ranks share it: then without NCCL, which would go through sockets, and without what ranks
have of a launch of their own. `TPLLM_TEST_SHARED=1` has them share one of several.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import makers
import pytest
import torch
from conftest import mpirun_command, mpirun_environment, run_jobs
from dequantized import dequantized_reference
from makers import LLAMA31_GQA, Shape, make_meta_dir
from reference import Reference
from test_gpu import GROUPS, HEAD64, HEAD128, TOLERANCE, WIDE

from tpllm.cli import main
from tpllm.engine.torch.padded import OFTEN

GPUS = torch.cuda.device_count()
SHARED = GPUS == 1 or (GPUS > 1 and os.environ.get("TPLLM_TEST_SHARED") == "1")
RANKS = [n for n in (2, 4) if n <= GPUS or SHARED]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RANKS, reason="no CUDA device here")]
own_gpus = pytest.mark.skipif(SHARED, reason="the ranks share a GPU here")

# Backend, shape, dtype, and how weights are quantized.
ENGINES = [("eager", HEAD64, "float32", ""), ("eager", LLAMA31_GQA, "bfloat16", ""),
           ("inductor", HEAD64, "float32", ""), ("inductor", HEAD128, "bfloat16", ""),
           ("inductor", GROUPS, "float16", ""), ("inductor", WIDE, "bfloat16", ""),
           ("inductor", WIDE, "bfloat16", "int8"), ("inductor", HEAD128, "float16", "int4")]  # fmt: skip
IDS = ["-".join(filter(None, (backend, str(shape.dim), dtype, precision)))
       for backend, shape, dtype, precision in ENGINES]
WAYS: dict[str, dict[str, str]] = {"in parts": {}, "push": {}, "two-shot": {}}
if not SHARED:
    WAYS |= {"auto": {}, "nccl": {}, "two hosts": {"NCCL_SOCKET_IFNAME": "lo"}}
BESIDE = "push" if SHARED else "nccl"  # whose answers others are compared with
SHARE: list[dict[str, Any]] = [{"share": True}] if SHARED else []
FIRST: dict[str, list[dict[str, Any]]] = {"two hosts": [{"hosts": 2}], "in parts": [{"part rows": 50}]}
CASES = [(way, case) for way in WAYS for case, (_, _, dtype, _) in enumerate(ENGINES)
         if way != "two-shot" or dtype != "float16"]  # which PyTorch's kernel does not sum
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclass(frozen=True)
class Made:
    """Engines of all cases for a number of ranks."""

    root: Path
    ranks: int

    def prompts(self, shape: Shape) -> list[list[int]]:
        return makers.random_ids(shape.vocab_size, 3, 150, 17, 64, 1, seed=3)

    def engine(self, case: int) -> Path:
        return self.root / f"engine{case}"


@cache
def reference(made: Made, case: int) -> Reference:
    meta, checkpoint = made.root / f"meta{case}", made.root / f"checkpoint{case}"
    return dequantized_reference(meta, checkpoint, made.ranks) if ENGINES[case][3] else Reference(meta)


@cache
def build(made: Made) -> None:
    """All engines, at the same time: compiling leaves most of a machine idle."""
    for i, (_, shape, dtype, precision) in enumerate(ENGINES):
        make_meta_dir(made.root / f"meta{i}", shape, seed=5, dtype=getattr(torch, dtype))
        quantized = ["--use-weight-only", "--weight-only-precision", precision] if precision else []
        assert main(["convert", "--meta-ckpt-dir", str(made.root / f"meta{i}"), "--tp-size", str(made.ranks),
                     "--output-dir", str(made.root / f"checkpoint{i}"), *quantized]) == 0  # fmt: skip

    def build_one(i: int) -> None:
        command = ["build", "--checkpoint-dir", str(made.root / f"checkpoint{i}"), "--output-dir", str(made.engine(i)),
                   "--backend", ENGINES[i][0], "--device", "cuda", "--max-batch-size", "6", "--max-seq-len", "300"]
        run_jobs(made.ranks, [*SHARE, {"tpllm": command}], made.root / f"meta{i}", 500)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build_one, range(len(ENGINES))))


@cache
def ran(made: Made, way: str) -> Path:
    """Logits and greedy answers of every case with all-reduces of one kind."""
    build(made)
    out = made.root / way.replace(" ", "-")
    out.mkdir()
    jobs = [*SHARE, *FIRST.get(way, []), {"in parts": str(made.engine(3))}]
    for i, (_, shape, _, _) in enumerate(ENGINES):
        if (way, i) not in CASES:
            continue
        ids = out / f"ids{i}.csv"
        ids.write_text("".join(",".join(map(str, p)) + "\n" for p in made.prompts(shape)), encoding="utf-8")
        run = ["run", "--engine-dir", str(made.engine(i)), "--input-file", str(ids), "--ignore-eos",
               "--max-output-len", "20", "--output-json"]
        jobs += [*({kind: str(made.engine(i)), "prompts": made.prompts(shape), "out": str(out / f"{kind}{i}.pt")}
                   for kind in ("logits", "last logits")),
                 {"tpllm": [*run, str(out / f"first{i}.json")]}, {"tpllm": [*run, str(out / f"second{i}.json")]}]
    jobs.append({"keep": str(made.engine(3))})  # NCCL would wait for its graphs
    old = {name: os.environ.get(name) for name in ("TPLLM_ALL_REDUCE", *NO_MULTICAST, *WAYS[way])}
    os.environ.update(NO_MULTICAST | WAYS[way])
    os.environ["TPLLM_ALL_REDUCE"] = {"in parts": "push", "two hosts": "auto"}.get(way, way)
    try:
        printed = run_jobs(made.ranks, jobs, out, 500)
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    (out / "printed").write_text(printed, encoding="utf-8")
    return out


def tokens(made: Made, way: str, case: int, run: str = "first") -> list[list[int]]:
    answers = json.loads((ran(made, way) / f"{run}{case}.json").read_text(encoding="utf-8"))
    return [answer["outputs"][0]["token_ids"] for answer in answers]


@pytest.fixture(scope="module", params=RANKS or [2])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(f"gpus{request.param}"), request.param)


@pytest.mark.parametrize(("way", "case"), CASES, ids=[f"{way}-{IDS[case]}" for way, case in CASES])
def test_logits(way: str, case: int, made: Made) -> None:
    found = torch.load(ran(made, way) / f"logits{case}.pt", map_location="cpu")
    for ids, logits in zip(made.prompts(ENGINES[case][1]), found, strict=True):
        expected = reference(made, case).logits(ids)
        assert ((logits - expected).norm() / expected.norm()).item() < TOLERANCE[ENGINES[case][2]]


@pytest.mark.parametrize(("way", "case"), CASES, ids=[f"{way}-{IDS[case]}" for way, case in CASES])
def test_logits_of_steps_that_come_again(way: str, case: int, made: Made) -> None:
    """As compiled, when their graphs are made, and from these."""
    found = torch.load(ran(made, way) / f"last logits{case}.pt", map_location="cpu")
    expected = torch.stack([reference(made, case).logits(ids)[-1] for ids in made.prompts(ENGINES[case][1])])
    assert len(found) > OFTEN
    for logits in found:
        assert ((logits - expected).norm() / expected.norm()).item() < TOLERANCE[ENGINES[case][2]]


@pytest.mark.parametrize(("way", "case"), CASES, ids=[f"{way}-{IDS[case]}" for way, case in CASES])
def test_greedy_answers(way: str, case: int, made: Made) -> None:
    """In float32 those of the reference; in 16 bits the same twice, and but for near ties those of another way."""
    found = tokens(made, way, case)
    assert tokens(made, way, case, "second") == found
    oracle, exact = reference(made, case), ENGINES[case][2] == "float32"
    beside = tokens(made, BESIDE, case)
    for ids, answer, other in zip(made.prompts(ENGINES[case][1]), found, beside, strict=True):
        if exact:
            assert answer == [token for token, _ in oracle.greedy_with_gaps(ids, 20)]
        elif answer != other:
            place = next(i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b)
            best = oracle.logits(ids + answer[:place])[-1]
            gap = (best[answer[place]] - best[other[place]]).abs() / best.norm()
            assert gap < TOLERANCE[ENGINES[case][2]], (place, gap)


@own_gpus
def test_other_hosts_are_not_reached_through_memory(made: Made) -> None:
    bench = ["bench", "--model", "tiny", "--device", "cuda", "--batch-sizes", "1", "--input-len", "8", "--output-len",
             "8", "--repeats", "1", "--backend", "eager"]
    build(made)
    for jobs, expected in ([{"hosts": 2}], {"nccl"}), ([], {"push", "two-shot", "nccl"}):
        out = made.root / f"bench{len(jobs)}"
        out.mkdir()
        records = out / "records.jsonl"
        run_jobs(made.ranks, [*jobs, {"tpllm": [*bench, "--engine-dir", str(out / "engine"), "--output-file",
                                                str(records)]}], out, 300)  # fmt: skip
        decode = [r for r in map(json.loads, records.read_text().splitlines()) if r["kind"] == "decode"]
        assert decode[0]["all_reduce"]["path"] in expected
        assert decode[0]["sums_in_parts"] in ({"nccl"} if jobs else {"nccl", "exchange"})


@own_gpus
def test_a_killed_rank_ends_the_job_and_leaves_nothing_on_the_gpus(made: Made) -> None:
    build(made)
    ids = made.root / "long.csv"
    ids.write_text("".join("1,2,3\n" for _ in range(20000)), encoding="utf-8")
    program = ["-m", "tpllm", "run", "--engine-dir", str(made.engine(3)), "--input-file", str(ids), "--ignore-eos",
               "--max-output-len", "200", "--log-dir", str(made.root / "logs")]
    before = on_gpus()
    job = subprocess.Popen(["timeout", "120", *mpirun_command(made.ranks, program)], stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env=mpirun_environment(NO_MULTICAST))  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not generating(made.root / "logs"):
        time.sleep(0.5)
    time.sleep(1)
    ranks = [int(p) for p in children(job.pid) if b"tpllm" in Path("/proc", p, "cmdline").read_bytes()
             and sys.executable.encode() in Path("/proc", p, "cmdline").read_bytes().split(b"\0")[0]]
    assert len(ranks) == made.ranks
    os.kill(ranks[-1], signal.SIGKILL)
    killed = time.monotonic()
    said = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and time.monotonic() - killed < 10, said
    # A process that was killed is on its GPU until the driver has freed its memory.
    while (left := on_gpus() - before) and time.monotonic() - killed < 10:
        time.sleep(0.2)
    assert not left


def generating(logs: Path) -> bool:
    return any("generate" in path.read_text(encoding="utf-8") for path in logs.rglob("rank-000.log"))


def children(pid: int) -> list[str]:
    """All processes below one."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return found + [below for child in found for below in children(int(child))]


def on_gpus() -> set[str]:
    shown = subprocess.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True,
                           text=True, check=True)
    return set(shown.stdout.split())
