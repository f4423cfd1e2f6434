"""Repacked GGUF blocks, compared with the gguf package."""

from glass_mlx.checkpoints.gguf_blocks import AFFINE_FORMATS, repack

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

ROWS, COLUMNS = 6, 512


def random_tensor(kind: GGMLQuantizationType) -> np.ndarray:
    """Return random blocks whose half-precision scales have a realistic size."""
    generator = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // block, size), np.uint8)
    halves = generator.normal(0, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    formats_without_bias = (
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q5_0,
        GGMLQuantizationType.Q8_0,
    )
    scale_bytes = 2 if kind in formats_without_bias else 4
    blocks[:, :scale_bytes] = halves[:, :scale_bytes]
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", AFFINE_FORMATS, ids=lambda kind: kind.name)
def test_repacked_tensors_have_the_values_of_the_gguf_package(kind):
    data = random_tensor(kind)
    weight, scales, biases = map(mx.array, repack(data, kind))
    values = mx.dequantize(weight, scales, biases, 32, AFFINE_FORMATS[kind].bits)
    np.testing.assert_allclose(values, gguf.dequantize(data, kind), rtol=1e-5, atol=1e-6)
