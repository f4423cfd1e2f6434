"""Repack quantized GGUF tensors for MLX's affine mode without changing their integer codes.

Block layouts follow the GGUF specification and llama.cpp. MLX's affine mode computes
`weight = scale * code + bias`, here with one scale and one bias per 32 inputs.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType

GROUP_SIZE = 32


class AffineTensor(NamedTuple):
    """The parts of a tensor in MLX's affine mode, named as in `mlx.nn.QuantizedLinear`.

    Attributes:
        weight: codes, one per element or packed into words of 32 bits.
        scales: float32, one per group.
        biases: float32, one per group.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


class BlockFormat(NamedTuple):
    """A GGUF block format that MLX's affine mode can hold.

    Attributes:
        bits: the number of bits per code.
        unpack: takes blocks (blocks, bytes per block) apart. Codes have the shape (blocks, 32) or
            (blocks, 8, 32), scales and biases (blocks, 1) or (blocks, 8).
    """

    bits: int
    unpack: Callable[[np.ndarray], AffineTensor]


def repack(data: np.ndarray, kind: GGMLQuantizationType) -> AffineTensor:
    """Repack one quantized GGUF tensor for MLX.

    Args:
        data: the tensor's bytes, (rows, bytes per row).
        kind: a key of `AFFINE_FORMATS`.

    Returns:
        Weight (rows, columns * bits / 32) uint32, scales and biases (rows, columns / 32) float32.
    """
    bits, unpack = AFFINE_FORMATS[kind]
    rows = data.shape[0]
    codes, scales, biases = unpack(data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]))
    weight = _pack(codes.reshape(rows, -1).astype(np.uint8, copy=False), bits)
    return AffineTensor(weight, scales.reshape(rows, -1), biases.reshape(rows, -1))


@cache
def can_read(number: int) -> bool:
    """Return whether tensors of a quantization type, by its number in the file, can be read."""
    try:
        kind = GGMLQuantizationType(number)
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def readable_names() -> list[str]:
    """Return the names of all quantization types that can be read."""
    return [kind.name for kind in GGMLQuantizationType if can_read(kind)]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (rows, columns) into MLX's little-endian bit stream of 32-bit words."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint64)
    for i in range(8):
        words |= codes[:, i::8].astype(np.uint64) << np.uint64(i * bits)
    stream = words.view(np.uint8).reshape(rows, columns // 8, 8)[:, :, :bits]
    return np.ascontiguousarray(stream).reshape(rows, -1).view(np.uint32)


def _read_field(blocks: np.ndarray, start: int, dtype: type, count: int = 1) -> np.ndarray:
    """Read `count` little-endian values at byte `start` of every block: (blocks, count)."""
    stop = start + count * np.dtype(dtype).itemsize
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _read_scale(blocks: np.ndarray) -> np.ndarray:
    """Read the scale at the start of every block: (blocks, 1)."""
    return _read_field(blocks, 0, np.float16).astype(np.float32)


def _read_scale_and_bias(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the two half-precision values at the start of every block: (blocks, 1) each."""
    first, second = np.split(_read_field(blocks, 0, np.float16, 2).astype(np.float32), 2, axis=1)
    return first, second


def _split_nibbles(packed: np.ndarray) -> np.ndarray:
    """Return the low halves of all bytes, then the high halves: (..., n) to (..., 2n)."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _read_fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Read bit 4 of the 32 codes of a Q5_0 or Q5_1 block from the word at byte `start`."""
    return (_read_field(blocks, start, np.uint32) >> np.arange(32, dtype=np.uint32) & 1) << 4


def _unpack_q4_0(blocks: np.ndarray) -> AffineTensor:
    scale = _read_scale(blocks)
    return AffineTensor(_split_nibbles(blocks[:, 2:]), scale, -8 * scale)


def _unpack_q4_1(blocks: np.ndarray) -> AffineTensor:
    scale, bias = _read_scale_and_bias(blocks)
    return AffineTensor(_split_nibbles(blocks[:, 4:]), scale, bias)


def _unpack_q5_0(blocks: np.ndarray) -> AffineTensor:
    scale = _read_scale(blocks)
    codes = _split_nibbles(blocks[:, 6:]) | _read_fifth_bits(blocks, 2)
    return AffineTensor(codes, scale, -16 * scale)


def _unpack_q5_1(blocks: np.ndarray) -> AffineTensor:
    scale, bias = _read_scale_and_bias(blocks)
    codes = _split_nibbles(blocks[:, 8:]) | _read_fifth_bits(blocks, 4)
    return AffineTensor(codes, scale, bias)


def _unpack_q8_0(blocks: np.ndarray) -> AffineTensor:
    scale = _read_scale(blocks)
    codes = blocks[:, 2:] ^ 0x80  # flipping the sign bit adds 128
    return AffineTensor(codes, scale, -128 * scale)


def _read_k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read scales and biases of the eight groups of a Q4_K or Q5_K block: (blocks, 8) each."""
    d, d_min = _read_scale_and_bias(blocks)
    low, mid, high = np.split(blocks[:, 4:16], 3, axis=1)
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return d * scale, -d_min * minimum


def _unpack_q4_k(blocks: np.ndarray) -> AffineTensor:
    codes = _split_nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return AffineTensor(codes, *_read_k_scales(blocks))


def _unpack_q5_k(blocks: np.ndarray) -> AffineTensor:
    codes = _split_nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth_bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return AffineTensor(codes | fifth_bits << 4, *_read_k_scales(blocks))


# In the K formats a group's scale is the product of two stored scales, which MLX rounds to the
# dtype of its scales. The scales of the other formats are exact in float16.
AFFINE_FORMATS: dict[GGMLQuantizationType, BlockFormat] = {
    GGMLQuantizationType.Q4_0: BlockFormat(4, _unpack_q4_0),
    GGMLQuantizationType.Q4_1: BlockFormat(4, _unpack_q4_1),
    GGMLQuantizationType.Q5_0: BlockFormat(5, _unpack_q5_0),
    GGMLQuantizationType.Q5_1: BlockFormat(5, _unpack_q5_1),
    GGMLQuantizationType.Q8_0: BlockFormat(8, _unpack_q8_0),
    GGMLQuantizationType.Q4_K: BlockFormat(4, _unpack_q4_k),
    GGMLQuantizationType.Q5_K: BlockFormat(5, _unpack_q5_k),
}
