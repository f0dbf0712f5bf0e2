"""What launch has to know of this machine: how tpllm is started, cores, GPUs, and whether a host's name is its own."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path


def program() -> list[str]:
    """The words that start tpllm: the script beside this Python, else its module.

    With `-m`, a directory `tpllm` in the current one, such as a clone's, may hide the package.
    """
    script = Path(sys.executable).with_name("tpllm")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "tpllm"]


def cores() -> int:
    """Physical cores this process may use: what Open MPI counts as slots (hardware threads are not)."""
    siblings = set()
    usable = os.sched_getaffinity(0)
    for cpu in usable:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(usable)
    return len(siblings)


def gpus() -> int:
    """NVIDIA GPUs that a process started here may use, without asking CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip() and word.strip() != "-1"])
    with contextlib.suppress(OSError):
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    return 0


def is_this_host(name: str) -> bool:
    """Whether a name or address of a hostfile means this machine; a name that cannot be resolved does not."""
    name = name.rpartition("@")[2]
    own = socket.gethostname()
    if name in ("localhost", own, own.partition(".")[0]):
        return True
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM):
            # An address is ours exactly when a socket can be bound to it.
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as s:
                s.bind(address)
                return True
    return False


def address_towards(name: str) -> str:
    """This machine's address on the way to another host; its name where that cannot be told."""
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, protocol, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as s:
            s.connect(address)  # sends nothing: a datagram socket only chooses its route
            return str(s.getsockname()[0])
    return socket.gethostname()
