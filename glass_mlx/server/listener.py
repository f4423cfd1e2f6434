"""The socket that a server listens on, with a bounded number of connections."""

import json
import logging
import socket
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from socketserver import BaseRequestHandler
from threading import Semaphore
from typing import Any, cast

from glass_mlx.server.errors import RETRY_AFTER, RequestError

# Connections beside those that wait for an answer, such as those that are about to send a request.
_SPARE_CONNECTIONS = 64


class Listener(ThreadingHTTPServer):
    """Listens on an address. The port is taken at once, but answers only after `server_activate`.

    Args:
        host: the name or address to listen on.
        port: the port; 0 for any.
        max_waiting: the number of requests that may wait for their answers.

    Raises:
        OSError: if it cannot listen there.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, max_waiting: int) -> None:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise OSError(f"--host {host} is not an address of this machine: {error}") from error
        self.address_family, _, _, _, address = infos[0]
        self._slots = Semaphore(max_waiting + _SPARE_CONNECTIONS)
        super().__init__(cast(Any, address), BaseRequestHandler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error

    def handle_with(self, handler: Callable[..., Any]) -> None:
        """Set what makes the handler of a connection."""
        self.RequestHandlerClass = handler

    @property
    def url(self) -> str:
        """The address for a browser."""
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{name}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, or refuse it if there are too many."""
        if not self._slots.acquire(blocking=False):
            _refuse(request)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error that a handler did not expect."""
        logging.debug("a connection failed", exc_info=True)


def _refuse(connection: socket.socket) -> None:
    """Tell a client that there are too many connections."""
    error = RequestError(503, "there are too many connections; try again later")
    data = json.dumps(error.body).encode()
    head = (
        "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: {RETRY_AFTER}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    try:
        connection.settimeout(0.2)
        connection.recv(65536)
        connection.sendall(head.encode() + data)
    except OSError:
        pass
