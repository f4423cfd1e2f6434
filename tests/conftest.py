"""Shared fixtures: the built-in model, loaded once, and a runner for commands."""

import io
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from glass_mlx.calibration import first_use
from glass_mlx.checkpoints.builtin import builtin_gguf
from glass_mlx.checkpoints.loading import load
from glass_mlx.models.architectures import tiny_model
from helpers import letter_tokenizer

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Background jobs of a shell ignore SIGINT, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
def tokenizer() -> TokenizerWrapper:
    """Return a tokenizer for `tiny_model` without an end-of-sequence token."""
    return TokenizerWrapper(letter_tokenizer())


@pytest.fixture(autouse=True)
def short_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let first uses measure curves on few texts, which takes seconds instead of a minute."""
    monkeypatch.setattr(first_use, "SMALL", replace(first_use.SMALL, curve_texts=3))


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


@pytest.fixture
def working_olmo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair mlx-lm's olmo, which adds the word "causal" to the scores of more than one token."""
    tiny_model("olmo")  # imports the module

    def additive_mask(x: mx.array, cache: Any) -> mx.array | None:
        allowed = create_causal_mask(x.shape[1], 0 if cache is None else cache.offset)
        return None if x.shape[1] == 1 else mx.where(allowed, 0.0, -1e9)

    monkeypatch.setattr("mlx_lm.models.olmo.create_attention_mask", additive_mask)
