"""What the tests share: starting ranks, the demo model's oracle, and engines built once a session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from built import build, demo  # noqa: F401  fixtures
from tensorrt_stub import trt  # noqa: F401

from tpllm.launch.launchers import SESSION

# Runs leave logs and records; those of tests belong into no user's directory.
os.environ.setdefault("TPLLM_LOG_DIR", tempfile.mkdtemp(prefix="tpllm-test-logs-"))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def session_files() -> Iterator[None]:
    """Each test's mpirun keeps its files apart.

    Open MPI 5 names them by its pid: those that a killed one left would stop a later one that is given the same pid.
    """
    # Not the test's own `monkeypatch`: asked for here it would be undone later than the test's other fixtures.
    with (tempfile.TemporaryDirectory(prefix="tpllm-test-session-", ignore_cleanup_errors=True) as directory,
          pytest.MonkeyPatch.context() as patch):
        patch.setenv(SESSION, directory)
        yield


def mpirun_command(ranks: int, argv: list[str]) -> list[str]:
    """`python argv…` on that many ranks with this environment's mpirun."""
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.is_file() else shutil.which("mpirun")
    if launcher is None:
        pytest.skip("no mpirun: pip install 'tpllm[mpi]'")
    return [launcher, "--bind-to", "none", "--oversubscribe", "-n", str(ranks), sys.executable, *argv]


def mpirun_environment(env: dict[str, str] | None) -> dict[str, str]:
    """This one with `env`, and what mpirun wants of root."""
    return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
            **(env or {})}


def mpirun(ranks: int, argv: list[str], timeout: float = 120, env: dict[str, str] | None = None,
           check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python argv…` on that many ranks, bounded in time."""
    # SIGTERM first: mpirun takes its ranks along then, which SIGKILL would leave behind.
    done = subprocess.run(["timeout", "-k", "5", str(timeout), *mpirun_command(ranks, argv)],
                          env=mpirun_environment(env), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_jobs(ranks: int, jobs: list[dict[str, Any]], directory: Path, timeout: float) -> str:
    """All jobs in one mpirun of `rank_program.py`; returns what it printed."""
    path = directory / f"jobs{ranks}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    return mpirun(ranks, [str(HERE / "rank_program.py"), str(path)], timeout).stdout
