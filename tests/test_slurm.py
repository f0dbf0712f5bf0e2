"""The demo model in a real Slurm: two nodes with two ranks each."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.demo import (
    ANSWER,
    RANKS,
    TPLLM,
    DemoEngine,
    build_argv,
    convert_argv,
    demo_engine,
    line,
    long_run,
    script,
    tpllm,
)
from cluster.hosts_lab import wait_for
from cluster.slurm_lab import LOGIN, Job, Slurm, slurm_lab, slurm_missing

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--time=10")
MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--bind-to", "none"]
SRUN = ["srun", "--mpi=pmix"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := slurm_missing():
        pytest.skip(reason)
    if not Path(MPIRUN[0]).is_file():
        pytest.skip("no mpirun beside this Python: pip install 'tpllm[mpi]'")
    with slurm_lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def demo(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> DemoEngine:
    return demo_engine(tmp_path_factory.getbasetemp())


def finished(jobs: list[Job]) -> None:
    assert [(job.state, job.code) for job in jobs] == [("COMPLETED", 0)] * len(jobs), [job.output for job in jobs]


def test_srun_with_pmix_after_convert_in_the_batch_script(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    """Ranks over both nodes; and a verb without ranks, which must not take the batch script for a launcher."""
    output, checkpoint = tmp_path / "answers.json", tmp_path / "checkpoint"
    finished(slurm.batch(script(
        tpllm(*convert_argv(checkpoint)),
        line(*SRUN, "-n", str(RANKS), *TPLLM, *demo.run_argv(output)),
        options=TWO_BY_TWO)))
    demo.check(output)
    for rank in range(RANKS):
        name = f"rank{rank}.safetensors"
        assert (checkpoint / name).read_bytes() == (demo.checkpoint / name).read_bytes()


@pytest.mark.full
def test_mpirun_inside_the_allocation(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    """Convert, build and run in one batch script; mpirun takes the nodes from Slurm, and its ranks share converting."""
    output, checkpoint, engine = tmp_path / "answers.json", tmp_path / "checkpoint", tmp_path / "engine"
    finished(slurm.batch(script(
        line(*MPIRUN, "-n", str(RANKS), *TPLLM, *convert_argv(checkpoint)),
        line(*MPIRUN, "-n", str(RANKS), *TPLLM, *build_argv(checkpoint, engine)),
        line(*MPIRUN, "-n", str(RANKS), *TPLLM, *demo.run_argv(output, engine)),
        options=TWO_BY_TWO), seconds=400))
    demo.check(output)
    for path in demo.checkpoint.iterdir():
        assert (checkpoint / path.name).read_bytes() == path.read_bytes()


@pytest.mark.full
def test_the_script_that_tpllm_sbatch_prints(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    output = tmp_path / "answers.json"
    printed = slurm.run([*TPLLM, "sbatch", "--nodes", "2", "--ntasks-per-node", "2", "--time", "5",
                         *demo.run_argv(output)])
    finished(slurm.batch(printed))
    demo.check(output)


@pytest.mark.full
def test_an_array_job_over_tp_sizes(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    """Each task converts, builds and runs with as many ranks as its number says; all give the same answers."""
    def of_task(name: str) -> str:
        return f"{tmp_path}/{name}-$SLURM_ARRAY_TASK_ID"

    def ranked(argv: list[str]) -> str:
        return f'{line(*MPIRUN)} -n "$SLURM_ARRAY_TASK_ID" {tpllm(*argv)}'

    placeholder = {name: tmp_path / f"{name}-TASK" for name in ("checkpoint", "engine", "answers")}
    lines = [
        tpllm(*convert_argv(placeholder["checkpoint"])[:-1]) + ' "$SLURM_ARRAY_TASK_ID"',
        ranked(build_argv(placeholder["checkpoint"], placeholder["engine"])),
        ranked(demo.run_argv(placeholder["answers"], placeholder["engine"])),
    ]
    for name, path in placeholder.items():
        lines = [text.replace(str(path), of_task(name)) for text in lines]
    jobs = slurm.batch(script(*lines, options=("--array=1,2,4%1", "--nodes=1", "--ntasks=4", "--time=10")),
                       seconds=600)
    finished(jobs)
    assert [job.task for job in jobs] == ["1", "2", "4"]
    for ranks in (1, 2, 4):
        demo.check(Path(f"{placeholder['answers']}".replace("TASK", str(ranks))))


def test_srun_without_pmi_is_refused_at_once(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    """N worlds of one rank each: refused before torch is imported, with what to type instead."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n", encoding="utf-8")
    started = time.monotonic()
    done = slurm.hosts.on(LOGIN, ["srun", "--mpi=none", "-n", "2", *TPLLM, *demo.run_argv(tmp_path / "answers.json")],
                          timeout=60, env={"PYTHONPATH": str(tmp_path)}, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 10, done.stdout + done.stderr
    assert "srun --mpi=list" in done.stderr and "--mpi=pmix" in done.stderr
    assert done.stderr.count("tpllm: ") == 1 and "Traceback" not in done.stderr
    assert "torch was imported" not in done.stderr
    assert seconds < 15


@pytest.mark.parametrize("launcher", [
    SRUN, pytest.param(MPIRUN, marks=pytest.mark.full)], ids=["srun", "mpirun"])
def test_local_ranks_of_two_nodes(slurm: Slurm, tmp_path: Path, launcher: list[str]) -> None:
    """Under mpirun inside Slurm SLURM_LOCALID is 0 everywhere; the local rank must not come from there."""
    program = tmp_path / "local.py"
    program.write_text("from tpllm.distributed import World\nw = World.start()\n"
                       "for found in w.allgather((w.rank, w.host, w.local_rank, w.local_size)): w.say(repr(found))\n",
                       encoding="utf-8")
    [job] = slurm.batch(script(line(*launcher, "-n", "4", sys.executable, program), options=TWO_BY_TWO))
    finished([job])
    found = [ast.literal_eval(text) for text in job.output.splitlines() if text.startswith("(")]
    assert [(rank, local, size) for rank, _, local, size in found] == [(0, 0, 2), (1, 1, 2), (2, 0, 2), (3, 1, 2)]
    assert [host for _, host, _, _ in found] == ["node0", "node0", "node1", "node1"]


def start_long_job(slurm: Slurm, demo: DemoEngine, directory: Path, launcher: list[str]) -> str:
    """A job that has begun to print answers."""
    job = slurm.submit(script(line("exec", *launcher, "-n", str(RANKS), *TPLLM, *long_run(demo, directory)),
                              options=TWO_BY_TWO))
    wait_for("the first answer", lambda: any("Output [Text" in text for text in slurm.outputs(job)), 120)
    assert len(slurm.hosts.processes(*slurm.nodes, naming="--streaming")) >= RANKS
    return job


@pytest.mark.full
@pytest.mark.parametrize("launcher", [SRUN, MPIRUN], ids=["srun", "mpirun"])
def test_scancel_ends_all_ranks(slurm: Slurm, demo: DemoEngine, tmp_path: Path, launcher: list[str]) -> None:
    job = start_long_job(slurm, demo, tmp_path, launcher)
    slurm.run(["scancel", job])
    wait_for("the end of all ranks", lambda: not slurm.hosts.processes(*slurm.nodes, naming="--streaming"), 20)
    [ended] = slurm.wait(job, 20)
    assert ended.state == "CANCELLED"


@pytest.mark.full
@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_drains(slurm: Slurm, demo: DemoEngine, tmp_path: Path, signal: str) -> None:
    """As `sbatch --signal=USR1@60` sends it before the time is over, or Slurm then: all leave in order, with 75."""
    job = start_long_job(slurm, demo, tmp_path, SRUN)
    slurm.run(["scancel", f"--signal={signal}", job])
    [ended] = slurm.wait(job, 30)
    assert ended.code == 75, ended.output[-2000:]
    assert "tpllm: interrupted: the answers above" in ended.output
    assert not slurm.hosts.processes(*slurm.nodes, naming="--streaming")


@pytest.mark.full
def test_a_batch_job_drains_at_sigterm(slurm: Slurm, demo: DemoEngine, tmp_path: Path) -> None:
    """As Slurm sends it to the ranks of a step some time before it kills them."""
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = len(demo.answers)
    given.write_text("".join(json.dumps({"prompt": demo.answers[i % count]["prompt"]}) + "\n" for i in range(2000)),
                     encoding="utf-8")
    argv = [*TPLLM, "batch", "--engine-dir", str(demo.engine), "--input-file", str(given), "--output-file", str(output),
            "--max-output-len", str(ANSWER)]
    job = slurm.submit(script(line("exec", *SRUN, "-n", str(RANKS), *argv), options=TWO_BY_TWO))
    wait_for("the first answers", lambda: output.exists() and output.read_bytes().count(b"\n") > 4, 120)
    slurm.run(["scancel", "--signal=TERM", job])
    [ended] = slurm.wait(job, 40)
    assert ended.code == 75, ended.output[-2000:]
    assert "--resume goes on" in ended.output
    answers = [json.loads(text) for text in output.read_text(encoding="utf-8").splitlines()]
    assert len({answer["id"] for answer in answers}) == len(answers) < 2000
    assert all(answer["outputs"] == demo.answers[answer["id"] % count]["outputs"] for answer in answers)


def test_the_lab_leaves_nothing_behind() -> None:
    """Processes, links and files of a Slurm with a job still running are gone when its context ends."""
    if reason := slurm_missing():
        pytest.skip(reason)
    with slurm_lab(nodes=1, gpus=0) as lab:
        job = lab.submit(script("exec sleep 987"))
        wait_for("the job", lambda: lab.hosts.processes("node0", naming="sleep 987"), 30)
        pids = [pid for host in lab.hosts.hosts.values() for pid in host.pids]
        directory = lab.hosts.directory
        assert len(pids) >= 4 and directory.is_dir() and job
    assert not directory.exists()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "to-node0" not in links and "lan0" not in links
