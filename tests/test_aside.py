"""Work in a process of its own: its result and its errors come back, and it never outlives what began it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tpllm.engine.torch.aside import Aside
from tpllm.errors import DataError, RankError


def product(a: int, b: int) -> int:
    return a * b


def broken(kind: str) -> None:
    if kind == "ours":
        raise DataError("the file is torn")
    raise ValueError("not ours")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def slow(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def begin_slow(path: str) -> None:
    """What a process of its own does, which is then killed."""
    with Aside(slow, path) as aside:
        aside.result()


def ends(path: Path) -> bool:
    """Whether the process that wrote its number there is gone within some seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path("/proc", path.read_text(), "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_its_result() -> None:
    with Aside(product, 6, 7) as aside:
        assert aside.result() == 42


def test_its_errors() -> None:
    with Aside(broken, "ours") as aside, pytest.raises(DataError, match="the file is torn"):
        aside.result()
    with Aside(broken, "other") as aside, pytest.raises(RankError, match="ValueError: not ours"):
        aside.result()
    with Aside(killed) as aside, pytest.raises(RankError, match=r"died \(exit code -9\)"):
        aside.result()


def test_it_ends_when_it_is_not_wanted_any_more(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyError), Aside(slow, str(tmp_path / "pid")):
        wait_for(tmp_path / "pid")
        raise KeyError
    assert time.monotonic() - started < 30 and ends(tmp_path / "pid")


def test_it_ends_when_what_began_it_is_killed(tmp_path: Path) -> None:
    code = f"import test_aside\ntest_aside.begin_slow({str(tmp_path / 'pid')!r})\n"  # as users write scripts
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env={**os.environ, "PYTHONPATH": path})
    try:
        wait_for(tmp_path / "pid")
    finally:
        process.kill()
        process.wait()
    assert ends(tmp_path / "pid")
