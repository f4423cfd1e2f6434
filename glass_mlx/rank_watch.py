"""Notice that another rank of a run has ended, and end this one with one sentence.

A rank that waits for a dead one may wait forever, or fail somewhere within MLX. So every rank keeps
a connection to rank 0 of which nothing is expected but its end.
"""

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from glass_mlx.errors import one_line
from glass_mlx.models import Ranks

# Seconds between two signs of life of a connection, and how many may be missed.
_INTERVAL, _MISSED = 5, 3

# Seconds within which all ranks connect.
_CONNECT_TIME = 60

# Seconds that a rank has to end by itself, for a reason that it knows better.
_GRACE = 1.0

# A rank that ends well says so first. One that fails says why.
_DONE, _FAILED = b"+", b"-"

_LONGEST = 4096


class RankWatch:
    """The connections of a rank to rank 0, or of rank 0 to all others.

    All ranks must make one at the same time.

    Args:
        ranks: the ranks.
        command: the command's name, which messages start with.
        stderr: the file descriptor of standard error before any redirection.
    """

    def __init__(self, ranks: Ranks, command: str, stderr: int) -> None:
        self._ranks, self._command, self._stderr = ranks, command, stderr
        self._connections = _accept(ranks) if ranks.is_first else {0: _connect(ranks)}
        self._is_ending = threading.Event()
        for rank, connection in self._connections.items():
            threading.Thread(target=self._wait, args=(rank, connection), daemon=True).start()
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._end_on_request, args=(read_end,), daemon=True).start()

    def done(self) -> None:
        """Tell the others that this rank has done all of its work."""
        self._say(_DONE)

    def failed(self, reason: str) -> None:
        """Tell the others that this rank ends with an error, and wait until they know."""
        self._say(_FAILED + reason.encode()[-_LONGEST:])
        if not self._ranks.is_first:
            time.sleep(2 * _GRACE)  # mlx.launch ends all ranks as soon as one has failed

    def blame_others(self) -> None:
        """Give the watch time to end this process, if another rank has ended."""
        time.sleep(2 * _GRACE)

    def _say(self, message: bytes) -> None:
        self._is_ending.set()
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)

    def _wait(self, rank: int, connection: socket.socket) -> None:
        """Wait for the end of a connection, and end this process unless the other rank is done."""
        message = b""
        with suppress(OSError):  # the machine or the link to it is gone
            while part := connection.recv(_LONGEST):
                message += part
        if message.startswith(_DONE) or self._is_ending.wait(_GRACE if message else 0):
            return
        reason = message[len(_FAILED) :].decode(errors="replace")
        if message and rank == 0:
            os._exit(2)  # rank 0 prints the reason
        self._end(f"rank {rank} has failed: {reason}" if reason else f"rank {rank} has ended")

    def _end_on_request(self, signals: int) -> None:
        """End this process some time after SIGTERM.

        `mlx.launch` sends it to all ranks as soon as one has failed, perhaps before this one knows
        why. Python's handlers have to wait for MLX, which may wait forever for that rank.

        Args:
            signals: a file descriptor that gives the number of each signal.
        """
        while os.read(signals, 1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGTERM)

    def _end(self, reason: str) -> NoReturn:
        """End this process, whatever it is doing. Without rank 0, rank 1 prints the reason."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            if self._ranks.rank < 2:
                line = f"{self._command}: error: {one_line(reason)}, so all others end, too\n"
                os.write(self._stderr, line.encode())
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(_FAILED + reason.encode()[-_LONGEST:])
        os._exit(2)


def _address() -> str:
    """Return the address at which the other ranks reach rank 0.

    `mlx.launch` tells each rank the addresses of all, in a file or as that of a coordinator.
    """
    if file := os.environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(file).read_text())[0][0]).rpartition(":")[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return socket.gethostname()


def _accept(ranks: Ranks) -> dict[int, socket.socket]:
    """Accept the connections of all other ranks, which show a secret that only they know."""
    listener, failure = None, ""
    try:
        listener = socket.create_server((_address(), 0))
        listener.settimeout(_CONNECT_TIME)
    except OSError as error:
        failure = one_line(error)
    address = None if listener is None else (_address(), listener.getsockname()[1])
    secret = secrets.token_bytes(16)
    ranks.share((address, secret))
    if listener is None:
        raise OSError(f"the other ranks cannot connect to rank 0: {failure}")
    connections: dict[int, socket.socket] = {}
    with listener:
        while len(connections) < ranks.size - 1:
            try:
                connection, _ = listener.accept()
                connection.settimeout(_INTERVAL)
                hello = connection.recv(len(secret) + 4, socket.MSG_WAITALL)
            except TimeoutError as error:
                raise OSError("another rank did not connect to rank 0") from error
            if hello[:-4] != secret:
                connection.close()
                continue
            connections[int.from_bytes(hello[-4:], "big")] = _kept_alive(connection)
    return connections


def _connect(ranks: Ranks) -> socket.socket:
    """Connect to rank 0."""
    address, secret = ranks.share(_nothing())
    if address is None:
        raise OSError("this rank cannot connect to rank 0")
    connection = socket.create_connection(tuple(address), _CONNECT_TIME)
    connection.sendall(secret + ranks.rank.to_bytes(4, "big"))
    return _kept_alive(connection)


def _nothing() -> Any:
    """Return what a rank gives that only receives."""
    return None


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Have the system end a connection whose other side does not answer any more."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
    for option, value in (
        (idle, _INTERVAL),
        (getattr(socket, "TCP_KEEPINTVL", None), _INTERVAL),
        (getattr(socket, "TCP_KEEPCNT", None), _MISSED),
    ):
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
