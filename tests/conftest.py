"""Shared fixtures: the built-in model, loaded once, and a runner for commands."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from glass_mlx.checkpoints.builtin import builtin_gguf
from glass_mlx.checkpoints.loading import load

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    return builtin_gguf()


@pytest.fixture(scope="session")
def default_model(default_gguf: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the built-in model in float32, which is fast on a CPU."""
    return load(dtype="float32", dequantize=True)


@pytest.fixture(scope="session")
def quantized_model(default_gguf: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the built-in model with its 4-bit weights."""
    return load(dtype="float32")


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command and returns its exit code, stdout and stderr."""

    def run(
        main: Callable[[], None], *arguments: object, stdin: str = "", program: str = "glass-mlx"
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
