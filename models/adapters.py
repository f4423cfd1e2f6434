"""Linear layers with a low-rank adapter (LoRA or DoRA), and slices of them.

An adapted layer computes base(x) + scale * (x @ a) @ b; DoRA multiplies each output by a magnitude.
Rows of `a` belong to inputs and columns of `b` to outputs, so both are sliced exactly, and the base
layer keeps its weights as they are. A stack of experts has one pair of matrices for each expert.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from .summed import SummedLinear

Part = slice | mx.array


class Adapted(nn.Module):
    """A slice of an adapted layer or stack, with its base layer's slice in `base`."""

    def __init__(self, base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float) -> None:
        super().__init__()
        self.base = without_bias(base)
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale
        if "bias" in base:
            self.bias = base.bias


class AdaptedStack(Adapted):
    """A slice of an adapted stack of experts.

    Args:
        base: the slice of the base stack, which may have a bias.
        lora_a: (experts, rank, in) the columns of the kept inputs.
        lora_b: (experts, out, rank) the rows of the kept outputs.
        scale: the factor of the low-rank product.
    """

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Project (..., 1, in) of some experts (...) to (..., 1, out)."""
        z = x
        for matrix in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z, matrix.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices
            )
        y = self.base(x, experts, sorted_indices) + (self.scale * z).astype(x.dtype)
        return y + self.bias[experts][..., None, :] if "bias" in self else y


class AdaptedLinear(Adapted):
    """A slice of an adapted layer.

    Args:
        base: the slice of the base layer, which may have a bias.
        lora_a: (in, rank) the rows of the kept inputs.
        lora_b: (rank, out) the columns of the kept outputs.
        scale: the factor of the low-rank product.
        magnitude: (out,) DoRA's factor of each kept output; None for LoRA.
    """

    def __init__(
        self,
        base: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        magnitude: mx.array | None,
    ) -> None:
        super().__init__(base, lora_a, lora_b, scale)
        if magnitude is not None:
            self.magnitude = magnitude

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., in) to (..., out)."""
        z = (x @ self.lora_a) @ self.lora_b
        y = self.base(x) + (self.scale * z).astype(x.dtype)
        if "magnitude" in self:
            y = self.magnitude.astype(x.dtype) * y
        return y + self.bias if "bias" in self else y


def is_adapted(module: object) -> bool:
    """Return whether a module is a linear layer or stack with an adapter, as mlx-lm makes it."""
    below = type(getattr(module, "linear", None))
    if type(module) is LoRASwitchLinear:
        return below in (SwitchLinear, QuantizedSwitchLinear)
    return type(module) in (LoRALinear, DoRALinear) and below in (nn.Linear, nn.QuantizedLinear)


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer below an adapter or a sum over ranks, or the layer itself without these."""
    if isinstance(layer, Adapted):
        return layer.base
    if isinstance(layer, SummedLinear):
        return layer.linear
    return layer.linear if is_adapted(layer) else layer


def bias_of(layer: nn.Module) -> mx.array | None:
    """Return the bias (out,) of a layer, adapted or not, or None."""
    return (layer.linear if is_adapted(layer) else layer).get("bias")


def without_bias(layer: nn.Module) -> nn.Module:
    """Return a layer, adapted or not, that does not add its bias."""
    layer = copy.copy(layer)
    if is_adapted(layer):
        layer.linear = without_bias(layer.linear)
    else:
        layer.pop("bias", None)
    return layer


def low_rank_weight(
    layer: nn.Module, inputs: Part = slice(None), outputs: Part = slice(None)
) -> mx.array:
    """Return what an adapter adds to the weights of its layer, (..., out, in) float32.

    Args:
        layer: an adapted layer.
        inputs: which inputs to return. Default: all.
        outputs: which outputs to return. Default: all.
    """
    if isinstance(layer, LoRASwitchLinear):
        a, b = layer.lora_a[..., inputs], layer.lora_b[:, outputs]
        return (layer.scale * b.astype(mx.float32)) @ a.astype(mx.float32)
    a, b = layer.lora_a[inputs].astype(mx.float32), layer.lora_b[:, outputs].astype(mx.float32)
    return (layer.scale * b.T) @ a.T


def magnitude(
    layer: nn.Module, base_weight: mx.array, outputs: Part = slice(None)
) -> mx.array | None:
    """Return DoRA's factor of each output, (out,) float32; None for LoRA.

    DoRA replaces the norm of each row of weights by a learned one.

    Args:
        layer: an adapted layer.
        base_weight: (out, in) the weights of its base layer for these outputs.
        outputs: the outputs. Default: all.
    """
    if not isinstance(layer, DoRALinear):
        return None
    weight = base_weight.astype(mx.float32) + low_rank_weight(layer, outputs=outputs)
    return layer.m[outputs].astype(mx.float32) / mx.linalg.norm(weight, axis=1)
