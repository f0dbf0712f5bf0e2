"""`tpllm doctor`: a healthy world passes, and every planted fault is found, named and given a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, mpirun
from makers import LLAMA2_MHA, make_meta_dir

from tpllm import devices
from tpllm.cli import main
from tpllm.launched import memory_limit

STAGES = ["world", "versions", "backends", "files", "memory", "devices", "peer access", "all-reduce", "clocks"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("doctor")
    meta = make_meta_dir(directory / "meta", LLAMA2_MHA)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(directory / "ck"), "--tp-size", "2"]) == 0
    return directory / "ck"


def doctor(fault: str, *argv: str, ranks: int = 2, check: bool = False) -> subprocess.CompletedProcess[str]:
    return program(fault, "doctor", *argv, ranks=ranks, check=check)


def program(fault: str, *argv: str, ranks: int = 2, check: bool = False) -> subprocess.CompletedProcess[str]:
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
    ("more-ranks-than-gpus", 3, ["rank 2 has no GPU of its own", "has 2 for 3 rank(s)"]),
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


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    """Of two ranks, for CPU; and `for-gpus` beside it, whose config.json says the other thing."""
    directory = checkpoint.parent / "engine"
    mpirun(2, ["-m", "tpllm", "build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(directory), "--backend",
               "eager", "--max-seq-len", "64"])
    text = (directory / "config.json").read_text(encoding="utf-8")
    (directory.parent / "for-gpus").mkdir()
    (directory.parent / "for-gpus" / "config.json").write_text(
        text.replace('"device": "cpu"', '"device": "cuda"'), encoding="utf-8")
    (directory.parent / "ids.csv").write_text("1,2,3\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize(("fault", "argv", "words"), [
    ("version", ["run", "--engine-dir", "engine", "--input-file", "ids.csv"],
     ["rank 1 of 2, versions: torch is 1.2.3", "install the same version on all hosts"]),
    ("elsewhere", ["run", "--engine-dir", "engine", "--input-file", "ids.csv"],
     ["rank 1 of 2, files: engine/config.json is not there on ", "all hosts share"]),
    pytest.param("memory", ["run", "--engine-dir", "engine", "--input-file", "ids.csv"],
                 ["rank 1 of 2, memory: ", "a planted limit", "use more hosts"], marks=pytest.mark.full),
    ("one-gpu-for-all", ["build", "--checkpoint-dir", "ck", "--output-dir", "other", "--device", "cuda"],
     ["ranks 0 and 1 both have GPU-1234 on "]),
    ("one-gpu-for-all", ["run", "--engine-dir", "for-gpus", "--input-file", "ids.csv"],
     ["ranks 0 and 1 both have GPU-1234 on "]),
], ids=["versions", "files", "memory", "device of build", "device of run"])  # fmt: skip
def test_a_run_is_refused_for_what_is_quickly_seen(engine: Path, monkeypatch: pytest.MonkeyPatch, fault: str,
                                                   argv: list[str], words: list[str]) -> None:
    monkeypatch.chdir(engine.parent)
    done = program(fault, *argv)
    assert done.returncode != 0 and done.stderr.count("tpllm: ") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (engine.parent / "other").exists()


def test_the_map_of_gpus_is_shown_once_and_recorded(engine: Path, tmp_path: Path) -> None:
    """GPUs that only the inventory sees: after the map, the run ends as torch cannot use them."""
    done = program("one-gpu-each", "run", "--engine-dir", str(engine.with_name("for-gpus")), "--input-file",
                   str(engine.with_name("ids.csv")), "--checkpoint-dir", str(engine.with_name("ck")), "--log-dir",
                   str(tmp_path))  # fmt: skip
    host = os.uname().nodename
    table = f"rank host gpu uuid numa\n0 {host} 0 GPU-0 7\n1 {host} 0 GPU-1 8\n"
    assert done.returncode != 0 and done.stderr.count(table) == 1, done.stderr
    assert done.stderr.count("takes peer access away") == 1 and "--gpus-per-node" in done.stderr
    [record] = tmp_path.glob("*/record.json")
    assert json.loads(record.read_text(encoding="utf-8"))["ranks"] == [
        {"rank": rank, "host": host, "gpu": 0, "uuid": f"GPU-{rank}", "numa": 7 + rank} for rank in (0, 1)]


class FakeDriver(types.ModuleType):
    """cuda-python's driver module, as far as it is asked: two GPUs of which the second reaches the first, and takes one
    process."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
    CUdevice_attribute = types.SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_MODE=20)
    CUcomputemode = types.SimpleNamespace(CU_COMPUTEMODE_EXCLUSIVE_PROCESS=3)
    UUIDS = ("5fd4b087-86f3-7a43-b711-4771313afc50", "00112233-4455-6677-8899-aabbccddeeff")

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: (0, {
            "cuInit": lambda flags: None, "cuDeviceGetCount": lambda: 2, "cuDeviceGet": lambda i: i,
            "cuDeviceGetName": lambda size, i: b"NVIDIA H200\0\0",
            "cuDeviceGetUuid": lambda i: types.SimpleNamespace(bytes=bytes.fromhex(self.UUIDS[i].replace("-", ""))),
            "cuDeviceTotalMem": lambda i: 141 << 30, "cuDeviceCanAccessPeer": lambda i, j: i > j,
            "cuDeviceGetPCIBusId": lambda size, i: b"FFFF:FF:1F.7\0",
            "cuDeviceGetAttribute": lambda number, i: {20: 3 * i}[number],
        }[name](*arguments))  # fmt: skip


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: types.ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.ModuleType("cuda.bindings"))
    monkeypatch.setattr(sys.modules["cuda.bindings"], "driver", driver, raising=False)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))


def test_the_inventory_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With UUIDs as nvidia-smi writes them; no such PCI device is here, so no NUMA node is known."""
    with_driver(monkeypatch, FakeDriver("driver"))
    assert devices.driver_inventory() == [
        devices.Device(0, "NVIDIA H200", "GPU-5fd4b087-86f3-7a43-b711-4771313afc50", 141 << 30, (), None),
        devices.Device(1, "NVIDIA H200", "GPU-00112233-4455-6677-8899-aabbccddeeff", 141 << 30, (0,), None, True)]


def test_cuda_python_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises a RuntimeError then."""
    def absent(flags: int) -> None:
        raise RuntimeError("libcuda.so.1 was not found")

    driver = types.ModuleType("driver")
    monkeypatch.setattr(driver, "cuInit", absent, raising=False)
    with_driver(monkeypatch, driver)
    assert devices.driver_inventory() == []


def test_the_numa_node_is_the_kernels() -> None:
    """For every PCI device here, as sysfs says; -1 there means that it is not known."""
    assert devices.numa_node("ffff:ff:1f.7") is None
    for file in Path("/sys/bus/pci/devices").glob("*/numa_node"):
        node = int(file.read_text(encoding="ascii"))
        assert devices.numa_node(file.parent.name.upper()) == (None if node < 0 else node)


@pytest.mark.parametrize(("names", "prefix"), [
    (("memory.max", "memory.current"), ""), (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")])
def test_files_in_a_cgroup_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str],
                                      prefix: str) -> None:
    """What was only read or written gives way; what processes hold does not."""
    limit, used = names
    (tmp_path / limit).write_text("1000000\n", encoding="ascii")
    (tmp_path / used).write_text("900000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text(
        f"anon 100\nactive_file 0\ninactive_file 5\n{prefix}active_file 200000\n{prefix}inactive_file 300000\n",
        encoding="ascii")
    monkeypatch.setattr("tpllm.launched.cgroup_files", lambda version2, version1: [tmp_path / limit])
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    assert memory_limit() == (600000, f"the limit of cgroup {tmp_path}")
