"""Ranks that watch each other: a death is noticed at once, silence within a bound, whatever the launcher does.

Rank 0 listens; every other rank keeps a TCP connection to it, and both sides send a line now and then from a thread
of their own, which computing, compiling and loading do not stop. A connection that ends without a farewell is a
death; one that is silent too long is a stopped process or a lost host. MPI itself promises neither: a rank that
dies can leave the others waiting for ever, and a host that is cut off is noticed by no launcher in its defaults.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tpllm.errors import RankError, TimeOutError

CONNECT_SECONDS = 10.0
BEATS_PER_TIMEOUT = 6


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 listens; the token keeps strangers out."""

    addresses: tuple[str, ...]
    port: int
    token: str


@dataclass(frozen=True)
class Failure:
    """The first failure that was noticed: which rank, where it was, and what happened to it."""

    rank: int
    host: str
    stage: str
    what: str
    exit_code: int = RankError.exit_code


class Peer:
    """The other end of one connection, as far as it is known."""

    def __init__(self, sock: socket.socket, rank: int, host: str) -> None:
        sock.setblocking(False)
        self.sock, self.rank, self.host = sock, rank, host
        self.stage = "start"
        self.seen = time.monotonic()
        self.left = False
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # a broken or full connection is found when reading, or by its silence

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come, or None when the connection has ended."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.seen = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [message for line in lines if isinstance(message := parsed(line), dict)]


class Heartbeat:
    """One rank's side.

    `on_failure(failure, told)` is called once, from the heartbeat's thread, and is expected to end the process;
    `told` is whether the failure was reported by the rank that failed rather than found here.
    """

    def __init__(self, rank: int, host: str, timeout: float, on_failure: Callable[[Failure, bool], None]) -> None:
        self.rank, self.host, self.timeout = rank, host, timeout
        self.stage = "start"
        self._on_failure = on_failure
        self._peers: list[Peer] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tpllm-heartbeat", daemon=True)

    def listen(self, several_hosts: bool) -> tuple[socket.socket, Meeting]:
        """Rank 0: a listening socket, on the loopback unless other hosts must reach it."""
        server = socket.create_server(("" if several_hosts else "127.0.0.1", 0), backlog=1024)
        return server, Meeting(own_addresses() if several_hosts else ("127.0.0.1",), server.getsockname()[1],
                               secrets.token_hex(16))

    def accept(self, server: socket.socket, meeting: Meeting, others: int) -> list[int]:
        """Rank 0: wait for the others' connections; returns the ranks that came."""
        deadline = time.monotonic() + CONNECT_SECONDS
        with server:
            while len(self._peers) < others and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    sock, _ = server.accept()
                    sock.settimeout(2)
                    hello = json.loads(sock.makefile("rb").readline(4096))
                except (OSError, ValueError):
                    continue
                if hello.get("token") == meeting.token:
                    self._peers.append(Peer(sock, hello["rank"], hello["host"]))
                    self._peers[-1].send({"stage": self.stage})
                else:
                    sock.close()
        return [peer.rank for peer in self._peers]

    def connect(self, meeting: Meeting, first_host: str) -> bool:
        """The other ranks: reach rank 0 at one of its addresses."""
        for address in meeting.addresses:
            if (sock := connection(address, meeting.port)) is None:
                continue
            peer = Peer(sock, 0, first_host)
            peer.send({"token": meeting.token, "rank": self.rank, "host": self.host})
            self._peers.append(peer)
            return True
        return False

    def start(self) -> None:
        self._thread.start()

    def tell(self, **message: Any) -> None:
        """Send a message to all peers now: `failed=…` when this rank ends the job, `left=True` when it is done."""
        for peer in self._peers:
            peer.send(message)

    def enter(self, stage: str) -> None:
        """What this rank does from now on; told at once, as it may die of it before the next beat."""
        self.stage = stage
        self.tell(stage=stage)

    def leave(self) -> None:
        """This rank is done: its silence means nothing from now on."""
        self._stop.set()
        self.tell(left=True)

    def _watch(self) -> None:
        interval = self.timeout / BEATS_PER_TIMEOUT
        selector = selectors.DefaultSelector()
        for peer in self._peers:
            selector.register(peer.sock, selectors.EVENT_READ, peer)
        next_beat = time.monotonic()
        while not self._stop.is_set() and selector.get_map():
            now = time.monotonic()
            if now >= next_beat:
                self.tell(stage=self.stage)
                next_beat = now + interval
            for key, _ in selector.select(max(0.01, next_beat - now)):
                self._hear(key.data, selector)
            self._check_silence(time.monotonic() - now)

    def _hear(self, peer: Peer, selector: selectors.BaseSelector) -> None:
        messages = peer.read()
        for message in messages or ():
            peer.stage = message.get("stage", peer.stage)
            peer.left = peer.left or message.get("left", False)
            if "failed" in message:
                self._fail(Failure(**message["failed"]), told=True)
        if messages is None or peer.left:
            selector.unregister(peer.sock)
            if not peer.left:
                peer.left = True
                self._fail(Failure(peer.rank, peer.host, peer.stage, "died"))

    def _check_silence(self, waited: float) -> None:
        now = time.monotonic()
        for peer in self._peers:
            # If this process itself was stopped, everyone looks silent: then they get another round.
            if not peer.left and now - peer.seen > self.timeout and waited < self.timeout / 2:
                peer.left = True
                what = f"has been silent for {self.timeout:g} s: stopped, or its host is lost"
                self._fail(Failure(peer.rank, peer.host, peer.stage, what, TimeOutError.exit_code))

    def _fail(self, failure: Failure, told: bool = False) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self.tell(failed=asdict(failure))
        self._on_failure(failure, told)


def parsed(line: bytes) -> Any:
    """A message, or None for a line that a full connection cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def connection(address: str, port: int) -> socket.socket | None:
    try:
        return socket.create_connection((address, port), timeout=CONNECT_SECONDS / 2)
    except OSError:
        return None


def reach(addresses: tuple[str, ...], port: int) -> str | None:
    """The first of another host's addresses at which something listens."""
    for address in addresses:
        if sock := connection(address, port):
            sock.close()
            return address
    return None


def own_addresses() -> tuple[str, ...]:
    """Addresses under which other hosts may reach this one, the host name's first."""
    found: list[str] = []
    for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
        if family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
            found.append(str(address[0]))
    try:
        # No packet is sent: connecting a datagram socket only asks the routing table for this host's address.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            found.append(probe.getsockname()[0])
    except OSError:
        pass
    return tuple(dict.fromkeys([*found, socket.gethostname()]))
