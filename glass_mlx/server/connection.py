"""Connections whose clients are slow, silent or gone."""

import io
import select
import socket
import time


class DeadlineReader(io.RawIOBase):
    """Reads a request from a connection, as long as there is time.

    A time limit for each read alone would let a client send one byte at a time for ever.

    Args:
        connection: the connection.
        seconds: how much time there is for all reads together.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        super().__init__()
        self._connection, self._deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what has come; raise TimeoutError once there is no time left."""
        limit = self._connection.gettimeout()
        self._connection.settimeout(max(0.001, self._deadline - time.monotonic()))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(limit)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection, without reading from it."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLHUP | select.POLLERR)
    if not poll.poll(0):
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def drain(connection: socket.socket, seconds: float, limit: int) -> None:
    """Read what a client still sends, so that it gets its answer before the connection closes.

    Closing a connection with unread data discards what was sent, too.

    Args:
        connection: the connection.
        seconds: how long to read at most.
        limit: how many bytes to read at most.
    """
    deadline = time.monotonic() + seconds
    try:
        connection.shutdown(socket.SHUT_WR)
        while limit > 0 and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            data = connection.recv(65536)
            if not data:
                return
            limit -= len(data)
    except OSError:
        pass
