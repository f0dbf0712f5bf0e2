"""Triton's kernels in an engine's file: what was packed is found by Triton's own manager in another directory."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
from interpreted import run_interpreted

from tpllm.engine.torch.kernel_files import pack_kernels, unpack_kernels
from tpllm.errors import UsageError

CUBIN, LAUNCHER = b"\x7fELF kernel", b"\x7fELF launcher"


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("triton", reason="Triton is not installed here")


def manager(triton: Any, directory: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(directory))
    return triton.runtime.cache.FileCacheManager(key)


@pytest.fixture
def members(triton: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What Triton leaves of a kernel and of a launcher, through an archive as an engine is one."""
    kernel, launcher = (manager(triton, tmp_path / "made", key, monkeypatch) for key in ("KERNEL", "LAUNCHER"))
    files = {"_gemv.json": "{}", "_gemv.cubin": CUBIN, "_gemv.ttir": "module {}"}
    kernel.put_group("_gemv.json", {name: kernel.put(data, name) for name, data in files.items()})
    launcher.put(LAUNCHER, "launcher.cpython-311.so")
    with zipfile.ZipFile(tmp_path / "engine", "w") as archive:
        for name, data in pack_kernels(tmp_path / "made").items():
            archive.writestr(name, data)
    with zipfile.ZipFile(tmp_path / "engine") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.gpu
def test_what_was_packed_is_found_elsewhere(members: dict[str, bytes], triton: Any, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    (tmp_path / "made").rename(tmp_path / "gone")
    kernel = manager(triton, there, "KERNEL", monkeypatch)
    assert kernel.get_group("_gemv.json") is None
    unpack_kernels(members | {"engine.json": b"{}"})
    found = kernel.get_group("_gemv.json")
    assert set(found) == {"_gemv.json", "_gemv.cubin"}  # no intermediate code
    assert all(Path(path).parent == there / "KERNEL" for path in found.values())
    assert Path(found["_gemv.cubin"]).read_bytes() == CUBIN
    launcher = manager(triton, there, "LAUNCHER", monkeypatch)
    assert Path(launcher.get_file("launcher.cpython-311.so")).read_bytes() == LAUNCHER


@pytest.mark.gpu
def test_what_is_there_is_left_alone(members: dict[str, bytes], triton: Any, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = manager(triton, tmp_path / "there", "KERNEL", monkeypatch)
    group = {name: kernel.put(b"own", name) for name in ("_gemv.json", "_gemv.cubin", "_gemv.ptx")}
    kernel.put_group("_gemv.json", group)
    unpack_kernels(members)
    assert kernel.get_group("_gemv.json") == group and Path(group["_gemv.cubin"]).read_bytes() == b"own"


@pytest.mark.gpu
def test_what_was_put_there_in_part_is_completed(members: dict[str, bytes], triton: Any, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = manager(triton, tmp_path / "there", "KERNEL", monkeypatch)
    kernel.put(CUBIN, "_gemv.cubin")
    unpack_kernels(members)
    assert set(kernel.get_group("_gemv.json")) == {"_gemv.json", "_gemv.cubin"}


@pytest.mark.gpu
def test_a_directory_that_cannot_be_written_is_named(members: dict[str, bytes], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"TRITON_CACHE_DIR.*can be written"):
        unpack_kernels(members)


def test_an_engine_without_kernels_needs_no_triton() -> None:
    unpack_kernels({"engine.json": b"{}", "mixed.pt2": b""})


def test_beside_a_triton() -> None:
    run_interpreted(__file__, 4)
