"""Fixtures: the real built-in model, loaded once."""

from pathlib import Path

from glass_mlx.checkpoints import builtin_gguf, load

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    return builtin_gguf()


@pytest.fixture(scope="session")
def default_model(default_gguf: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """The built-in model in float32, on which tests are fast on a CPU."""
    return load(dtype="float32", dequantize=True)


@pytest.fixture(scope="session")
def quantized_model(default_gguf: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """The built-in model with its 4-bit weights."""
    return load(dtype="float32")
