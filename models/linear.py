"""Slices of linear layers: some of their outputs, or some of their inputs.

A layer may have an adapter on its weights (see `adapters`), which is sliced along with them.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapters import (
    AdaptedLinear,
    base_layer,
    bias_of,
    is_adapted,
    low_rank_weight,
    magnitude,
    without_bias,
)

_FLOAT_ROUNDING = 0.003  # bfloat16
_MODE_ROUNDING = {"mxfp4": 0.118, "nvfp4": 0.096, "mxfp8": 0.027}


def is_linear(module: object) -> bool:
    """Return whether a module is a plain linear layer. Subclasses may compute something else."""
    return type(module) in (nn.Linear, nn.QuantizedLinear)


def is_sliceable(module: object) -> bool:
    """Return whether a module can be sliced here: a linear layer, with or without an adapter."""
    return is_linear(module) or is_adapted(module)


def outputs(layer: nn.Module) -> int:
    """Return the number of output features."""
    return int(base_layer(layer).weight.shape[0])


def inputs(layer: nn.Module) -> int:
    """Return the number of input features."""
    layer = base_layer(layer)
    columns = int(layer.weight.shape[1])
    return columns * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else columns


def check_indices(indices: np.ndarray, size: int) -> None:
    """Check indices on the host, because MLX does not check bounds.

    Raises:
        ValueError: unless `indices` is a non-empty, strictly increasing integer vector in
            [0, size).
    """
    if indices.ndim != 1 or len(indices) == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("neuron indices must be a non-empty vector of integers")
    if indices[0] < 0 or indices[-1] >= size or np.any(np.diff(indices) <= 0):
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
    """Return a layer's weights as floats, (out, in). An adapter is fused into them."""
    if is_adapted(layer):
        return _fused_weight(layer)
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        layer.group_size,
        layer.bits,
        layer.mode,
    )


def _fused_weight(layer: nn.Module, columns: slice = slice(None)) -> mx.array:
    """Fuse an adapter into its layer's weights in float32, and round the sum once."""
    base = layer.linear
    weight = dense_weight(base) if columns.stop is None else leading_columns(base, columns.stop)
    fused, factor = weight + low_rank_weight(layer, columns), _magnitude(layer)
    return (fused if factor is None else factor[:, None] * fused).astype(weight.dtype)


def _magnitude(layer: nn.Module) -> mx.array | None:
    """Return DoRA's factor of each output of an adapted layer; None for LoRA."""
    return magnitude(layer, dense_weight(layer.linear))


def leading_columns(layer: nn.Module, count: int) -> mx.array:
    """Return the weights of a layer's first inputs as floats, (out, count)."""
    if is_adapted(layer):
        return _fused_weight(layer, slice(count))
    if "scales" in layer:
        groups = -(-count // layer.group_size)
        words = groups * layer.group_size * layer.bits // 32
        columns = {"weight": layer.weight[:, :words], "scales": layer.scales[:, :groups]}
        if "biases" in layer:
            columns["biases"] = layer.biases[:, :groups]
        layer = _with_arrays(layer, **columns)
    return dense_weight(layer)[:, :count]


def _with_arrays(layer: nn.Module, **arrays: mx.array | None) -> nn.Module:
    """Copy a layer, replace some of its arrays, and drop those that are None."""
    layer = copy.copy(layer)
    for name, array in arrays.items():
        if array is None:
            layer.pop(name, None)
        else:
            setattr(layer, name, array)
    return layer


# --- Outputs: rows of the weights -----------------------------------------------------------------


def take_outputs(layer: nn.Module, indices: np.ndarray) -> nn.Module:
    """Keep some outputs. This is exact in every quantization mode: rows keep their groups.

    Args:
        layer: weights (out, in).
        indices: (k,) outputs to keep, checked by `check_indices`.

    Returns:
        A layer of the same kind with weights (k, in), or an `AdaptedLinear`.
    """
    check_indices(indices, outputs(layer))
    base, rows = base_layer(layer), mx.array(indices)
    sliced = _with_arrays(base, **{name: base[name][rows] for name in _arrays_by_output(base)})
    if not is_adapted(layer):
        return sliced
    factor = magnitude(layer, dense_weight(sliced), rows)
    return AdaptedLinear(sliced, layer.lora_a, layer.lora_b[:, rows], layer.scale, factor)


def put_outputs(
    layer: nn.Module, sliced: nn.Module, places: np.ndarray, indices: np.ndarray
) -> None:
    """Overwrite some outputs of a slice, in place, with other outputs of its layer.

    Args:
        layer: weights (out, in).
        sliced: a result of `take_outputs`, which changes.
        places: (n,) outputs of the slice to overwrite.
        indices: (n,) outputs of the layer to copy there.
    """
    if isinstance(sliced, AdaptedLinear):
        added = take_outputs(layer, indices)
        put_outputs(added.base, sliced.base, places, np.arange(len(indices)))
        sliced.lora_b = _overwritten(sliced.lora_b.T, places, added.lora_b.T).T
        for name in ("magnitude", "bias"):
            if name in sliced:
                sliced[name] = _overwritten(sliced[name], places, added[name])
        return
    destinations, sources = mx.array(places), mx.array(indices)
    for name in _arrays_by_output(layer):
        array = sliced[name]
        wide = _widest_dtype(array)
        moved = array.view(wide)
        moved[destinations] = layer[name].view(wide)[sources]
        sliced[name] = moved.view(array.dtype)


def _overwritten(array: mx.array, places: np.ndarray, rows: mx.array) -> mx.array:
    """Return an array with some rows replaced. The given array, which others may use, is kept."""
    array = mx.array(array)
    array[mx.array(places)] = rows
    return array


def _arrays_by_output(layer: nn.Module) -> list[str]:
    """List the names of a layer's arrays. Each array has one row per output."""
    names = ("weight", "scales", "biases", "bias")
    return [name for name in names if layer.get(name) is not None]


def _widest_dtype(array: mx.array) -> mx.Dtype:
    """Return the widest dtype for copying rows: MLX's CPU backend copies element by element."""
    fits = mx.default_device() == mx.cpu and array.ndim == 2 and array[0].nbytes % 8 == 0
    return mx.uint64 if fits else array.dtype


# --- Inputs: columns of the weights ---------------------------------------------------------------


class ScatteredLinear(nn.Module):
    """A whole quantized layer that receives only some of its inputs; the others are zero."""

    def __init__(self, layer: nn.QuantizedLinear, indices: np.ndarray) -> None:
        super().__init__()
        if "bias" in layer:
            self.bias = layer.bias
        self.move(layer, indices)

    def move(self, layer: nn.QuantizedLinear, indices: np.ndarray) -> None:
        """Receive other inputs (k,) of a layer, in any order."""
        self.layer = without_bias(layer)  # again, because a release replaces the layer's weights
        self._indices, self._inputs = mx.array(indices), inputs(layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., k) kept inputs to (..., out)."""
        full = mx.zeros((*x.shape[:-1], self._inputs), x.dtype)
        full[..., self._indices] = x
        y = self.layer(full)
        return y + self.bias if "bias" in self else y


class NeuronMajorLinear(nn.Module):
    """A transposed copy of a quantized layer: one row per input, quantized along the outputs.

    Rows can be sliced directly and exactly. The price is a second rounding of the weights.
    """

    def __init__(self, layer: nn.QuantizedLinear) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        if outputs(layer) % layer.group_size:
            raise ValueError(
                f"the down policy neuron-major cannot quantize {outputs(layer)} outputs in groups "
                f"of {layer.group_size}; use another policy"
            )
        rows = mx.contiguous(dense_weight(layer).T)
        self.weight, self.scales, *biases = mx.quantize(rows, self.group_size, self.bits, self.mode)
        if biases:
            self.biases = biases[0]

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., k) to (..., out)."""
        y = mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            False,
            self.group_size,
            self.bits,
            self.mode,
        )
        return y + self.bias if "bias" in self else y


def _columns(weight: mx.array, indices: np.ndarray) -> mx.array:
    """Copy columns of (out, in). On a CPU this is 18 times faster than indexing with an array."""
    every_row = mx.broadcast_to(mx.array(indices)[None], (weight.shape[0], len(indices)))
    return mx.take_along_axis(weight, every_row, axis=1)


def _requantized(layer: nn.QuantizedLinear, indices: np.ndarray) -> nn.Module:
    if len(indices) % layer.group_size:
        raise ValueError(
            f"{len(indices)} inputs cannot be quantized in groups of {layer.group_size}"
        )
    columns = _columns(dense_weight(layer), indices)
    weight, scales, *biases = mx.quantize(columns, layer.group_size, layer.bits, layer.mode)
    return _with_arrays(layer, weight=weight, scales=scales, biases=biases[0] if biases else None)


NEURON_MAJOR, SCATTER = "neuron-major", "scatter"

# How to drop some inputs of a quantized layer. Columns share the scales of their groups, so they
# cannot be copied unchanged. docs/results.md compares the policies.
DOWN_POLICIES: dict[str, Callable[[nn.QuantizedLinear, np.ndarray], nn.Module]] = {
    NEURON_MAJOR: lambda layer, indices: take_transposed(layer, indices, NeuronMajorLinear(layer)),
    "requantize": _requantized,
    SCATTER: ScatteredLinear,
}


def default_down_policy() -> str:
    """Return the policy that suits the device that MLX computes on.

    On a CPU the neuron-major product is 3.5 times as fast as the usual product, and its slices are
    rows. On Metal the usual product has the tuned kernels (qmv_fast), and quantizing is fast.
    """
    return NEURON_MAJOR if mx.default_device() == mx.cpu else "requantize"


def input_multiple(layer: nn.Module) -> int:
    """Return the multiple to round the number of kept inputs to.

    Metal's fast matrix-vector kernels read quantized rows in blocks of 512 inputs (256 from 6 bits
    on). If a block is too coarse for the layer, its inputs are kept in whole groups instead.
    """
    layer = base_layer(layer)
    if not isinstance(layer, nn.QuantizedLinear):
        return 32
    block = 512 if layer.bits < 6 else 256
    return block if inputs(layer) >= 16 * block else int(layer.group_size)


def working_policy(layer: nn.Module, policy: str) -> str:
    """Return a policy for dropping inputs of a layer: the given one, or one that works instead.

    A layer whose outputs do not fill groups has no neuron-major copy; "requantize", which saves as
    many bytes, works for every layer.
    """
    base = base_layer(layer)
    fills_groups = "scales" not in base or outputs(base) % base.group_size == 0
    return policy if fills_groups or policy != NEURON_MAJOR else "requantize"


def take_inputs(
    layer: nn.Module,
    indices: np.ndarray,
    policy: str = "requantize",
    transposed: NeuronMajorLinear | None = None,
) -> nn.Module:
    """Keep some inputs.

    Args:
        layer: weights (out, in).
        indices: (k,) inputs to keep, checked by `check_indices`.
        policy: a key of `DOWN_POLICIES`, for quantized layers. "requantize" quantizes the kept
            columns again in the layer's own format: the fewest bytes, with a small error.
            "neuron-major" takes rows of a copy of the layer that is quantized along the outputs:
            as few bytes, and a similar error.
            "scatter" keeps the whole layer and puts the k inputs among zeros: exact, but no bytes
            are saved.
        transposed: the copy for "neuron-major". Default: made here.

    Returns:
        A layer that maps (..., k) to (..., out).

    Raises:
        ValueError: for indices out of range, for an unknown policy, or if the layer's group size
            does not divide k ("requantize") or the number of outputs ("neuron-major").
    """
    check_indices(indices, inputs(layer))
    if policy not in DOWN_POLICIES:
        raise ValueError(f"down policy {policy!r} is not one of {', '.join(DOWN_POLICIES)}")
    base = base_layer(layer)
    if not isinstance(base, nn.QuantizedLinear):
        sliced = _with_arrays(base, weight=_columns(base.weight, indices))
    elif policy == NEURON_MAJOR and transposed is not None:
        sliced = take_transposed(base, indices, transposed)
    else:
        sliced = DOWN_POLICIES[policy](base, indices)
    if not is_adapted(layer):
        return sliced
    lora_a = layer.lora_a[mx.array(indices)]
    return AdaptedLinear(sliced, lora_a, layer.lora_b, layer.scale, _magnitude(layer))


def take_transposed(
    layer: nn.QuantizedLinear, indices: np.ndarray, transposed: NeuronMajorLinear
) -> nn.Module:
    """Keep some inputs of a layer by copying rows of its transposed copy."""
    return _with_arrays(take_outputs(transposed, indices), bias=layer.get("bias"))


def put_inputs(
    layer: nn.Module,
    sliced: nn.Module,
    kept: np.ndarray,
    places: np.ndarray,
    transposed: NeuronMajorLinear | None = None,
) -> None:
    """Replace some inputs of a slice, in place, by other inputs of its layer.

    Only what changes is copied, except in a requantized slice, whose inputs share scales: it is
    quantized again, in the slice's order, and its previous arrays are freed before that. The bias
    is the layer's again, without compensation.

    Args:
        layer: weights (out, in).
        sliced: a result of `take_inputs`, which changes.
        kept: (k,) all inputs of the slice from now on, in the slice's order.
        places: (n,) where in `kept` the new inputs are.
        transposed: the copy that a neuron-major slice was taken from. Default: made here.

    Raises:
        ValueError: for inputs that are out of range or not distinct.
    """
    check_indices(np.sort(kept), inputs(layer))
    base, smaller, indices = base_layer(layer), base_layer(sliced), kept[places]
    if not isinstance(base, nn.QuantizedLinear):
        where = mx.broadcast_to(mx.array(places)[None], (outputs(base), len(places)))
        columns = _columns(base.weight, indices)
        smaller.weight = mx.put_along_axis(smaller.weight, where, columns, axis=1)
    elif isinstance(smaller, NeuronMajorLinear):
        put_outputs(transposed or NeuronMajorLinear(base), smaller, places, indices)
    elif isinstance(smaller, ScatteredLinear):
        smaller.move(base, kept)
    else:
        smaller.update(without_bias(_requantized(base, kept)).parameters())
    if is_adapted(layer):
        rows = layer.lora_a[mx.array(indices)]
        sliced.lora_a = _overwritten(sliced.lora_a, places, rows)
    sliced.pop("bias", None)
    if (bias := bias_of(layer)) is not None:
        sliced.bias = bias


# --- Mean compensation ----------------------------------------------------------------------------


class MeanCompensation(NamedTuple):
    """Constants that replace the inputs that a slice dropped.

    Attributes:
        inputs: (in,) values of all inputs.
        output: (out,) the layer's output for these inputs, without its bias. Default: computed.
        dtype: the dtype that the model computes in. Default: that of the inputs.
    """

    inputs: mx.array
    output: mx.array | None = None
    dtype: mx.Dtype | None = None


def add_mean_compensation(
    layer: nn.Module, sliced: nn.Module, kept: np.ndarray, means: MeanCompensation
) -> None:
    """Add the dropped inputs' constant output to the bias of a slice.

    It is a small difference of large vectors, so it is computed in float32 and rounded at the end.

    Args:
        layer: weights (out, in).
        sliced: a result of `take_inputs`, which changes.
        kept: (k,) the inputs in the slice, in the slice's order.
        means: the values that replace the dropped inputs.
    """
    bias, sliced_without_bias = bias_of(layer), without_bias(sliced)
    constants, output = means.inputs.astype(mx.float32), means.output
    if output is None:
        output = without_bias(layer)(constants[None])[0]
    dropped = output - sliced_without_bias(constants[mx.array(kept)][None])[0]
    total = dropped if bias is None else dropped + bias
    sliced.bias = total.astype(means.dtype or means.inputs.dtype)
