"""The server on raw sockets: what no client library sends, and clients that leave."""

import json
import socket
import threading
import time

from glass_mlx.server import generation, handler
from helpers import save_chat_folder
from raw_http import (
    connect,
    error_of,
    exchange,
    parse,
    receive,
    request_bytes,
    reset,
    wait_until,
)

import pytest

CHAT = {"messages": [{"role": "user", "content": "丁七丄"}], "max_tokens": 3}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request_bytes(b"{"), 400),
        (request_bytes(b"\xff\xff"), 400),
        (request_bytes(b"[" * 100_000), 400),
        (request_bytes({"messages": "a"}), 400),
        (request_bytes(CHAT, length=-1), 400),
        (request_bytes(CHAT, length="1e3"), 400),
        (request_bytes(CHAT, length="９"), 400),
        (request_bytes(CHAT, length=10**30), 413),
        (request_bytes(CHAT, length=4_000_001), 413),
        (b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (request_bytes(CHAT, "/v1/embeddings"), 404),
        (request_bytes(CHAT, "/v1/chat/completions/../../etc/passwd"), 404),
        (request_bytes(b"", "/nothing", "GET"), 404),
        (request_bytes(b"", "/../page.html", "GET"), 404),
        (request_bytes(b"", "//page.html", "GET"), 404),
        (request_bytes(b"", "/v1/models/..%2f..%2fetc", "GET"), 404),
        (request_bytes(b"", "/", "DELETE"), 501),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / " + b"x" * 100_000 + b"\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_what_is_not_a_good_request_gets_an_error_of_the_api(server, data, status):
    found, headers, body = exchange(server.address, data)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert error_of(body)["message"]
    assert exchange(server.address, request_bytes(CHAT))[0] == 200


def test_a_large_request_is_answered_before_it_is_sent_whole(server):
    with connect(server.address) as connection:
        connection.sendall(request_bytes(b"", length=10_000_000))
        for _ in range(10):
            connection.sendall(b"x" * 1_000_000)
        status, _, body = parse(receive(connection))
    assert status == 413
    assert error_of(body)["message"] == "the request's body is larger than 4000000 bytes"


def test_the_largest_request_is_read(server):
    message = {"role": "user", "content": "丁"}
    padding = "x" * (4_000_000 - len(json.dumps({"messages": [message], "user": ""})))
    data = request_bytes({"messages": [message], "user": padding, "temperature": -1})
    assert exchange(server.address, data)[0] == 413
    data = request_bytes({"messages": [message], "user": padding})
    assert exchange(server.address, data)[0] == 200


def test_the_health_and_the_page_are_served(server):
    status, _, body = exchange(server.address, request_bytes(b"", "/health", "GET"))
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    status, headers, body = exchange(server.address, request_bytes(b"", "/?theme=dark", "GET"))
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"<!doctype html>" in body.lower()
    status, headers, body = exchange(server.address, request_bytes(b"", "/", "HEAD"))
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


def test_other_pages_may_use_the_server_as_far_as_allowed(run_server, folder, server):
    request = request_bytes(b"", "/v1/models", "OPTIONS", headers="Origin: http://a.test\r\n")
    assert exchange(server.address, request)[1]["access-control-allow-origin"] == "*"
    with run_server(folder, "--allowed-origins", "http://b.test") as other:
        assert "access-control-allow-origin" not in exchange(other.address, request)[1]
        request = request.replace(b"a.test", b"b.test")
        allowed = exchange(other.address, request)[1]["access-control-allow-origin"]
        assert allowed == "http://b.test"


def test_a_slow_client_is_given_up(server, monkeypatch):
    monkeypatch.setattr(handler, "_READ_TIME", 0.4)
    request = request_bytes(CHAT)
    with connect(server.address) as connection:
        connection.sendall(request[:-5])
        status, _, body = parse(receive(connection))
        assert status == 408
        assert "took more than 0.4 s" in error_of(body)["message"]
    with connect(server.address) as connection:  # a byte now and then does not help
        try:
            for byte in request:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            data = receive(connection)
        except OSError:
            data = b""
        assert data == b"" or parse(data)[0] == 408
    assert exchange(server.address, request)[0] == 200


def test_a_request_may_come_in_pieces(server):
    with connect(server.address) as connection:
        for byte in request_bytes(CHAT):
            connection.sendall(bytes([byte]))
        assert parse(receive(connection))[0] == 200


def test_a_body_that_ends_too_early_is_refused(server):
    with connect(server.address) as connection:
        connection.sendall(request_bytes(CHAT)[:-5])
        connection.shutdown(socket.SHUT_WR)
        status, _, body = parse(receive(connection))
    assert status == 400
    assert "shorter than the header Content-Length says" in error_of(body)["message"]


@pytest.fixture
def generated(monkeypatch):
    """Record the tokens that are generated, slowly."""
    numbers = []
    original = generation.stream_generate

    def slow(*args, **options):
        def responses():
            stream = original(*args, **options)
            try:
                for response in stream:
                    numbers.append(response.generation_tokens)
                    time.sleep(0.01)
                    yield response
            finally:
                stream.close()

        return responses()

    monkeypatch.setattr(generation, "stream_generate", slow)
    return numbers


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(server, generated, stream, leave):
    with connect(server.address) as connection:
        body = CHAT | {"max_tokens": 100_000, "stream": stream}
        connection.sendall(request_bytes(body))
        assert wait_until(lambda: len(generated) >= 5)
        leave(connection)
    count = len(generated)
    assert exchange(server.address, request_bytes(CHAT | {"max_tokens": 1}))[0] == 200
    assert generated[-1] == 1
    assert len(generated) - count < 8


def test_a_client_that_leaves_the_queue_is_not_served(server, generated):
    with connect(server.address) as first, connect(server.address) as second:
        first.sendall(request_bytes(CHAT | {"max_tokens": 60}))
        assert wait_until(lambda: generated)
        second.sendall(request_bytes(CHAT | {"max_tokens": 1000}))
        assert wait_until(lambda: server.generator.requests.qsize() == 1)
        second.close()
        assert wait_until(lambda: server.generator.requests.qsize() == 0)
        assert generated[-1] < 60
        assert parse(receive(first))[0] == 200
    assert max(generated) == 60


def test_a_client_that_leaves_before_the_prompt_is_read_is_not_served(
    server, generated, monkeypatch
):
    begun, gone = threading.Event(), threading.Event()
    original = server.generator._encode

    def wait(*args):
        begun.set()
        gone.wait(10)
        time.sleep(0.5)  # until the handler has noticed
        return original(*args)

    monkeypatch.setattr(server.generator, "_encode", wait)
    with connect(server.address) as connection:
        connection.sendall(request_bytes(CHAT | {"max_tokens": 1000}))
        assert begun.wait(10)
    gone.set()
    assert exchange(server.address, request_bytes(CHAT | {"max_tokens": 1}))[0] == 200
    assert generated == [1]


def test_too_many_waiting_requests_are_told_to_come_back(run_server, folder, generated):
    with run_server(folder, "--max-waiting", 2) as server:
        answers = []

        def ask():
            answers.append(exchange(server.address, request_bytes(CHAT | {"max_tokens": 40})))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted({status for status, _, _ in answers}) == [200, 503]
    assert sum(status == 200 for status, _, _ in answers) >= 3
    for status, headers, body in answers:
        if status == 503:
            assert int(headers["retry-after"]) > 0
            assert error_of(body)["message"] == "2 requests are waiting already; try again later"


def test_too_many_connections_are_refused(run_server, folder):
    with run_server(folder, "--max-waiting", 1) as server:
        idle = [connect(server.address) for _ in range(65)]
        time.sleep(0.2)
        status, headers, body = exchange(server.address, request_bytes(CHAT))
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert "too many connections" in error_of(body)["message"]
        for connection in idle:
            connection.close()
        assert wait_until(lambda: exchange(server.address, request_bytes(CHAT))[0] == 200)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_failure_is_an_error_of_the_server(server, monkeypatch, caplog, tokens):
    original = generation.stream_generate

    def fail(*args, **options):
        def responses():
            stream = original(*args, **options)
            for _ in range(tokens):
                yield next(stream)
            stream.close()
            raise RuntimeError("a secret path")

        return responses()

    monkeypatch.setattr(generation, "stream_generate", fail)
    status, _, body = exchange(server.address, request_bytes(CHAT | {"max_tokens": 9}))
    assert status == 500
    assert error_of(body)["type"] == "server_error"
    assert b"secret" not in body
    assert "a secret path" in caplog.text
    stream = CHAT | {"max_tokens": 9, "stream": True}
    status, _, body = exchange(server.address, request_bytes(stream))
    assert status == 200  # was sent before
    assert error_of(body.split(b"data: ")[-1])["type"] == "server_error"
    assert b"secret" not in body
    monkeypatch.undo()
    assert exchange(server.address, request_bytes(CHAT))[0] == 200


def test_an_error_in_the_middle_leaves_no_cache_behind(server, monkeypatch):
    """The contents of a cache are unknown after an error."""
    from glass_mlx.engine import Generation

    original = Generation._slice_neurons
    body = CHAT | {"max_tokens": 30, "glass": {"density": 0.5}}
    expected = json.loads(exchange(server.address, request_bytes(body))[2])["choices"]

    def fail(self):
        raise RuntimeError

    monkeypatch.setattr(Generation, "_slice_neurons", fail)
    assert exchange(server.address, request_bytes(body))[0] == 500
    monkeypatch.setattr(Generation, "_slice_neurons", original)
    assert json.loads(exchange(server.address, request_bytes(body))[2])["choices"] == expected


def test_a_bound_whose_cost_was_not_measured_is_refused(run_server, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    folder = save_chat_folder(tmp_path / "tiny")
    (folder / "glass_prior.safetensors").unlink()
    with run_server(folder) as server:
        assert exchange(server.address, request_bytes(CHAT))[0] == 200
        body = request_bytes(CHAT | {"glass": {"max_kl": 0.5}})
        status, _, answer = exchange(server.address, body)
        assert status == 400
        assert "this server has not measured what slicing costs" in answer.decode()
        body = request_bytes(CHAT | {"glass": {"density": 0.5}})
        assert exchange(server.address, body)[0] == 200
    assert not (tmp_path / "cache").exists()
