"""What a user sees when a launch is wrong or a rank fails: one sentence, a code, no traceback, no hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HERE, mpirun, mpirun_command, mpirun_environment
from makers import LLAMA2_MHA, make_meta_dir

from tpllm import distributed
from tpllm.cli import main
from tpllm.distributed import World
from tpllm.errors import RankError, TimeOutError
from tpllm.heartbeat import Failure
from tpllm.launched import FAILURE, FINISHED_FILE

Done = subprocess.CompletedProcess[str]


def tpllm(argv: list[str], env: dict[str, str] | None = None, timeout: float = 120) -> Done:
    """The program in a process of its own, without a launcher."""
    return subprocess.run([sys.executable, "-m", "tpllm", *argv], stdin=subprocess.DEVNULL, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager engine over two ranks in `engine`, made from `checkpoint`."""
    directory = tmp_path_factory.mktemp("failures")
    meta = make_meta_dir(directory / "meta", LLAMA2_MHA, shards=2)
    model = ["--model-file", str(HERE / "raising_model.py")]
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(directory / "checkpoint"),
                 "--tp-size", "2", *model]) == 0
    mpirun(2, ["-m", "tpllm", "build", "--checkpoint-dir", str(directory / "checkpoint"), "--output-dir",
               str(directory / "engine"), "--backend", "eager", "--max-seq-len", "64", *model])
    (directory / "ids.csv").write_text("1,2,3\n", encoding="utf-8")
    return directory


def run_argv(work: Path, *more: str) -> list[str]:
    return ["run", "--engine-dir", str(work / "engine"), "--input-file", str(work / "ids.csv"), "--max-output-len", "8",
            *more]


@pytest.mark.parametrize("verb", ["inspect", "doctor"])
def test_a_reader_who_has_had_enough_sees_no_traceback(verb: str, work: Path) -> None:
    """`tpllm doctor | head -1`."""
    argv = ["inspect", str(work / "checkpoint"), "--json"] if verb == "inspect" else ["doctor"]
    with subprocess.Popen([sys.executable, "-m", "tpllm", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout and process.stderr
        if verb == "doctor":
            assert process.stdout.readline().startswith("doctor: [1/")
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 141 and "Traceback" not in said, said


def test_wrong_number_of_ranks_names_the_right_command(work: Path) -> None:
    done = mpirun(3, ["-m", "tpllm", *run_argv(work)], check=False)
    assert done.returncode != 0
    assert "is for 2 rank(s), this launch has 3; type: mpirun -n 2 tpllm run" in done.stderr
    assert done.stderr.count("tpllm: ") == 1 and "Traceback" not in done.stderr


def test_no_mpirun_at_all_names_the_right_command(work: Path) -> None:
    done = tpllm(run_argv(work))
    assert done.returncode == 11
    assert "this launch has 1; type: mpirun -n 2 tpllm run" in done.stderr and "Traceback" not in done.stderr


def test_build_with_wrong_number_of_ranks(work: Path) -> None:
    done = tpllm(["build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(work / "other")])
    assert done.returncode == 11 and "type: mpirun -n 2 tpllm build" in done.stderr
    assert not (work / "other").exists() and not (work / "other.partial").exists()


KINDS = {
    "raise": "failed in {stage}: RuntimeError: planted failure",
    "exit": "died without a word|exited on|non-zero status",
    "SIGKILL": "died without a word|signal 9",
    "SIGSEGV": "died without a word|signal 11|Segmentation",
    "SIGSTOP": "has been silent for 4 s",
}
LONG = [pytest.param(kind, rank, verb, marks=pytest.mark.full)
        for kind in KINDS for rank in (0, 1) for verb in ("run", "build") if (rank, verb) != (1, "run")]


@pytest.mark.parametrize("starter", ["mpirun", "launch"])
@pytest.mark.parametrize(("kind", "rank", "verb"), [*((kind, 1, "run") for kind in KINDS), *LONG])
def test_any_failure_of_any_rank_ends_the_job(work: Path, tmp_path: Path, kind: str, rank: int, verb: str,
                                              starter: str) -> None:
    """Within 10 s, or the heartbeat for a rank that falls silent; named on the console; no process is left.

    Under `tpllm launch` the exit code says which of the two it was.
    """
    if verb == "run":
        argv, stage, when = run_argv(work), "generate", 3
    else:
        argv, stage, when = ["build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(tmp_path / "e"),
                             "--backend", "eager", "--model-file", str(HERE / "raising_model.py")], "build", 1
    mark = f"tpllm-test-{os.getpid()}-{kind}-{rank}-{verb}"
    started = time.monotonic()
    env = {"TEST_FAIL": f"{kind}:{rank}:{when}", "TPLLM_HEARTBEAT": "4", "TEST_MARK": mark}
    if starter == "launch":
        done = tpllm(["launch", "--timeout", "60", "-n", "2", *argv], env)
        assert done.returncode == (21 if kind == "SIGSTOP" else 20), done.stderr
        assert re.search(rf"tpllm: rank {rank} of 2 on \S+ failed in {stage}: ", done.stderr), done.stderr
    else:
        done = mpirun(2, ["-m", "tpllm", *argv], timeout=60, check=False, env=env)
    # The bound is on the time from the failure; starting and loading take some seconds before it.
    assert time.monotonic() - started < 25, done.stderr
    assert done.returncode not in (0, 124), done.stderr
    assert re.search(KINDS[kind].format(stage=stage), done.stderr), done.stderr
    if kind != "exit":
        assert re.search(rf"rank {rank}\b", done.stderr), done.stderr
    assert processes_with(mark) == []
    assert not (tmp_path / "e").exists()


def test_out_of_memory_says_so(work: Path) -> None:
    """A rank is killed, and the kernel's counter of such kills has risen."""
    env = {"TEST_FAIL": "SIGKILL:1:3", "TEST_OUT_OF_MEMORY": "1"}
    done = tpllm(["launch", "--timeout", "60", "-n", "2", *run_argv(work)], env)
    assert done.returncode == 22, done.stderr
    assert re.search(r"tpllm: rank 1 of 2 on \S+ failed in \w+: it was killed for lack of memory", done.stderr)


def processes_with(*marks: str) -> list[str]:
    """Living processes whose environment holds all of `marks`, given some time to go."""
    def living() -> list[str]:
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                text = environ.read_bytes()
            except OSError:
                continue
            if all(mark.encode() in text for mark in marks):
                found.append(environ.parent.name)
        return found

    deadline = time.monotonic() + 8
    while living() and time.monotonic() < deadline:
        time.sleep(0.2)
    return living()


def test_a_run_leaves_a_log_a_rank_and_a_record(work: Path, tmp_path: Path) -> None:
    mpirun(2, ["-m", "tpllm", *run_argv(work), "--log-dir", str(tmp_path)])
    failed = mpirun(2, ["-m", "tpllm", *run_argv(work), "--log-dir", str(tmp_path)], check=False,
                    env={"TEST_FAIL": "raise:1:2"})
    good, bad = sorted(tmp_path.iterdir())
    assert good.name.startswith("run-") and failed.returncode != 0
    for rank in (0, 1):
        text = (good / f"rank-00{rank}.log").read_text(encoding="utf-8")
        assert f"rank {rank} of 2 on " in text and "generate" in text and text.endswith("ends with 0\n")
    record = json.loads((good / "record.json").read_text(encoding="utf-8"))
    assert [place["rank"] for place in record["ranks"]] == [0, 1]
    assert record["exit_code"] == 0 and "--engine-dir" in record["command"]
    assert "RuntimeError: planted failure" in (bad / "rank-001.log").read_text(encoding="utf-8")


def test_sigusr1_drains(work: Path) -> None:
    """What is generated so far is printed, and the exit code says that the run can be repeated."""
    script = work / "drain.py"
    script.write_text(
        "import os, signal, sys, threading\nfrom tpllm.cli import main\n"
        "threading.Timer(4, os.kill, [os.getppid(), signal.SIGUSR1]).start()\n"
        "sys.exit(main(sys.argv[1:]))\n", encoding="utf-8")
    (work / "many.csv").write_text("1,2,3\n" * 4000, encoding="utf-8")
    done = mpirun(2, [str(script), "run", "--engine-dir", str(work / "engine"), "--input-file", str(work / "many.csv"),
                      "--max-output-len", "60", "--ignore-eos"], timeout=90, check=False)
    assert done.returncode == 75, (done.returncode, done.stderr)
    assert "tpllm: interrupted: the answers above" in done.stderr and "Output [Text 0]" in done.stdout


def test_one_rank_raising_through_the_python_interface(work: Path) -> None:
    """The same holds for a user's own script."""
    script = work / "script.py"
    script.write_text(
        "import sys\nfrom tpllm import ModelRunner, SamplingParams\n"
        "runner = ModelRunner.from_dir(sys.argv[1])\n"
        "print([o.outputs[0].token_ids for o in runner.generate([[1, 2]], SamplingParams(max_output_len=2))])\n"
        "if runner.world.rank == 1:\n    raise ValueError('mine')\n"
        "runner.generate([[1, 2, 3]])\n", encoding="utf-8")
    done = mpirun(2, [str(script), str(work / "engine")], timeout=60, check=False)
    assert done.returncode not in (0, 124, 137)
    assert "tpllm: rank 1 of 2" in done.stderr and "ValueError: mine" in done.stderr


def test_changed_checkpoint_is_refused(work: Path, tmp_path: Path) -> None:
    """Converted again from other weights under the same name."""
    meta = make_meta_dir(tmp_path / "meta", LLAMA2_MHA, seed=1)
    main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(tmp_path / "checkpoint"), "--tp-size", "2",
          "--model-file", str(HERE / "raising_model.py")])
    done = mpirun(2, ["-m", "tpllm", *run_argv(work), "--checkpoint-dir", str(tmp_path / "checkpoint")], check=False)
    assert done.returncode != 0
    assert "the checkpoint changed; build again: mpirun -n 2 tpllm build" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_rank_with_a_torn_shard_is_named(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "checkpoint", tmp_path / "checkpoint")
    shard = tmp_path / "checkpoint" / "rank1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = mpirun(2, ["-m", "tpllm", *run_argv(work), "--checkpoint-dir", str(tmp_path / "checkpoint")], check=False)
    assert done.returncode != 0
    assert re.search(r"tpllm: rank 1 of 2, load: \S*rank1.safetensors \(\d+ bytes\) is torn", done.stderr)
    assert "Traceback" not in done.stderr


def test_prompt_longer_than_the_engine_allows(work: Path) -> None:
    (work / "long.csv").write_text(",".join(["1"] * 65) + "\n", encoding="utf-8")
    done = mpirun(2, ["-m", "tpllm", "run", "--engine-dir", str(work / "engine"), "--input-file",
                      str(work / "long.csv")], check=False)
    assert done.returncode != 0
    assert "prompt 0 has 65 tokens, the engine allows 64" in done.stderr and "--max-input-len 65" in done.stderr


def test_pipeline_stages_are_refused_at_build(tmp_path: Path) -> None:
    meta = make_meta_dir(tmp_path / "meta", LLAMA2_MHA)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(tmp_path / "ck"), "--pp-size", "2"]) == 0
    done = tpllm(["build", "--checkpoint-dir", str(tmp_path / "ck"), "--output-dir", str(tmp_path / "engine")])
    assert done.returncode == 2
    assert "2 pipeline stages, which engines do not support; convert again with --pp-size 1" in done.stderr


def test_without_a_compiler_inductor_names_eager(work: Path) -> None:
    done = mpirun(2, ["-m", "tpllm", "build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir",
                      str(work / "compiled"), "--model-file", str(HERE / "raising_model.py")],
                  env={"CXX": "/nonexistent/g++"}, check=False)
    assert done.returncode != 0 and "build with --backend eager" in done.stderr
    assert not (work / "compiled").exists() and not (work / "compiled.partial").exists()


def test_demo_without_a_compiler_falls_back_to_eager() -> None:
    """The whole demo: every checkable answer right."""
    done = tpllm(["demo"], env={"CXX": "/nonexistent/g++"}, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with --backend eager" in done.stdout
    assert re.search(r"demo: (\d+) of \1 checkable answers are right", done.stdout)


@pytest.mark.parametrize("kind", ["abort", "twice"])
def test_an_abort_that_never_returns(kind: str) -> None:
    """It is begun once, also by a rank that fails while its heartbeat tells of another's failure."""
    done = mpirun(2, [str(HERE / "ending_program.py"), kind], timeout=60, check=False)
    assert done.returncode == 12 and "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout
    assert done.stdout.count("called MPI_Abort") == 1


def test_an_end_of_mpi_that_never_returns(tmp_path: Path) -> None:
    """Both ranks are gone soon after they were done.

    Of Open MPI's mpirun nothing is asked here: a rank that leaves without the library's own end is an error to it, at
    which it crashes or hangs at times.
    """
    mark, printed = f"tpllm-test-{os.getpid()}-end", tmp_path / "printed"
    with printed.open("w") as out:
        launcher = subprocess.Popen(
            mpirun_command(2, [str(HERE / "ending_program.py"), "finish"]), env=mpirun_environment({"TEST_MARK": mark}),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not all(f"rank {rank} is done" in printed.read_text() for rank in (0, 1)):
            assert time.monotonic() < until, printed.read_text()
            time.sleep(0.1)
        assert processes_with(mark, "OMPI_COMM_WORLD_RANK=") == []
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert processes_with(mark) == []


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("what", ["silent", "died"])
def test_which_of_two_failures_launch_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str,
                                            first: int) -> None:
    """Both ends of a cut find the other silent, and files may be shared across it: rank 0's word holds.

    Of deaths, which one rank sees before the others die of it, the first holds.
    """
    monkeypatch.setenv(FINISHED_FILE, str(tmp_path / "mark"))
    monkeypatch.setattr(distributed, "MESSAGE_SECONDS", 0)
    monkeypatch.setattr(World, "abort", lambda self, code: None)
    code = TimeOutError.exit_code if what == "silent" else RankError.exit_code
    for rank in (first, 1 - first):
        world = World()
        world.rank = rank
        world._on_failure(Failure(1 - rank, f"h{1 - rank}", "generate", what, code), told=False)
    said = (tmp_path / f"mark{FAILURE}").read_text().split("\n", 1)
    named = 1 if what == "silent" else 1 - first
    assert said[0] == str(code) and f"rank {named} of 1 on h{named}" in said[1]
