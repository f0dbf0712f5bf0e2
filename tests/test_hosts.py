"""The demo model over two hosts that reach each other by ssh, two ranks on each."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.demo import RANKS, TPLLM, DemoEngine, demo_engine, long_run
from cluster.hosts_lab import SSH_TOOLS, Hosts, find, hosts_lab, missing, wait_for, write

MPIRUN = str(Path(sys.executable).with_name("mpirun"))
HEARTBEAT = 6


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := missing(SSH_TOOLS):
        pytest.skip(reason)
    if not Path(MPIRUN).is_file():
        pytest.skip("no mpirun beside this Python: pip install 'tpllm[mpi]'")
    with hosts_lab() as lab:
        write(lab.directory / "openmpi", "h0 slots=2\nh1 slots=2\n")
        write(lab.directory / "hydra", "h0:2\nh1:2\n")
        yield lab


@pytest.fixture(scope="module")
def demo(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> DemoEngine:
    return demo_engine(tmp_path_factory.getbasetemp())


def check_run(hosts: Hosts, demo: DemoEngine, launcher: list[str], output: Path,
              env: dict[str, str] | None = None, timeout: float = 200) -> None:
    """The answers are right, and what the all-reduces have to move went over the wire in both directions."""
    before = hosts.traffic("h1")
    hosts.on("h0", [*launcher, *demo.run_argv(output)], timeout=timeout, env=env)
    sent, received = (after - b for after, b in zip(hosts.traffic("h1"), before, strict=True))
    demo.check(output)
    assert demo.least_bytes() > 1e6 and min(sent, received) >= demo.least_bytes()
    assert not hosts.processes(naming="tpllm")


def hostfile(hosts: Hosts, dialect: str) -> str:
    return str(hosts.directory / dialect)


def test_bare_mpirun(hosts: Hosts, demo: DemoEngine, tmp_path: Path) -> None:
    check_run(hosts, demo, [MPIRUN, "--bind-to", "none", "--hostfile", hostfile(hosts, "openmpi"), "-n", str(RANKS),
                            *TPLLM], tmp_path / "answers.json")


@pytest.mark.full
@pytest.mark.parametrize("dialect", ["openmpi", "hydra"])
def test_tpllm_launch(hosts: Hosts, demo: DemoEngine, tmp_path: Path, dialect: str) -> None:
    """Either hostfile, whatever the launcher."""
    check_run(hosts, demo, [*TPLLM, "launch", "--hostfile", hostfile(hosts, dialect), "-n", str(RANKS)],
              tmp_path / "answers.json")


def debian_library(name: str) -> str:
    """Debian's own libmpi; a test for it is skipped elsewhere."""
    found = next(Path("/usr/lib").glob(f"*-linux-gnu/{name}"), None)
    if found is None:
        pytest.skip(f"no Debian {name} (.ci/run installs it)")
    return str(found)


@pytest.mark.full
def test_debian_openmpi(hosts: Hosts, demo: DemoEngine, tmp_path: Path) -> None:
    """Open MPI 4.1; its daemon is found on the other host through PATH."""
    library, launcher = debian_library("libmpi.so.40"), find("mpirun.openmpi")
    if launcher is None:
        pytest.skip("no mpirun.openmpi (Debian: openmpi-bin)")
    choose = {"MPI4PY_LIBMPI": library}
    version = "from mpi4py import MPI; print(MPI.Get_library_version(), MPI.COMM_WORLD.size)"
    mpirun = [launcher, "--bind-to", "none", "--hostfile", hostfile(hosts, "openmpi"), "-x", "MPI4PY_LIBMPI", "-n",
              str(RANKS)]
    printed = hosts.on("h0", [*mpirun, sys.executable, "-c", version], env=choose).stdout
    assert printed.count("Open MPI v4") == RANKS and "v5" not in printed
    check_run(hosts, demo, [*mpirun, *TPLLM], tmp_path / "answers.json", choose)


def check_mpich(hosts: Hosts, demo: DemoEngine, launcher: str, python: str, output: Path,
                env: dict[str, str] | None = None) -> None:
    version = "from mpi4py import MPI; print(MPI.Get_library_version(), MPI.COMM_WORLD.size)"
    mpirun = [launcher, "-f", hostfile(hosts, "hydra"), "-n", str(RANKS), python]
    printed = hosts.on("h0", [*mpirun, "-c", version], env=env).stdout
    assert printed.count("MPICH Version") == RANKS
    check_run(hosts, demo, [*mpirun, *TPLLM[1:]], output, env, timeout=90)


@pytest.mark.full
def test_mpich_wheel(hosts: Hosts, demo: DemoEngine, tmp_path: Path) -> None:
    """In an environment of its own, which takes everything else from this one."""
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True, timeout=60)
    python = str(made / "bin" / "python")
    pip = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps",
                          "mpich"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if pip.returncode:
        pytest.skip("no wheel of mpich where pip looks without an index (PIP_FIND_LINKS)")
    [packages] = made.glob("lib/python3*/site-packages")
    sources = [sysconfig.get_path("purelib"), str(Path(__file__).parents[1])]
    write(packages / "tests.pth", "".join(f"import site; site.addsitedir({path!r})\n" for path in sources))
    check_mpich(hosts, demo, str(made / "bin" / "mpirun"), python, tmp_path / "answers.json")


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["mpirun", "launch"])
def test_a_host_that_is_cut_off(hosts: Hosts, demo: DemoEngine, tmp_path: Path, launcher: str) -> None:
    """The job ends within the bound, not with 0, and says which host was lost; no rank is left on either side."""
    start = {"mpirun": [MPIRUN, "--bind-to", "none", "-x", "TPLLM_HEARTBEAT"], "launch": [*TPLLM, "launch"]}[launcher]
    argv = [*start, "--hostfile", hostfile(hosts, "openmpi"), "-n", str(RANKS),
            *(TPLLM if launcher == "mpirun" else []), *long_run(demo, tmp_path)]
    log = f"cut-{launcher}"
    job = hosts.start("h0", argv, log, timeout=300, env={"TPLLM_HEARTBEAT": str(HEARTBEAT)})
    try:
        wait_for("the first answer", lambda: "Output [Text" in hosts.log(log), 150)
        hosts.cut("h1")
        cut = time.monotonic()
        code = job.wait(HEARTBEAT + 15)
        seconds = time.monotonic() - cut
        said = hosts.log(f"{log}.err")
        assert code not in (0, 124, 137), said
        assert any("tpllm: " in text and "h1" in text for text in said.splitlines()), said
        assert seconds < HEARTBEAT + 15
        wait_for("the end of all ranks", lambda: not hosts.processes(naming="--streaming"), 20)
    finally:
        hosts.mend("h1")
