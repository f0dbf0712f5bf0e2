"""The line between a user's terminal and rank 0: launch keeps stdin, rank 0 asks for it over a socket.

No launcher's own stdin will do: Open MPI's never ends, and Hydra's does not end on the other ranks.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
from collections.abc import Callable

from tpllm.errors import PreflightError
from tpllm.launched import CONSOLE

WAIT = 30.0  # seconds for either side to answer the other


class ConsoleServer:
    """Launch's side: sends what comes on stdin to the one process that knows the token."""

    def __init__(self, address: str, terminal: bool) -> None:
        """Listen at `address`: the loopback's, or this host's on the network when rank 0 is on another one."""
        self._listener = socket.create_server((address, 0))
        self._token = secrets.token_hex(16)
        port = self._listener.getsockname()[1]
        self.variables = {CONSOLE: f"{address} {port} {self._token} {'terminal' if terminal else 'pipe'}"}
        # A daemon: a read from a terminal cannot be interrupted, and must not keep launch from ending.
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection = self._accept()
            with connection:
                # Not sys.stdin: a thread that holds its lock would stop the interpreter's end.
                while data := os.read(0, 4096):
                    connection.sendall(data)

    def _accept(self) -> socket.socket:
        while True:
            connection, _ = self._listener.accept()
            connection.settimeout(WAIT)
            try:
                with connection.makefile("rb") as stream:
                    given = stream.readline(100).strip()
            except OSError:
                given = b""
            if hmac.compare_digest(given, self._token.encode()):
                connection.settimeout(None)
                return connection
            connection.close()


class ConsoleLines:
    """Rank 0's side: the lines typed, one after the other."""

    def __init__(self) -> None:
        try:
            host, port, token, kind = os.environ[CONSOLE].split()
            self._socket = socket.create_connection((host, int(port)), timeout=WAIT)
            self._socket.sendall(token.encode() + b"\n")
        except (OSError, ValueError) as e:
            raise PreflightError(f"rank 0 cannot reach the terminal of tpllm launch: {e}; give --input-text or "
                                 "--input-file") from None
        self._socket.settimeout(0.2)  # between two looks at `stop`; a user may think for as long as she likes
        self._received, self._ended = b"", False
        self.is_terminal = kind == "terminal"

    def next(self, stop: Callable[[], bool]) -> str | None:
        """The next line without its end; None after the last one, or when `stop` says so while waiting."""
        while b"\n" not in self._received and not self._ended:
            if stop():
                return None
            with contextlib.suppress(TimeoutError):
                data = self._read()
                self._received += data
                self._ended = not data
        line, newline, self._received = self._received.partition(b"\n")
        return line.decode("utf-8", "replace").rstrip("\r") if line or newline else None

    def _read(self) -> bytes:
        try:
            return self._socket.recv(4096)
        except ConnectionError:  # launch itself was killed
            return b""
