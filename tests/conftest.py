"""Fixtures: the real built-in model, loaded once."""

import glass_mlx  # noqa: F401, I001  (first: it puts OpenBLAS in front of MLX's BLAS)

from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from glass_mlx.checkpoints import builtin_gguf, load


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
