"""Servers of a tiny random model, in this process."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

from glass_mlx.server.__main__ import setup_arg_parser, start
from helpers import save_chat_folder

import mlx_lm.server
import pytest

if not hasattr(mlx_lm.server, "TextStateMachine"):  # the server needs mlx-lm 0.32
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the folder of a tiny model with a prior and a chat template."""
    return save_chat_folder(tmp_path_factory.mktemp("served") / "tiny")


@contextmanager
def running(folder, *flags):
    """Run a server on any free port, with the built-in model if there is no folder."""
    arguments = ["--port", "0", *map(str, flags)]
    if folder is not None:
        arguments += ["--model", str(folder)]
    listener, generator = start(setup_arg_parser().parse_args(arguments))
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield SimpleNamespace(
            address=listener.server_address, url=listener.url, generator=generator
        )
    finally:
        listener.shutdown()
        listener.server_close()
        generator.stop_and_join()
        thread.join()


@pytest.fixture(scope="session")
def server(folder):
    with running(folder) as server:
        yield server


@pytest.fixture(scope="session")
def run_server():
    return running
