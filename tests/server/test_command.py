"""The server command: its flags, its start and its end."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

from glass_mlx import load, stream_generate
from glass_mlx.models.architectures import configuration, tiny_model
from glass_mlx.server import generation
from glass_mlx.server.__main__ import main, setup_arg_parser
from helpers import letter_tokenizer, prior_with_curves, save_tiny_folder
from raw_http import exchange, request_bytes

import mlx.core as mx
import mlx_lm.server
import pytest
from mlx.utils import tree_flatten

PROMPT = {"prompt": "丁七丄", "max_tokens": 40}


def ask(server, **fields):
    """Return the answer to a text completion."""
    data = request_bytes(PROMPT | fields, "/v1/completions")
    status, _, body = exchange(server.address, data)
    assert status == 200, body
    return json.loads(body)


def server_command(model, port):
    """Return the command that serves a model with a bound on KL."""
    flags = ["--model", str(model), "--port", str(port), "--max-kl", "1"]
    return [sys.executable, "-m", "glass_mlx.server", *flags]


@pytest.fixture
def command(run_command, folder):
    return partial(run_command, main, "--model", folder, "--port", 0)


def test_every_flag_of_mlx_lm_is_accepted(monkeypatch):
    class ParserError(Exception):
        pass

    def show(parser, *_):
        raise ParserError({*parser._option_string_actions})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", show)
    with pytest.raises(ParserError) as flags:
        mlx_lm.server.main()
    assert flags.value.args[0] <= {*setup_arg_parser()._option_string_actions}
    assert "--decode-concurrency" in flags.value.args[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft-model", "./missing"], "there is no model at ./missing"),
        (["--num-draft-tokens", -1], "--num-draft-tokens must be at least 0"),
        (["--pipeline"], "--pipeline needs several machines"),
        (["--release-dense"], "--release-dense is of no use here"),
        (["--kv-bits", 8, "--max-kv-size", 8], "--kv-bits cannot be combined with --max-kv-size"),
        (["--kv-bits", 8], "cannot be quantized to 8 bits in groups of 64"),
        (["--kv-bits", 7], "--kv-bits must be one of"),
        (["--port", 99999], "--port must be from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "is not an address of this machine"),
        (["--max-waiting", 0], "--max-waiting must be at least 1"),
        (["--max-request-bytes", "much"], "'much' is not a size such as 4MB"),
        (["--max-tokens", 0], "--max-tokens must be at least 1"),
        (["--temp", -1], "--temp must be at least 0"),
        (["--chat-template-args", "[1]"], "it must be a JSON object"),
        (["--chat-template-args", "{"], "it is not JSON"),
        (["--density", 2], "the density must be above 0"),
        (["--prior", "missing"], "there is no prior at missing"),
        (["--model", "./missing"], "there is no model at ./missing"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(command, flags, message):
    code, out, err = command(*flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("glass-mlx: error: ")
    assert "Traceback" not in err


def test_a_port_in_use_is_reported_before_the_model_is_loaded(command, monkeypatch):
    monkeypatch.setattr("glass_mlx.server.provider.load", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in err


def test_the_flags_decide_what_is_kept(run_server, folder):
    model = load(str(folder))
    with run_server(folder, "--density", 0.25, "--refresh", 8, "--max-tokens", 30) as server:
        answer = ask(server, max_tokens=None)
        options = {"density": 0.25, "refresh": 8}
        tokens = model[1].encode(PROMPT["prompt"])
        expected = "".join(r.text for r in stream_generate(*model, tokens, 30, **options))
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["glass"]["density"] == 0.25
        data = request_bytes(PROMPT | {"glass": {"max_kl": 0.1}}, "/v1/completions")
        status, _, body = exchange(server.address, data)
        assert status == 400
        assert b"has not measured what slicing costs" in body
    with run_server(folder, "--dense") as server:
        assert ask(server)["usage"]["glass"]["bytes_share"] == 1


def test_the_cache_can_have_a_maximum_size(run_server, folder, monkeypatch):
    caches = []

    def record(*args, **options):
        caches.append(options["prompt_cache"])
        return stream_generate(*args, **options)

    monkeypatch.setattr(generation, "stream_generate", record)
    model = load(str(folder))
    with run_server(folder, "--max-kv-size", 16) as server:
        tokens = model[1].encode(PROMPT["prompt"])
        expected = "".join(r.text for r in stream_generate(*model, tokens, 40, max_kv_size=16))
        for _ in range(2):
            assert ask(server)["choices"][0]["text"] == expected
    assert {layer.max_size for cache in caches for layer in cache} == {16}


def test_the_cache_can_be_quantized(run_server, tmp_path):
    """mlx-lm has no kernels for quantized caches with heads of 16 values."""
    overrides = {"hidden_size": 128, "head_dim": 32}
    folder, model = tmp_path / "wide", tiny_model("llama", **overrides)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(configuration("llama") | overrides))
    letter_tokenizer().save_pretrained(folder)
    prior_with_curves(model).save(folder / "glass_prior.safetensors")
    flags = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    arguments = [a for name, value in flags.items() for a in (f"--{name.replace('_', '-')}", value)]
    loaded = load(str(folder))
    tokens = loaded[1].encode(PROMPT["prompt"])
    expected = "".join(r.text for r in stream_generate(*loaded, tokens, 40, **flags))
    with run_server(folder, *arguments) as server:
        for cached in (0, len(tokens) - 1):
            answer = ask(server)
            assert answer["choices"][0]["text"] == expected
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


def test_a_prior_is_measured_before_the_port_answers(folder, tmp_path):
    """Run the command as users do."""
    model = save_tiny_folder(tmp_path / "new")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        server_command(model, port),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GLASS_MLX_CACHE": str(tmp_path / "cache")},
    )
    lines = []
    try:
        while not lines or not lines[-1].startswith("serving "):
            line = process.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
            if "Measuring a small one once" in line:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
        assert lines[-1] == f"serving new at http://127.0.0.1:{port}\n"
        assert any("Measuring a small one once" in line for line in lines)
        assert list((tmp_path / "cache/priors").iterdir())
        status, _, _ = exchange(("127.0.0.1", port), request_bytes(PROMPT, "/v1/completions"))
        assert status == 200
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 0
        assert "Traceback" not in "".join(lines) + rest
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_while_a_prior_is_measured_is_quiet(tmp_path):
    model = save_tiny_folder(tmp_path / "new")
    process = subprocess.Popen(
        server_command(model, 0),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GLASS_MLX_CACHE": str(tmp_path / "cache")},
    )
    try:
        while "Measuring" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
