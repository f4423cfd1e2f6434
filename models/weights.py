"""The weights of a model: a sample that identifies it, and the bytes that decoding reads."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .discovery import find_ffns
from .ffn import FFN
from .linear import dense_weight, is_linear, outputs
from .modules import named_arrays


def fingerprint(model: nn.Module) -> dict[str, np.ndarray]:
    """Sample the weights of each FFN of a model; see `sample_weights`."""
    return sample_weights(find_ffns(model))


def sample_weights(ffns: list[FFN]) -> dict[str, np.ndarray]:
    """Sample the weights of each FFN: a corner, (4, 32) float32, of its first matrix.

    The sample identifies a model in every precision and quantization.
    """
    corners = {}
    for ffn in ffns:
        first = next(iter(ffn.expand.values()))
        corners[ffn.path] = dense_weight(first, slice(4))[:, :32].astype(mx.float32)
    mx.eval(corners)
    return {path: np.array(corner) for path, corner in corners.items()}


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that decoding reads per token.

    These are all weights except embeddings that are only looked up. Every expert of a mixture
    counts, whether or not a token is routed to it.
    """
    layers = dict(model.named_modules()).values()
    heads = {outputs(layer) for layer in layers if is_linear(layer)}
    total = sum(array.nbytes for _, array in named_arrays(model))
    for layer in layers:
        if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) and (
            layer.weight.shape[0] in heads
        ):
            total -= sum(array.nbytes for _, array in named_arrays(layer))
    return total
