"""The weights of a model: the bytes that decoding reads, and whether all are finite."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from .linear import dense_weight, is_linear, outputs
from .modules import named_arrays


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that decoding reads per token.

    These are all weights, with their adapters, except embeddings that are only looked up. Every
    expert of a mixture counts, whether or not a token is routed to it.
    """
    layers = dict(model.named_modules()).values()
    heads = {outputs(layer) for layer in layers if is_linear(layer)}
    total = sum(array.nbytes for _, array in named_arrays(model))
    for layer in layers:
        if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) and (
            layer.weight.shape[0] in heads
        ):
            total -= sum(array.nbytes for _, array in named_arrays(layer))
        if isinstance(layer, (LoRAEmbedding, DoRAEmbedding)) and outputs(layer.embedding) in heads:
            total -= sum(layer[name].nbytes for name in ("lora_a", "m") if name in layer)
    return total


def check_finite(model: nn.Module) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: if the model has weights that are infinite or not a number.
    """
    arrays = dict(named_arrays(model))
    for path, module in model.named_modules():
        if is_linear(module) and "scales" in module and module.scales.dtype == mx.uint8:
            arrays[path] = dense_weight(module)  # scales that are coded floats
    for path, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise ValueError(
                f"the model's weights {path} are not finite; its files are damaged, or --dtype "
                "cannot represent the weights"
            )
