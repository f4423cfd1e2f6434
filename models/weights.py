"""The weights of a model: the bytes that decoding reads, and whether all are finite."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from .ffn import FFN
from .head import BackedOffModel, Head, SlicedHead
from .linear import dense_weight, is_linear, outputs
from .modules import named_arrays
from .taps import Routing, with_taps

_ADAPTED_EMBEDDINGS = (LoRAEmbedding, DoRAEmbedding)
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding, *_ADAPTED_EMBEDDINGS)


def read_shares(model: nn.Module, ffns: list[FFN]) -> dict[str, float]:
    """Return the share of its experts that a token reads, by stack, from a run on one token.

    MLX computes nothing for this, because the outputs are not evaluated.
    """
    stacks = {ffn.path: ffn.experts for ffn in ffns if ffn.experts is not None}
    shares: dict[str, float] = {}

    def observe(path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        if routing is not None:
            per_token = routing.experts.size // routing.count
            shares[path] = min(1.0, per_token / stacks[path])
        return hidden

    if stacks:
        with_taps(model, observe, ffns=ffns)(mx.array([[0]], mx.uint32))
    return shares


def weight_bytes(
    model: nn.Module, head: Head | None, shares: Mapping[str, float] | None = None
) -> int:
    """Return the bytes of weights that decoding reads per token.

    These are all weights, with their adapters, except embeddings that are only looked up and the
    experts that a token is not routed to.

    Args:
        model: the model, dense or sliced.
        head: the dense model's head. Without one, embeddings are taken for looked up if another
            layer has an output for each token.
        shares: the result of `read_shares` for the dense model. Default: every expert counts.
    """
    if isinstance(model, BackedOffModel):
        model = model.model
    arrays = named_arrays(model)
    unread = sum(
        (1 - share) * sum(array.nbytes for name, array in arrays if name.startswith(f"{path}."))
        for path, share in (shares or {}).items()
    )
    layers = [module for _, module in model.named_modules()]
    looked_up = sum(map(_looked_up_bytes, _looked_up(layers, head)))
    return sum(array.nbytes for _, array in arrays) - round(unread) - looked_up


def _bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in named_arrays(module))


def _looked_up(layers: list[nn.Module], head: Head | None) -> list[nn.Module]:
    """Return the embeddings that compute no logits."""
    embeddings = [layer for layer in layers if isinstance(layer, _EMBEDDINGS)]
    if head is None:
        sizes = {outputs(layer) for layer in layers if is_linear(layer)}
        return [layer for layer in embeddings if _base(layer).weight.shape[0] in sizes]
    heads = [layer.slice for layer in layers if isinstance(layer, SlicedHead)] + [head.layer]
    return [layer for layer in embeddings if not any(layer is other for other in heads)]


def _base(layer: nn.Module) -> nn.Module:
    """Return the embedding below an adapter, or the embedding itself."""
    return layer.embedding if isinstance(layer, _ADAPTED_EMBEDDINGS) else layer


def _looked_up_bytes(layer: nn.Module) -> int:
    """Return the bytes of an embedding of which a token needs one row."""
    if isinstance(layer, _ADAPTED_EMBEDDINGS):  # the embedding below is counted by itself
        return sum(layer[name].nbytes for name in ("lora_a", "m") if name in layer)
    return _bytes(layer)


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
