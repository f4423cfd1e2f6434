"""Requests over raw sockets, which need not be what a client library would send."""

import json
import socket
import struct
import time


def request_bytes(body, path="/v1/chat/completions", method="POST", length=None, headers=""):
    """Return an HTTP request; the body is bytes, or an object for JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(data) if length is None else length
    first = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    return f"{first}Content-Length: {length}\r\n{headers}\r\n".encode() + data


def connect(address, timeout=20):
    """Return a connection to a server."""
    return socket.create_connection(address[:2], timeout=timeout)


def receive(connection):
    """Return everything that comes until the server closes the connection."""
    data = b""
    while block := connection.recv(65536):
        data += block
    return data


def exchange(address, data):
    """Send bytes; return the status, the headers in lower case and the body of the answer."""
    with connect(address) as connection:
        connection.sendall(data)
        return parse(receive(connection))


def parse(data):
    """Split an answer into its status, headers and body."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


def error_of(body):
    """Return the error in an answer, which must have the form of OpenAI's API."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert "\n" not in error["message"]
    return error


def reset(connection):
    """Close a connection at once, as a client that crashes does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def wait_until(condition):
    """Wait for a condition for at most ten seconds; return whether it came true."""
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False
