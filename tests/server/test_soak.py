"""A thousand requests from eight clients at once, good and bad."""

import gc
import json
import random
import threading
from pathlib import Path

from glass_mlx.server import handler
from raw_http import connect, error_of, exchange, parse, receive, request_bytes, reset

import mlx.core as mx
import pytest

REQUESTS, CLIENTS = 1000, 8

GLASS = [{}, {"density": 0.5}, {"max_kl": 1.0}, {"dense": True}, {"density": 0.25, "trace": True}]


def valid_requests():
    """Return good requests, whose answers are determined."""
    texts = ["丁七丄", "丗丘丙", "世丠並", "両丢丣丞", "丨丫丬"]
    chats = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "glass": glass})
        for text in texts
        for glass in GLASS
    ]
    seeded = [("/v1/completions", {"prompt": t, "temperature": 1.0, "seed": 7}) for t in texts]
    stopped = [("/v1/completions", {"prompt": t, "stop": ["丁", "上"]}) for t in texts]
    streamed = [(path, body | {"stream": True}) for path, body in chats]
    return [(p, b | {"max_tokens": 22}) for p, b in chats + seeded + stopped + streamed]


BAD = [
    request_bytes(b"{"),
    request_bytes(b"\xff\xfe"),
    request_bytes(b"[" * 50_000),
    request_bytes(b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}"),
    request_bytes(b"x" * 5_000_000),
    request_bytes({"messages": 1}),
    request_bytes({"messages": [{"role": "user", "content": {}}]}),
    request_bytes({"messages": [{"role": "user", "content": "丁"}], "temperature": "hot"}),
    request_bytes({"messages": [{"role": "user", "content": "丁"}], "max_tokens": -1}),
    request_bytes({"messages": [{"role": "user", "content": "丁"}], "model": "../../etc/passwd"}),
    request_bytes({"messages": [{"role": "user", "content": "丁"}], "model": "/etc"}),
    request_bytes({"messages": [{"role": "user", "content": "丁"}], "glass": {"density": -1}}),
    request_bytes({"prompt": [10**9]}, "/v1/completions"),
    request_bytes({"prompt": "\ud800"}, "/v1/completions"),
    request_bytes({"prompt": "丁", "logit_bias": {"-5": 1}}, "/v1/completions"),
    request_bytes({}, "/v1/nothing"),
    request_bytes({}, length=10**12),
    b"POST /v1/completions HTTP/1.1\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
]


def text_in(body):
    """Return the text of an answer, streamed or not."""
    if not body.startswith(b"data: ") and not body.startswith(b": "):
        (choice,) = json.loads(body)["choices"]
        return choice.get("text") or (choice.get("message") or {}).get("content") or ""
    assert body.endswith(b"data: [DONE]\n\n")
    events = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def memory():
    """Return the memory of this process, and that of MLX's arrays, in bytes."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return resident, mx.get_active_memory()


class Client:
    """Sends one request after the other, and counts what comes of them."""

    def __init__(self, address, expected, pending, seed):
        self.address, self.expected, self.pending = address, expected, pending
        self.random, self.outcomes, self.failures = random.Random(seed), [], []

    def run(self):
        while True:
            try:
                number = next(self.pending)
            except StopIteration:
                return
            try:
                self.outcomes.append(self.send(number))
            except Exception as error:
                self.failures.append((number, repr(error)))

    def send(self, number):
        kind = self.random.choices(["valid", "bad", "leaves", "silent"], [60, 30, 8, 2])[0]
        if kind == "bad":
            status, _, body = exchange(self.address, self.random.choice(BAD))
            assert 400 <= status < 500, (status, body)
            error_of(body)
            return kind
        path, request = self.random.choice([*self.expected])
        data = request_bytes(request, path)
        if kind == "valid":
            status, _, body = exchange(self.address, data)
            assert status == 200, (status, body)
            assert text_in(body) == self.expected[path, request], request
            return kind
        with connect(self.address) as connection:
            if kind == "silent":
                connection.sendall(data[: self.random.randrange(len(data))])
                answer = receive(connection)
                assert not answer or parse(answer)[0] == 408
            else:
                connection.sendall(data)
                if self.random.random() < 0.5:
                    connection.recv(1)
                self.random.choice([reset, lambda c: c.close()])(connection)
        return kind


class Numbers:
    """An iterator that threads can share."""

    def __init__(self, count):
        self._numbers, self._lock = iter(range(count)), threading.Lock()

    def __next__(self):
        with self._lock:
            return next(self._numbers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_requests_from_eight_clients(run_server, folder, monkeypatch):
    monkeypatch.setattr(handler, "_READ_TIME", 1.0)
    with run_server(folder) as server:
        expected = {}
        for path, body in valid_requests():
            status, _, answer = exchange(server.address, request_bytes(body, path))
            assert status == 200
            expected[path, json.dumps(body).encode()] = text_in(answer)
        assert len({*expected.values()}) > 20

        def soak(count, seed):
            pending = Numbers(count)
            clients = [Client(server.address, expected, pending, seed + n) for n in range(CLIENTS)]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [failure for client in clients for failure in client.failures] == []
            outcomes = [outcome for client in clients for outcome in client.outcomes]
            assert len(outcomes) == count
            return outcomes

        soak(200, seed=0)
        before = memory()
        outcomes = soak(REQUESTS - 200, seed=100)
        after = memory()
        assert {*outcomes} == {"valid", "bad", "leaves", "silent"}
        assert after[0] - before[0] < 30e6
        assert after[1] - before[1] < 5e6
        assert server.generator.requests.qsize() == 0
        for path, body in valid_requests():  # and it answers as before
            status, _, answer = exchange(server.address, request_bytes(body, path))
            assert text_in(answer) == expected[path, json.dumps(body).encode()]
