"""`tpllm launch`: the command line for every launcher, the watch over it, and the real thing on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import mpirun
from makers import transformers_greedy, transformers_model
from sentencepiece import SentencePieceProcessor

from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.devices import Device
from tpllm.launch.console import ConsoleLines, ConsoleServer
from tpllm.launch.estimate import all_reduce_note, all_reduce_share, weight_bytes
from tpllm.launch.launchers import SESSION, Launcher, find_launcher
from tpllm.launch.machine import address_towards, cores, gpus, is_this_host, program
from tpllm.launched import CONSOLE
from tpllm.settings import DEFAULTS

OPEN_MPI_4 = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n"
OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
PRTERUN = "prterun (PRRTE) 3.0.11\n\nReport bugs to https://github.com/openpmix/prrte\n"
HYDRA = ("HYDRA build details:\n    Version:                                 4.0.2\n"
         "    Release Date:                            Thu Apr  7 12:34:45 CDT 2022\n")  # fmt: skip
INTEL = ("Intel(R) MPI Library for Linux* OS, Version 2021.10 Build 20230619 (id: c2e19c2f3e)\n"
         "Copyright 2003-2023, Intel Corporation.\n")  # fmt: skip
SRUN = ("MPI plugin types are...\n\tcray_shasta\n\tnone\n\tpmi2\n\tpmix\n"
        "specific pmix plugin versions available: pmix_v4\n")  # fmt: skip
PROMPTS = ["run", "--engine-dir", "none", "--input-text", "a b"]

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts launchers of the test's own into a PATH with nothing else; no mpirun is beside this Python."""
    for name in [*DEFAULTS, "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK",
                 "LD_LIBRARY_PATH", "PYTHONPATH", "CC", "CXX", "CUDA_VISIBLE_DEVICES",
                 "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]:
        monkeypatch.delenv(name, raising=False)
    for name in os.environ:
        if name.startswith(("TPLLM_", "NCCL_", "HF_", "UCX_", "MPI4PY_", "PRTE_", "OMPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("tpllm.launch.machine.socket.getaddrinfo", lambda *_, **__: [])

    def make(name: str, banner: str, directory: str = "bin") -> Path:
        return executable(tmp_path / directory / name, f"printf %s {shlex.quote(banner)}\n")

    return make


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + body, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """What --dry-run prints, a line each; the last one without its program."""
    code = main(["launch", "--dry-run", *argv])
    printed, errors = capsys.readouterr()
    assert code == 0, errors
    words = f" {shlex.join(program())} run --engine-dir none --input-text 'a b'"
    assert printed.endswith(words + "\n")
    return [*printed.splitlines()[:-1], printed.splitlines()[-1].removesuffix(words)]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(["launch", "--dry-run", *argv])
    printed, errors = capsys.readouterr()
    assert code and not printed and errors.startswith("tpllm: ") and "Traceback" not in errors
    return code, errors


KEEPALIVE = "{0} oob_tcp_keepalive_time 10 {0} oob_tcp_keepalive_intvl 2 {0} oob_tcp_keepalive_probes 3 {0} {1} "
SSH = "'-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=5 -o ServerAliveCountMax=3'"


@pytest.mark.parametrize(("banner", "flag", "ssh"), [
    (OPEN_MPI_4, "--mca", "plm_rsh_args"), (OPEN_MPI_5, "--prtemca", "plm_ssh_args"),
    (PRTERUN, "--prtemca", "plm_ssh_args")], ids=["4.1", "5.0", "prterun"])  # fmt: skip
def test_open_mpi(install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                  banner: str, flag: str, ssh: str) -> None:
    path = install("mpirun", banner)
    assert dry(capsys, "-n", "1", *PROMPTS) == [f"{path} --bind-to none -n 1"]
    crowd = cores() + 1
    assert dry(capsys, "-n", str(crowd), *PROMPTS) == [f"{path} --bind-to none --oversubscribe -n {crowd}"]
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_HOME", "/hf")
    monkeypatch.setenv("TPLLM_CACHE", "/cache")
    expected = (f"{path} --bind-to none --hostfile tpllm-hostfile --map-by slot {KEEPALIVE.format(flag, ssh)}{SSH} "
                "-x HF_HOME -x NCCL_DEBUG -x OMP_NUM_THREADS -x PATH -x TPLLM_CACHE -n 4")
    assert dry(capsys, "-n", "4", "--host", "h0:2,h1:4", *PROMPTS) == [
        "# hostfile tpllm-hostfile:", "# h0 slots=2", "# h1 slots=2", expected]
    assert dry(capsys, "-n", "1", "--host", "localhost:2", *PROMPTS)[-1] == (
        f"{path} --bind-to none --hostfile tpllm-hostfile --map-by slot -n 1")


@pytest.mark.parametrize(("banner", "words"), [
    (OPEN_MPI_4, "--bind-to none -n 1"), (OPEN_MPI_5, "--bind-to none --output :raw -n 1"),
    (HYDRA, "-bind-to none -n 1")], ids=["4.1", "5.0", "hydra"])  # fmt: skip
def test_streamed_text_is_not_kept_back(install: Install, capsys: pytest.CaptureFixture[str], banner: str,
                                        words: str) -> None:
    path = install("mpirun", banner)
    for verb in (["run", "--engine-dir", "none"], [*PROMPTS, "--streaming"]):
        assert main(["launch", "--dry-run", "-n", "1", *verb]) == 0
        assert capsys.readouterr().out.startswith(f"{path} {words} {sys.executable} ")


def test_open_mpi_asks_root_twice(install: Install, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path = install("mpirun", OPEN_MPI_5)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert dry(capsys, "-n", "1", *PROMPTS) == [
        f"OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 {path} --bind-to none -n 1"]


def test_a_site_has_the_last_word(install: Install, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    install("mpirun", OPEN_MPI_5)
    own = install("site-mpirun", OPEN_MPI_4, "site")
    monkeypatch.setenv("TPLLM_MPIRUN", str(own))
    monkeypatch.setenv("TPLLM_LAUNCH_ARGS", "--mca btl_tcp_if_include 'eth 1'")
    monkeypatch.setenv("TPLLM_KEEPALIVE_SECONDS", "0")
    monkeypatch.setenv("OMPI_MCA_plm_rsh_args", "-F my_ssh_config")
    [*_, line] = dry(capsys, "-n", "2", "--host", "h0,h1", *PROMPTS)
    assert line.startswith(f"{own} ") and line.endswith("-n 2 --mca btl_tcp_if_include 'eth 1'")
    assert "keepalive" not in line and "plm_rsh_args" not in line
    monkeypatch.setenv("TPLLM_KEEPALIVE_SECONDS", "soon")
    _, errors = refused(capsys, "-n", "2", "--host", "h0,h1", *PROMPTS)
    assert "TPLLM_KEEPALIVE_SECONDS='soon' is not a number from 0 on; its default is 10" in errors


def test_hydra(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    path = install("mpirun", HYDRA)
    crowd = cores() + 1  # Hydra takes them without a word
    assert dry(capsys, "-n", str(crowd), *PROMPTS) == [f"{path} -bind-to none -n {crowd}"]
    assert dry(capsys, "--nodes", "2", "-n", "4", "--host", "h0:4,h1:4", *PROMPTS) == [
        "# hostfile tpllm-hostfile:", "# h0:2", "# h1:2", f"{path} -bind-to none -f tpllm-hostfile -genvall -n 4"]


def test_intel(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    path = install("mpiexec", INTEL)
    assert dry(capsys, "-n", "1", *PROMPTS) == [f"{path} -genv I_MPI_PIN 0 -n 1"]


def allocation(monkeypatch: pytest.MonkeyPatch, tasks: str = "2(x2)") -> None:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "gpu[01-02]"), ("SLURM_TASKS_PER_NODE", tasks)):
        monkeypatch.setenv(name, value)


def test_srun(install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = install("srun", SRUN)
    allocation(monkeypatch)
    common = "--kill-on-bad-exit=1 --cpu-bind=none --quit-on-interrupt --input=none --export=ALL"
    for argv in ([], ["--mpi", "srun"]):  # auto, as there is no mpirun; all slots of the allocation
        assert dry(capsys, *argv, *PROMPTS) == [f"{path} --mpi=pmix --ntasks=4 {common}"]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert dry(capsys, "--nodes", "2", "-n", "2", *PROMPTS) == [
        f"{path} --mpi=pmix --ntasks=2 {common} --nodes=2 --nodelist=gpu01,gpu02 --ntasks-per-node=1 --cpus-per-task=8"]
    install("mpirun", HYDRA)
    assert dry(capsys, "--mpi", "srun", *PROMPTS)[0].startswith(f"{path} --mpi=pmi2 --ntasks=4 ")
    install("mpirun", OPEN_MPI_5)
    install("srun", "srun: MPI types are...\nsrun: none\nsrun: pmi2\n")
    code, errors = refused(capsys, "--mpi", "srun", *PROMPTS)
    assert code == 10 and "srun offers none, pmi2, but the ranks' MPI needs pmix" in errors


def test_in_an_allocation_mpirun_comes_first(install: Install, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the nodes from Slurm; --nodes needs a hostfile, and there ssh is not used."""
    path = install("mpirun", OPEN_MPI_5)
    install("srun", SRUN)
    allocation(monkeypatch)
    [line] = dry(capsys, *PROMPTS)
    assert line.startswith(f"{path} --bind-to none --prtemca oob_tcp_keepalive_time") and line.endswith("-n 4")
    assert "hostfile" not in line and "ssh" not in line
    assert dry(capsys, "--nodes", "1", "-n", "2", *PROMPTS)[:2] == ["# hostfile tpllm-hostfile:", "# gpu01 slots=2"]
    executable(path, "exit 1\n")  # an mpirun that cannot run
    assert "srun --mpi=pmix" in dry(capsys, *PROMPTS)[0]


def test_the_mpirun_beside_this_python_comes_first(install: Install) -> None:
    in_path = install("mpirun", HYDRA)
    assert find_launcher() == Launcher(str(in_path), "mpich", "MPICH's Hydra 4.0.2")
    beside = install("mpirun", OPEN_MPI_5, "venv/bin")
    assert find_launcher() == Launcher(str(beside), "openmpi", "Open MPI 5.0.11", 5)
    assert find_launcher("mpich").path == str(in_path)


def test_no_launcher(install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(capsys, *PROMPTS) == (10, "tpllm: no mpirun on this machine: pip install 'tpllm[mpi]' brings Open "
                                             "MPI's, or load your site's MPI\n")
    path = install("mpirun", "Some MPI 1.0")
    assert f"({path} --version says 'Some MPI 1.0', which is no MPI known here)" in refused(capsys, *PROMPTS)[1]
    install("mpirun", OPEN_MPI_4)
    code, errors = refused(capsys, "--mpi", "mpich", *PROMPTS)
    assert code == 10 and f"no mpirun of MPICH or Intel MPI on this machine ({path} is Open MPI 4.1.4)" in errors
    assert "--mpi srun needs a Slurm allocation" in refused(capsys, "--mpi", "srun", *PROMPTS)[1]
    monkeypatch.setenv("TPLLM_MPIRUN", "/nowhere/mpirun")
    assert "/nowhere/mpirun --version failed" in refused(capsys, *PROMPTS)[1]


def config(path: Path, tp: int, engine: bool, **more: Any) -> str:
    model = {"mapping": {"tp_size": tp}, **LLAMA_2_7B}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(
        {"pretrained_config": model, "build_config": more} if engine else model), encoding="utf-8")
    return str(path)


LLAMA_2_7B = {"dtype": "float16", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "head_size": 128, "intermediate_size": 11008, "vocab_size": 32000}


def test_the_number_of_ranks(install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What the engine or the checkpoint is for, else all slots."""
    install("mpirun", OPEN_MPI_5)
    engine, checkpoint = config(tmp_path / "e", 2, True), config(tmp_path / "c", 3, False)

    def ranks(*argv: str) -> str:
        assert main(["launch", "--dry-run", *argv]) == 0
        return capsys.readouterr().out.splitlines()[-1].partition(" -n ")[2].split()[0]

    run = ["run", "--input-text", "a"]
    assert ranks(*run, "--engine-dir", engine) == ranks(*run, f"--engine_dir={engine}") == "2"
    assert ranks(*run, "--checkpoint-dir", checkpoint) == "3"
    assert ranks(*run, "--engine-dir", engine, "--checkpoint-dir", checkpoint) == "2"
    assert ranks("build", "--checkpoint-dir", checkpoint, "--output-dir", "x") == "3"
    assert ranks("-n", "5", *run, "--engine-dir", engine) == "5"
    assert ranks("--host", "a:4,b:4", *run, "--engine-dir", engine) == "2"
    assert ranks("--host", "a:4,b:4", *run, "--engine-dir", "none") == "8"
    assert ranks(*run, "--engine-dir", "none") == str(gpus() or cores())


def test_oversubscription_is_for_cpus_on_one_host(install: Install, capsys: pytest.CaptureFixture[str],
                                                  tmp_path: Path) -> None:
    path = install("mpirun", OPEN_MPI_5)
    cpu = config(tmp_path / "cpu", 99, True, device="cpu")
    gpu = config(tmp_path / "gpu", 99, True, device="cuda")
    run = ["run", "--input-text", "a", "--engine-dir"]

    def line(*argv: str) -> str:
        assert main(["launch", "--dry-run", *argv]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert line(*run, cpu).startswith(f"{path} --bind-to none --oversubscribe -n 99")
    assert "--oversubscribe" not in line(*run, gpu)
    assert "--oversubscribe" in line("--host", "h0:2", *run, cpu)
    for argv, count in ((["--host", "h0:2", *run, gpu], 1), (["--host", "h0:2,h1:2", *run, cpu], 2)):
        code, errors = refused(capsys, *argv)
        assert code == 2 and f"99 ranks, but {count} host(s) with" in errors


@pytest.mark.parametrize(("argv", "why"), [
    (["convert", "--help"], "convert has no ranks to start; type: tpllm convert"),
    (["demo"], "demo has no ranks to start; type: tpllm demo"),
    (["runn"], "no such verb: runn; launch starts build, run"),
    (["--nodes", "2", *PROMPTS], "--nodes 2 needs hosts: give --hostfile FILE"),
    (["--timeout", "0", *PROMPTS], "--timeout 0: give a number of seconds above 0"),
    (["--timeout", "nan", *PROMPTS], "--timeout nan"),
    (["--hostfile", "/nowhere", *PROMPTS], "no such --hostfile: /nowhere"),
    (["--host", "a:x", *PROMPTS], "--host a:x: slots is 'x'"),
])  # fmt: skip
def test_refusals(install: Install, capsys: pytest.CaptureFixture[str], argv: list[str], why: str) -> None:
    install("mpirun", OPEN_MPI_5)
    assert why in refused(capsys, *argv)[1]


@pytest.mark.parametrize("argv", [["run", "--no-such-option"], ["build"], ["-n", "0", *PROMPTS], ["-n", "x", *PROMPTS],
                                  ["--host", "a", "--hostfile", "b", *PROMPTS], []])  # fmt: skip
def test_wrong_options_of_the_verb_are_said_before_ranks_start(install: Install, argv: list[str]) -> None:
    install("mpirun", OPEN_MPI_5)
    with pytest.raises(SystemExit) as e:
        main(["launch", *argv])
    assert e.value.code == 2


def test_help_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["launch", "-n", "2", "run", "--help"])
    assert e.value.code == 0 and "usage: tpllm run" in capsys.readouterr().out


def test_the_share_of_all_reduces() -> None:
    """Against the numbers of Llama-2-7B: 6.6 billion weights are read a token."""
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 4096 * 32000
    assert weight_bytes(LLAMA_2_7B, 1) == 2 * weights and weight_bytes(LLAMA_2_7B, 4) == weights / 2
    assert weight_bytes({**LLAMA_2_7B, "dtype": "float32", "quantization": {"quant_algo": "W8A16"}}, 1) == (
        weights + 3 * 4096 * 32000)
    assert all_reduce_share(LLAMA_2_7B, 1, 1e-3, 1e9) == 0.0
    assert all_reduce_share(LLAMA_2_7B, 4, 50e-6, 3e12) == pytest.approx(3.2e-3 / (3.2e-3 + weights / 2 / 3e12))
    # Key/value heads fewer than ranks are repeated, so a rank's part does not shrink with the others.
    few = {**LLAMA_2_7B, "num_key_value_heads": 2}
    assert 8 * weight_bytes(few, 8) > 2 * weight_bytes(few, 2)


def test_the_share_is_said_with_what_it_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPLLM_ALLREDUCE_US", "20")
    monkeypatch.setenv("TPLLM_MEMORY_GB_S", "")
    assert all_reduce_note(LLAMA_2_7B, 4, "2 hosts", True) == (
        "2 hosts: the 64 all-reduces of a token at batch 1 will take about 54% of its time, assuming 20 us for one and "
        "3000 GB/s of memory a rank (TPLLM_ALLREDUCE_US, TPLLM_MEMORY_GB_S)")
    assert all_reduce_note({}, 4, "2 hosts", True) == "2 hosts: every layer's two all-reduces are slow"


@pytest.mark.parametrize(("device", "peers", "said"), [
    ("cuda", [(1,), (0,)], False), ("cuda", [(1,), ()], True), ("cpu", [(1,), ()], False)])  # fmt: skip
def test_gpus_without_peer_access_are_told_beforehand(install: Install, tmp_path: Path, device: str, said: bool,
                                                      peers: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """The third GPU is not used."""
    gpus = [Device(i, "Fake GPU", f"GPU-{i}", 80 << 30, reached) for i, reached in enumerate([*peers, ()])]
    monkeypatch.setattr("tpllm.cli.launch.driver_inventory", lambda: gpus)
    monkeypatch.setattr("tpllm.cli.launch.start", lambda *_: 0)
    install("mpirun", OPEN_MPI_5)
    engine = config(tmp_path / "engine", 2, True, device=device)
    assert main(["launch", "run", "--engine-dir", engine, "--input-text", "a"]) == 0
    errors = capsys.readouterr().err
    assert ("launch: GPU 1 does not reach all others' memory: the 64 all-reduces of a token" in errors) == said


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script, where there is one beside Python, which a directory of its name does not hide."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert program() == [str(tmp_path / "bin" / "python"), "-m", "tpllm"]
    script = executable(tmp_path / "bin" / "tpllm", "true")
    assert program() == [str(script)]


def test_this_host() -> None:
    for name in ("localhost", "127.0.0.1", socket.gethostname(), f"root@{socket.gethostname()}"):
        assert is_this_host(name)
    assert not is_this_host("192.0.2.1") and not is_this_host("no-such-host.invalid") and not is_this_host("")
    assert address_towards("127.0.0.1") == "127.0.0.1"


# What launch does with a launcher: scripts in its place, which take its signals down in $NOTES.
class Watched:
    """`tpllm launch` in a process of its own, over a script."""

    def __init__(self, directory: Path, body: str, *options: str, banner: str = OPEN_MPI_5, **variables: str) -> None:
        self.notes = directory / "notes"
        version = f'if [ "$1" = --version ]; then printf %s {shlex.quote(banner)}; exit; fi\n'
        script = executable(directory / "mpirun", f"{version}note() {{ echo $* >>{self.notes}; }}\n{body}")
        environment = {**os.environ, "TPLLM_MPIRUN": str(script), **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tpllm", "launch", "-n", "1", *options, *PROMPTS], env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def noted(self) -> list[str]:
        return self.notes.read_text(encoding="utf-8").splitlines() if self.notes.exists() else []

    def wait_for(self, word: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not any(note.split()[0] == word for note in self.noted()):
            assert time.monotonic() < until and self.process.poll() is None, (word, self.noted())
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Its exit code and what it said, without the command line."""
        try:
            _, errors = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, "".join(e for e in errors.splitlines(True) if not e.startswith("launch: $ "))

    def pid(self, word: str) -> int:
        return int(next(note.split()[1] for note in self.noted() if note.split()[0] == word))


def alive(pid: int) -> bool:
    """Not as a zombie: where the first process reaps late, ended ones are seen for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FINISH = 'echo 0 >"$TPLLM_FINISHED_FILE"\n'
SLEEP = "sleep 60 & note ready $!; while :; do wait; done\n"


@pytest.mark.parametrize(("body", "code", "said"), [
    (FINISH, 0, ""),
    ("exit 0", 20, "launch: mpirun ended with exit code 0, but rank 0 did not get to its end: a host or a rank was "
                   "lost\n"),
    (FINISH + "exit 3", 20, "launch: mpirun ended with exit code 3; what went wrong is above\n"),
    ("exit 14", 20, "launch: mpirun ended with exit code 14; what went wrong is above\n"),
    ("kill -9 $$", 20, "launch: mpirun was ended by signal 9; what went wrong is above\n"),
    ('echo 75 >"$TPLLM_FINISHED_FILE"; exit 143', 75, ""), ('echo 11 >"$TPLLM_FINISHED_FILE"; exit 0', 11, ""),
    ("exit 12", 12, ""), ("exit 75", 75, ""), ("exit 11", 11, ""),
])  # fmt: skip
def test_exit_codes(tmp_path: Path, body: str, code: int, said: str) -> None:
    assert Watched(tmp_path, body).end() == (code, said)


def test_hydras_eleven_may_be_a_crash(tmp_path: Path) -> None:
    assert Watched(tmp_path, "exit 11", banner=HYDRA).end()[0] == 20


def test_standard_streams(tmp_path: Path) -> None:
    """The ranks' output as it is on stdout, launch's own lines on stderr, and no stdin."""
    watched = Watched(tmp_path, 'echo "out $(cat)"; echo err >&2\n' + FINISH)
    printed, errors = watched.process.communicate(timeout=60)
    assert printed == "out \n"
    command = errors.splitlines()[0]  # for root, Open MPI's permission stands before it
    assert command.startswith("launch: $ ") and f" {tmp_path}/mpirun --bind-to none " in command
    assert errors.endswith("err\n")


def test_timeout(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note TERM; exit 1" TERM\n' + SLEEP, "--timeout", "1")
    assert watched.end() == (21, "launch: stopped: not done within --timeout 1 s\n")
    assert watched.noted()[1:] == ["TERM"] and not alive(watched.pid("ready"))


def test_timeout_of_a_launcher_that_ignores_it(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note TERM" TERM; sleep 60 & note ready $!; while :; do sleep 0.1; done\n',
                      "--timeout", "1")
    started = time.monotonic()
    assert watched.end()[0] == 21 and 5 < time.monotonic() - started < 20
    assert watched.noted()[1:] == ["TERM"] and not alive(watched.pid("ready"))


def test_interrupt(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note INT; exit 1" INT\n' + SLEEP)
    watched.wait_for("ready")
    watched.process.send_signal(signal.SIGINT)
    assert watched.end() == (130, "launch: interrupted\n")
    assert watched.noted()[1:] == ["INT"] and not alive(watched.pid("ready"))


def test_second_interrupt_kills(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note INT" INT\n' + SLEEP)
    watched.wait_for("ready")
    watched.process.send_signal(signal.SIGINT)
    watched.wait_for("INT")
    assert watched.process.poll() is None
    started = time.monotonic()
    watched.process.send_signal(signal.SIGINT)
    assert watched.end()[0] == 130 and time.monotonic() - started < 5
    assert watched.noted()[1:] == ["INT"] and not alive(watched.pid("ready"))


def test_terminate_drains(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note USR1; exit 75" USR1; trap "note TERM" TERM\n' + SLEEP)
    watched.wait_for("ready")
    watched.process.terminate()
    assert watched.end() == (75, "") and watched.noted()[1:] == ["USR1"]


def test_terminate_after_the_grace(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note USR1" USR1; trap "note TERM; exit 1" TERM\n' + SLEEP,
                      TPLLM_DRAIN_SECONDS="1")
    watched.wait_for("ready")
    watched.process.terminate()
    assert watched.end()[0] == 143 and watched.noted()[1:] == ["USR1", "TERM"]


def test_terminate_when_all_was_done(tmp_path: Path) -> None:
    watched = Watched(tmp_path, f"trap '{FINISH.strip()}; exit 0' USR1\n" + SLEEP)
    watched.wait_for("ready")
    watched.process.terminate()
    assert watched.end() == (0, "")


def test_usr1_is_passed_on(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note USR1; exit 75" USR1\n' + SLEEP)
    watched.wait_for("ready")
    watched.process.send_signal(signal.SIGUSR1)
    assert watched.end() == (75, "")


def test_what_the_launcher_leaves_is_ended(tmp_path: Path) -> None:
    """Also in a session of its own; nothing of another job."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "TPLLM_FINISHED_FILE": "/another"}) as other:
        watched = Watched(tmp_path, "setsid sleep 60 & note ready $!; " + FINISH)
        assert watched.end()[0] == 0
        assert not alive(watched.pid("ready")) and other.poll() is None
        other.kill()


def test_launch_killed_takes_the_launcher_along(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 'trap "note TERM; kill \\$!; exit 1" TERM\n' + SLEEP)
    watched.wait_for("ready")
    watched.process.kill()
    watched.process.communicate(timeout=30)
    until = time.monotonic() + 10
    while "TERM" not in watched.noted():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_console_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    kept = os.dup(0)
    os.dup2(read, 0)
    try:
        server = ConsoleServer("127.0.0.1", terminal=False)
        host, port, token, _ = server.variables[CONSOLE].split()
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(b"0" * len(token) + b"\n")
            assert stranger.recv(10) == b""
        monkeypatch.setenv(CONSOLE, server.variables[CONSOLE])
        lines = ConsoleLines()
        assert lines.next(lambda: True) is None
        os.write(write, "grüße\r\n\nlast".encode())
        assert [lines.next(lambda: False), lines.next(lambda: False)] == ["grüße", ""]
        os.close(write)
        assert [lines.next(lambda: False), lines.next(lambda: False)] == ["last", None]
        server.close()
    finally:
        os.dup2(kept, 0)
        for number in (kept, read):
            os.close(number)


# The real thing: two ranks of the demo model, eager.
@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not Path(sys.executable).with_name("mpirun").is_file():
        pytest.skip("no mpirun beside this Python: pip install 'tpllm[mpi]'")
    work = tmp_path_factory.mktemp("launch")
    assert main(["convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(work / "checkpoint"), "--dtype",
                 "float32", "--tp-size", "2"]) == 0
    done = launched("build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(work / "engine"),
                    "--backend", "eager")
    assert done.returncode == 0, done.stdout + done.stderr
    yield work / "engine"


def launched(*argv: str, stdin: str | None = None, by: Sequence[str] = (sys.executable, "-m", "tpllm")
             ) -> subprocess.CompletedProcess[str]:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run([*by, "launch", "--timeout", "120", *argv], timeout=150, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **source)


def test_run(engine: Path) -> None:
    done = launched("run", "--engine-dir", str(engine), "--input-text", "The day after Monday is",
                    "Question: What is 27 plus 28? Answer:", "--max-output-len", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Output [Text 0]: " Tuesday."' in done.stdout and 'Output [Text 1]: " 55."' in done.stdout
    assert " -n 2 " in done.stderr and " on 2 rank(s)" in done.stdout


def test_what_killed_launchers_left_does_not_matter(engine: Path, tmp_path: Path) -> None:
    """Open MPI 5's mpirun refuses to start where one with its pid was killed; nor does launch leave anything itself."""
    first, most = os.getpid(), int(Path("/proc/sys/kernel/pid_max").read_text())
    for pid in range(first, first + 3000):
        pid = pid if pid < most else pid - most + 300
        left = tmp_path / f"ompi.{pid}" / f"pmix.{socket.gethostname().partition('.')[0]}.tool.{pid}"
        left.parent.mkdir()
        left.touch()
    before = sorted(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SESSION)
        patch.setenv("TMPDIR", str(tmp_path))
        done = launched("run", "--engine-dir", str(engine), "--input-text", "a", "--max-output-len", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(tmp_path.iterdir()) == before
        if mpirun(1, ["-c", ""], check=False).returncode == 0:
            pytest.skip("this mpirun starts in spite of what killed ones left, with or without launch")


def test_beside_a_clone_of_that_name(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tpllm" / "tpllm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = launched("run", "--engine-dir", str(engine), "--input-text", "a", "--max-output-len", "2", by=program())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_refusal_of_the_ranks_comes_through(engine: Path) -> None:
    done = launched("-n", "1", "run", "--engine-dir", str(engine), "--input-text", "a")
    assert done.returncode == 11 and "is for 2 rank(s), this launch has 1" in done.stderr


def test_lines_of_a_pipe_are_answered(engine: Path) -> None:
    """An empty line is ignored, one that is too long is refused, and /quit ends it."""
    text = "The day after Monday is\n\n" + "x" * 6000 + "\nQuestion: What is 27 plus 28? Answer:\n/quit\nnot this\n"
    done = launched("run", "--engine-dir", str(engine), "--max-output-len", "8", stdin=text)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = done.stdout.splitlines()
    assert answers[0] == " Tuesday." and answers[-1] == " 55." and len(answers) == 3
    assert answers[1].startswith("tpllm: prompt 0 has ")


def test_lines_of_a_pipe_are_one_chat(engine: Path) -> None:
    """Until /new; the answers are those of transformers to Llama 2's template, at two ranks as at one."""
    first, second = "The day after Monday is", "Count from three to seven:"
    library = SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
    model, bos, eos = transformers_model(MODEL_DIR), library.bos_id(), library.eos_id()

    def answer(ids: list[int]) -> str:
        new = transformers_greedy(model, ids, 8, eos_ids=(eos,))
        assert eos not in new[:-1]
        return str(library.decode(ids + new)).removeprefix(str(library.decode(ids)))

    one, two = ([bos, *library.encode(f"[INST] {text} [/INST]")] for text in (first, second))
    before = [bos, *library.encode(f"[INST] {first} [/INST] {answer(one).strip()} "), eos]
    done = launched("run", "--engine-dir", str(engine), "--max-output-len", "8", "--chat",
                    stdin=f"{first}\n{second}\n/new\n{second}\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "".join(text + "\n" for text in (answer(one), answer(before + two), answer(two)))


def test_without_prompts_and_without_a_line(engine: Path) -> None:
    done = launched("run", "--engine-dir", str(engine))
    assert done.returncode == 2 and "give --input-text or --input-file, or lines on stdin" in done.stderr
    bare = subprocess.run([sys.executable, "-m", "tpllm", "run", "--engine-dir", str(engine)], text=True, timeout=60,
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert bare.returncode == 2 and "for a prompt to type at: tpllm launch run" in bare.stderr


def test_a_terminal(engine: Path) -> None:
    """A prompt is shown before each line; Ctrl-C ends with 130, and no rank stays."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tpllm", "launch", "run", "--engine-dir", str(engine), "--max-output-len", "8"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, b"/quit or Ctrl-D ends\r\n> ")
        os.write(ours, b"The day after Monday is\n")
        read_until(ours, b" Tuesday.\r\n> ")
        os.write(ours, b"\x03")
        assert b"launch: interrupted" in read_until(ours, b"interrupted")
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    word = str(engine).encode()
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if word in contents(p) and alive(int(p.parent.name))]
    assert not running


def contents(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def take_terminal() -> None:
    """Standard input becomes the controlling terminal of the new session, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(terminal: int, words: bytes, seconds: float = 90) -> bytes:
    import select

    found, until = b"", time.monotonic() + seconds
    while words not in found:
        assert time.monotonic() < until, found
        if select.select([terminal], [], [], 0.2)[0]:
            found += os.read(terminal, 4096)
    return found
