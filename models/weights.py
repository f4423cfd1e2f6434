"""The bytes of weights that decoding reads."""

import mlx.nn as nn

from .linear import is_linear, outputs
from .modules import named_arrays


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
