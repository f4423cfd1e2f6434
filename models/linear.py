"""Linear layers: their sizes and weights, and slices of some of their outputs.

A layer may have an adapter on its weights (see `adapters`), which is sliced along with them. It may
also be a stack: one matrix per expert of a mixture, (experts, out, in), of which every expert keeps
its own outputs, (experts, k). What is said of a layer here holds for each expert.
"""

import copy
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .adapters import (
    Adapted,
    AdaptedLinear,
    AdaptedStack,
    base_layer,
    bias_of,
    is_adapted,
    low_rank_weight,
    magnitude,
    without_bias,
)
from .summed import SummedLinear

_LINEAR = (
    nn.Linear,
    nn.QuantizedLinear,
    nn.AllToShardedLinear,
    nn.QuantizedAllToShardedLinear,
)

_FLOAT_ROUNDING = 0.003  # bfloat16
_MODE_ROUNDING = {"mxfp4": 0.118, "nvfp4": 0.096, "mxfp8": 0.027}


def is_linear(module: object) -> bool:
    """Return whether a module is a plain linear layer, or computes some outputs of one on a rank.

    Subclasses may compute something else.
    """
    return type(module) in _LINEAR


def is_stack(module: object) -> bool:
    """Return whether a module is a plain stack of linear layers, one per expert."""
    return type(module) in (SwitchLinear, QuantizedSwitchLinear)


def is_sliceable(module: object) -> bool:
    """Return whether a module can be sliced here: a linear layer, adapted or summed or not."""
    is_summed = isinstance(module, SummedLinear)
    return is_linear(module) or is_adapted(module) or is_stack(module) or is_summed


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer's weights, below an adapter, are quantized."""
    return "scales" in base_layer(layer)


def experts(layer: nn.Module) -> int | None:
    """Return the number of experts of a stack, or None for a single layer."""
    weight = base_layer(layer).weight
    return int(weight.shape[0]) if weight.ndim == 3 else None


def outputs(layer: nn.Module) -> int:
    """Return the number of output features."""
    return int(base_layer(layer).weight.shape[-2])


def inputs(layer: nn.Module) -> int:
    """Return the number of input features."""
    layer = base_layer(layer)
    columns = int(layer.weight.shape[-1])
    return columns * 32 // layer.bits if "scales" in layer else columns


def check_indices(indices: np.ndarray, size: int, experts: int | None = None) -> None:
    """Check indices on the host, because MLX does not check bounds.

    Args:
        indices: (k,), or (experts, k) for a stack.
        size: the number of inputs or outputs.
        experts: the number of experts of a stack.

    Raises:
        ValueError: unless `indices` are non-empty, strictly increasing integers in [0, size), in
            one vector per expert.
    """
    if indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("neuron indices must be a non-empty vector of integers")
    if indices.shape[:-1] != (() if experts is None else (experts,)):
        expected = "one vector" if experts is None else f"a vector for each of {experts} experts"
        raise ValueError(f"neuron indices must be {expected}, not {indices.shape}")
    if indices.min() < 0 or indices.max() >= size or np.any(np.diff(indices) <= 0):
        raise ValueError(f"neuron indices must be strictly increasing and within 0..{size - 1}")


def rounding_error(layer: nn.Module) -> float:
    """Return the expected error of rounding a layer's weights, as a share of the weights.

    Both are root mean squares. A group of 64 normally distributed weights spans about 4.7 standard
    deviations. Rounded to one of 2^bits levels, its weights have errors of a step / sqrt(12). The
    errors of floating-point modes are measured.
    """
    layer = base_layer(layer)
    if "scales" not in layer:
        return _FLOAT_ROUNDING
    if layer.mode in _MODE_ROUNDING:
        return _MODE_ROUNDING[layer.mode]
    return 4.7 / (2**layer.bits - 1) / math.sqrt(12)


def dense_weight(layer: nn.Module) -> mx.array:
    """Return a layer's weights as floats, (..., out, in). An adapter is fused into them."""
    if is_adapted(layer):
        return _fused_weight(layer)
    if "scales" not in layer:
        return layer.weight
    if layer.get("global_scale") is not None:
        return _globally_scaled_weight(layer)
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        layer.group_size,
        layer.bits,
        layer.mode,
    )


def _format(layer: nn.Module) -> dict[str, Any]:
    """Return the number format of a quantized layer, as arguments of MLX's functions."""
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _globally_scaled_weight(layer: nn.Module) -> mx.array:
    """Return the weights of a stack that is quantized with one more scale for each expert."""
    matrices = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
    return mx.stack([mx.dequantize(w, s, global_scale=g, **_format(layer)) for w, s, g in matrices])


def quantized_arrays(layer: nn.Module, weight: mx.array) -> dict[str, mx.array | None]:
    """Quantize other weights in the format of a layer; return its arrays by name."""
    options = _format(layer)
    if layer.get("global_scale") is not None:
        matrices = zip(weight, layer.global_scale, strict=True)
        pairs = [mx.quantize(w, global_scale=g, **options) for w, g in matrices]
        words, scales = (mx.stack([*arrays]) for arrays in zip(*pairs, strict=True))
        return {"weight": words, "scales": scales, "biases": None}
    words, scales, *biases = mx.quantize(weight, **options)
    return {"weight": words, "scales": scales, "biases": biases[0] if biases else None}


def _fused_weight(layer: nn.Module, columns: slice = slice(None)) -> mx.array:
    """Fuse an adapter into its layer's weights in float32, and round the sum once."""
    base = layer.linear
    weight = dense_weight(base) if columns.stop is None else leading_columns(base, columns.stop)
    fused, factor = weight + low_rank_weight(layer, columns), adapter_magnitude(layer)
    return (fused if factor is None else factor[:, None] * fused).astype(weight.dtype)


def adapter_magnitude(layer: nn.Module) -> mx.array | None:
    """Return DoRA's factor of each output of an adapted layer; None for LoRA."""
    return magnitude(layer, dense_weight(layer.linear))


def leading_columns(layer: nn.Module, count: int) -> mx.array:
    """Return the weights of a layer's first inputs as floats, (..., out, count)."""
    if is_adapted(layer):
        return _fused_weight(layer, slice(count))
    if "scales" in layer:
        groups = -(-count // layer.group_size)
        words = groups * layer.group_size * layer.bits // 32
        columns = {"weight": layer.weight[..., :words], "scales": layer.scales[..., :groups]}
        if layer.get("biases") is not None:
            columns["biases"] = layer.biases[..., :groups]
        layer = with_arrays(layer, **columns)
    return dense_weight(layer)[..., :count]


def with_arrays(layer: nn.Module, **arrays: mx.array | None) -> nn.Module:
    """Copy a layer, replace some of its arrays, and drop those that are None."""
    layer = copy.copy(layer)
    for name, array in arrays.items():
        if array is None:
            layer.pop(name, None)
        else:
            setattr(layer, name, array)
    return layer


def take_outputs(layer: nn.Module, indices: np.ndarray) -> nn.Module:
    """Keep some outputs. This is exact in every quantization mode: rows keep their groups.

    Args:
        layer: weights (..., out, in).
        indices: (..., k) outputs to keep, checked by `check_indices`.

    Returns:
        A layer of the same kind with weights (..., k, in), or a slice with an adapter.
    """
    count = experts(layer)
    check_indices(indices, outputs(layer), count)
    base, rows = base_layer(layer), mx.array(indices)
    if count is not None:
        rows = mx.array(indices + outputs(layer) * np.arange(count)[:, None])
    arrays = {name: _rows(base[name], count)[rows] for name in _arrays_by_output(base)}
    sliced = with_arrays(base, **arrays)
    if not is_adapted(layer):
        return sliced
    if count is not None:
        lora_b = _rows(layer.lora_b, count)[rows]
        return AdaptedStack(sliced, layer.lora_a, lora_b, layer.scale)
    factor = magnitude(layer, dense_weight(sliced), rows)
    return AdaptedLinear(sliced, layer.lora_a, layer.lora_b[:, rows], layer.scale, factor)


def put_outputs(
    layer: nn.Module, sliced: nn.Module, places: np.ndarray, indices: np.ndarray
) -> None:
    """Overwrite some outputs of a slice, in place, with other outputs of its layer.

    Args:
        layer: weights (..., out, in).
        sliced: a result of `take_outputs`, which changes.
        places: (n,) outputs of the slice to overwrite, numbered through all experts of a stack.
        indices: (n,) outputs of the layer to copy there, numbered in the same way.
    """
    if isinstance(sliced, AdaptedStack):
        _put_adapted_outputs(layer, sliced, places, indices)
        return
    if isinstance(sliced, AdaptedLinear):
        added = take_outputs(layer, indices)
        put_outputs(added.base, sliced.base, places, np.arange(len(indices)))
        sliced.lora_b = overwritten(sliced.lora_b.T, places, added.lora_b.T).T
        for name in ("magnitude", "bias"):
            if name in sliced:
                sliced[name] = overwritten(sliced[name], places, added[name])
        return
    destinations, sources, count = mx.array(places), mx.array(indices), experts(layer)
    for name in _arrays_by_output(layer):
        array = _rows(sliced[name], count)
        wide = _widest_dtype(array)
        moved = array.view(wide)
        moved[destinations] = _rows(layer[name], count).view(wide)[sources]
        sliced[name] = moved.view(array.dtype).reshape(sliced[name].shape)


def _put_adapted_outputs(
    layer: nn.Module, sliced: Adapted, places: np.ndarray, indices: np.ndarray
) -> None:
    """Overwrite some outputs of a slice of an adapted stack; see `put_outputs`."""
    put_outputs(without_bias(layer.linear), sliced.base, places, indices)
    for name, source in (("lora_b", layer.lora_b), ("bias", bias_of(layer))):
        if source is not None:
            rows = source.flatten(0, 1)[mx.array(indices)]
            changed = overwritten(sliced[name].flatten(0, 1), places, rows)
            sliced[name] = changed.reshape(sliced[name].shape)


def _rows(array: mx.array, experts: int | None) -> mx.array:
    """Number the rows of an array through all experts of a stack."""
    return array if experts is None else array.flatten(0, 1)


def overwritten(array: mx.array, places: np.ndarray, rows: mx.array) -> mx.array:
    """Return an array with some rows replaced. The given array, which others may use, is kept."""
    array = mx.array(array)
    array[mx.array(places)] = rows
    return array


def _arrays_by_output(layer: nn.Module) -> list[str]:
    """List the names of a layer's arrays that have one row per output."""
    names = ("weight", "scales", "biases", "bias")
    return [name for name in names if layer.get(name) is not None]


def _widest_dtype(array: mx.array) -> mx.Dtype:
    """Return the widest dtype for copying rows: MLX's CPU backend copies element by element."""
    fits = mx.default_device() == mx.cpu and array.ndim == 2 and array[0].nbytes % 8 == 0
    return mx.uint64 if fits else array.dtype
