"""Several local processes on MLX's ring backend, against one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import glass_mlx.streaming
from glass_mlx import Session
from helpers import save_chat_folder
from rank_cases import PROMPT, TOKENS, WHOLE_TOKENS, Case, build, calibrated, generated, whole_prior

import mlx.core as mx
import numpy as np
import pytest
from compare_parts import SelectorInParts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not mx.distributed.is_available("ring"), reason="this MLX has no ring backend"
    ),
]

ROOT = Path(__file__).parents[1]
CASES = {
    2: [
        Case("llama", is_thorough=True),
        Case("llama", bits=4),
        Case("deepseek_v3"),
        Case("gpt_oss"),
        Case("qwen2", pipeline=True),
        Case("qwen3_moe", pipeline=True),
    ],
    4: [
        Case("qwen3"),
        Case("qwen2", pipeline=True, changes={"num_hidden_layers": 4, "layer_types": None}),
    ],
}


# An input that never ends. `mlx.launch` polls one that has ended in a busy loop, and an interrupt
# there can leave a lock held, so that the run never ends.
NO_INPUT, _writer = os.pipe()


def start(ranks, *arguments, **environment):
    """Start a Python program on several ranks, and return the process of `mlx.launch`."""
    paths = [ROOT, ROOT / "tests"]
    variables = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    program = "from mlx._distributed_utils.launch import main; main()"  # that of mlx.launch
    command = [sys.executable, "-c", program, "--backend", "ring"]
    command += ["-n", str(ranks), "--python", sys.executable]
    for name, value in (variables | environment).items():
        command += ["--env", f"{name}={value}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=NO_INPUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(*arguments, **environment):
    """Run a Python program on several ranks, and return what they print; see `start`."""
    return finish(start(*arguments, **environment))


def finish(process):
    """Wait for a run's end, and return what its ranks print."""
    try:
        return process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
        raise


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all cases; return what each rank computed, by number of ranks and case."""
    found = {}
    for ranks, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        listed = json.dumps([asdict(case) for case in cases])
        out, err = launch(ranks, ROOT / "tests" / "rank_worker.py", folder, listed)
        files = [folder / f"{case.name}-{r}.npz" for case in cases for r in range(ranks)]
        assert all(file.exists() for file in files), out + err
        for case in cases:
            found[ranks, case.name] = [
                dict(np.load(folder / f"{case.name}-{r}.npz")) for r in range(ranks)
            ]
    return found


EACH = [pytest.param(n, case, id=f"{n}-{case.name}") for n in CASES for case in CASES[n]]


@pytest.mark.parametrize(("ranks", "case"), EACH)
def test_ranks_agree_and_repeat_themselves(results, ranks, case):
    first, *others = results[ranks, case.name]
    assert len(first["tokens"]) == TOKENS
    if case.is_thorough:
        np.testing.assert_array_equal(first["again"], first["tokens"])
    np.testing.assert_array_equal(first["whole"], first["dense"])  # density 1
    for part in (first, *others):
        np.testing.assert_array_equal(part["exact"], part["exact_dense"])
    for other in others:
        for name in ("tokens", "logprobs", "dense", "whole"):
            np.testing.assert_array_equal(other[name], first[name])


@pytest.mark.parametrize(("ranks", "case"), EACH)
def test_sliced_text_is_that_of_one_process_with_the_same_rule(results, ranks, case, monkeypatch):
    """Tensor-parallel, the rule is that each rank chooses among its neurons."""
    if not case.pipeline:
        make = glass_mlx.streaming.make_selector
        monkeypatch.setattr(
            "glass_mlx.streaming.make_selector",
            lambda *args: SelectorInParts(make(*args), ranks),
        )
    tokens, logprobs, kept = generated(Session(build(case)), case)
    found = results[ranks, case.name]
    np.testing.assert_array_equal(found[0]["tokens"], tokens)
    np.testing.assert_allclose(found[0]["logprobs"], logprobs, atol=1e-3)
    for path, indices in kept.items():
        parts = [part[f"kept {path}"] for part in found if f"kept {path}" in part]
        if not case.pipeline:
            width = whole_prior(case).scores["griffin"][path].shape[-1] // ranks
            assert len({part.shape for part in parts}) == 1
            parts = [np.concatenate([p + n * width for n, p in enumerate(parts)], axis=-1)]
        (together,) = parts
        np.testing.assert_array_equal(together, indices)


@pytest.mark.parametrize(("ranks", "case"), EACH)
def test_slicing_sends_little_more(results, ranks, case):
    """Of an observed token, a rank sends one number per FFN beside what dense decoding sends."""
    for part in results[ranks, case.name]:
        per_token = part["dense_bytes"] / (len(PROMPT) + WHOLE_TOKENS)
        dense = per_token * (len(PROMPT) + TOKENS)
        assert dense < part["bytes"] < 1.02 * dense


def test_a_prior_is_that_of_one_process(results):
    case = CASES[2][0]
    alone = calibrated(build(case))
    for part in results[2, case.name]:
        for path, scores in alone.scores["griffin"].items():
            np.testing.assert_allclose(part[f"prior {path}"], scores, rtol=1e-3, atol=1e-5)
            sample = alone.fingerprint.samples[path]
            np.testing.assert_allclose(part[f"sample {path}"], sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "way", "sentence"),
    [
        (1, "kill", "glass-mlx: error: rank 1 has ended, so all others end, too"),
        (0, "kill", "glass-mlx: error: rank 0 has ended, so all others end, too"),
        (1, "error", "rank 1 has failed: the disk of this machine is full"),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_a_sentence(rank, way, sentence):
    out, err = launch(2, ROOT / "tests" / "rank_death.py", rank, way)
    assert out == "rank 0\n"  # the others print nothing
    assert err.count("error: rank") == 1
    assert sentence in err
    assert "Traceback" not in err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    return save_chat_folder(tmp_path / "tiny")


def test_a_command_prints_once(folder):
    arguments = ["--prompt", "丁七丄丅丆", "--max-tokens", 4, "--density", 0.5, "--warmup", 1]
    out, err = launch(2, "-m", "glass_mlx.generate", "--model", folder, *arguments)
    assert out.count("=" * 10) == 2
    assert "density 0.500" in out
    assert err.count("prior: using") == 1


def test_a_server_answers_after_a_client_has_left_and_ends_with_an_interrupt(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--model", folder, "--port", url.rpartition(":")[2], "--density", 0.5]
    process = start(2, "-m", "glass_mlx.server", *arguments)
    try:
        wait_until_healthy(url)
        first = complete(url, 12)
        with suppress(TimeoutError):  # this client leaves in the middle of an answer
            complete(url, 4000, timeout=2)
        again = complete(url, 12)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        _, err = finish(process)
    assert len(first["choices"][0]["text"]) == 12
    assert again["choices"] == first["choices"]
    assert err.count("serving") == 1
    assert "glass_mlx/" not in err  # no traceback, but perhaps that of mlx.launch itself
    assert "error: rank" not in err


def wait_until_healthy(url):
    for _ in range(200):
        with suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
            assert answer.status == 200
            return
        time.sleep(0.5)
    raise TimeoutError("the server does not answer")


def complete(url, tokens, timeout=100):
    """Return the server's completion of a prompt."""
    body = {"prompt": "丁七丄丅丆", "max_tokens": tokens, "temperature": 1, "seed": 3}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)
