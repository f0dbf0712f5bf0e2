"""`tpllm doctor`: a healthy world passes, and every planted fault is found, named and given a remedy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import HERE, mpirun
from makers import LLAMA2_MHA, make_meta_dir

from tpllm.cli import main

STAGES = ["world", "versions", "files", "memory", "devices", "peer access", "all-reduce", "clocks"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("doctor")
    meta = make_meta_dir(directory / "meta", LLAMA2_MHA)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(directory / "ck"), "--tp-size", "2"]) == 0
    return directory / "ck"


def doctor(fault: str, *argv: str, ranks: int = 2, check: bool = False) -> subprocess.CompletedProcess[str]:
    return mpirun(ranks, [str(HERE / "doctor_program.py"), fault, *argv], timeout=100, check=check)


def test_a_healthy_world(checkpoint: Path) -> None:
    printed = doctor("none", "--checkpoint-dir", str(checkpoint), check=True).stdout
    for number, stage in enumerate(STAGES, 1):
        assert f"doctor: [{number}/{len(STAGES)}] {stage} … " in printed
    assert "2 rank(s) on 1 host(s)" in printed and "doctor: all is well" in printed
    assert "8 KiB: " in printed and "65536 KiB: " in printed and "GB/s" in printed


def test_as_json(checkpoint: Path) -> None:
    report = json.loads(doctor("none", "--json", "--checkpoint-dir", str(checkpoint), check=True).stdout)
    assert report["ok"] and [stage["stage"] for stage in report["stages"]] == STAGES


@pytest.mark.parametrize(("fault", "ranks", "words"), [
    ("version", 2, ["rank 1", "torch is 1.2.3", "install the same version on all hosts"]),
    ("memory", 2, ["rank 1", "a planted limit", "use more hosts"]),
    ("sum", 2, ["all-reduce of 67108864 bytes gives a wrong sum on rank(s) [1]", "TCP"]),
    ("one-gpu-for-all", 2, ["ranks 0 and 1 both have GPU-1234", "--gpus-per-node"]),
    ("more-ranks-than-gpus", 3, ["3 ranks on this host and 2 GPUs"]),
])  # fmt: skip
def test_planted_faults(fault: str, ranks: int, words: list[str], checkpoint: Path) -> None:
    done = doctor(fault, "--checkpoint-dir", str(checkpoint), ranks=ranks)
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout, done.stdout + done.stderr
    assert "FAILED" in done.stdout and "all is well" not in done.stdout and "Traceback" not in done.stderr


def test_a_missing_directory(tmp_path: Path) -> None:
    done = doctor("none", "--engine-dir", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "nowhere/config.json is not there on " in done.stdout and "all hosts share" in done.stdout


def test_a_stage_that_does_not_end() -> None:
    """One rank hangs in a stage: its deadline ends the job and names the stage."""
    done = doctor("slow")
    assert done.returncode not in (0, 124)
    assert "stage 'files' has not ended within 2 s" in done.stderr
