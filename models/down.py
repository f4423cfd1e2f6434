"""Slices of some of the inputs of linear layers, which are the neurons of a down projection.

The inputs that are left out may be replaced by constants. As in `linear`, a layer may have an
adapter, or be a stack, whose experts keep their own inputs, (experts, k).
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapters import AdaptedLinear, AdaptedStack, base_layer, bias_of, is_adapted, without_bias
from .linear import (
    adapter_magnitude,
    check_indices,
    dense_weight,
    experts,
    inputs,
    outputs,
    overwritten,
    put_outputs,
    quantized_arrays,
    take_outputs,
    with_arrays,
)
from .summed import SummedLinear


class Scattered(nn.Module):
    """A whole quantized layer that receives only some of its inputs; the others are zero."""

    def __init__(self, layer: nn.Module, indices: np.ndarray) -> None:
        super().__init__()
        if "bias" in layer:
            self.bias = layer.bias
        self.move(layer, indices)

    def move(self, layer: nn.Module, indices: np.ndarray) -> None:
        """Receive other inputs (..., k) of a layer, in any order."""
        self.layer = without_bias(layer)  # again, because a release replaces the layer's weights
        self._indices, self._inputs = mx.array(indices), inputs(layer)


class ScatteredLinear(Scattered):
    """A single layer that receives some of its inputs."""

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., k) kept inputs to (..., out)."""
        full = mx.zeros((*x.shape[:-1], self._inputs), x.dtype)
        full[..., self._indices] = x
        y = self.layer(full)
        return y + self.bias if "bias" in self else y


class ScatteredStack(Scattered):
    """A stack whose experts receive some of their inputs."""

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Project (..., 1, k) kept inputs of some experts (...) to (..., 1, out)."""
        full = mx.zeros((*x.shape[:-1], self._inputs), x.dtype)
        full = mx.put_along_axis(full, self._indices[experts][..., None, :], x, axis=-1)
        y = self.layer(full, experts, sorted_indices)
        return y + self.bias[experts][..., None, :] if "bias" in self else y


class NeuronMajor(nn.Module):
    """A transposed copy of a quantized layer: one row per input, quantized along the outputs.

    Rows can be sliced directly and exactly. The price is a second rounding of the weights.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        if outputs(layer) % layer.group_size:
            raise ValueError(
                f"the down policy neuron-major cannot quantize {outputs(layer)} outputs in groups "
                f"of {layer.group_size}; use another policy"
            )
        rows = mx.contiguous(dense_weight(layer).swapaxes(-1, -2))
        self.weight, self.scales, *biases = mx.quantize(rows, self.group_size, self.bits, self.mode)
        if biases:
            self.biases = biases[0]


class NeuronMajorLinear(NeuronMajor):
    """A transposed copy of a single layer."""

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


class NeuronMajorStack(NeuronMajor):
    """A transposed copy of a stack: one matrix for each expert."""

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Project (..., 1, k) of some experts (...) to (..., 1, out)."""
        y = mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=experts,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        return y + self.bias[experts][..., None, :] if "bias" in self else y


def transposed_copy(layer: nn.Module) -> NeuronMajor:
    """Return the transposed copy of a quantized layer, for the policy "neuron-major"."""
    return (NeuronMajorLinear if experts(layer) is None else NeuronMajorStack)(layer)


def _scattered(layer: nn.Module, indices: np.ndarray) -> nn.Module:
    return (ScatteredLinear if experts(layer) is None else ScatteredStack)(layer, indices)


def _columns(weight: mx.array, indices: np.ndarray) -> mx.array:
    """Copy columns (..., k) of (..., out, in), 18 times faster on a CPU than by indexing."""
    every_row = mx.broadcast_to(
        mx.array(indices)[..., None, :], (*weight.shape[:-1], indices.shape[-1])
    )
    return mx.take_along_axis(weight, every_row, axis=-1)


def _requantized(layer: nn.Module, indices: np.ndarray) -> nn.Module:
    if indices.shape[-1] % layer.group_size:
        raise ValueError(
            f"{indices.shape[-1]} inputs cannot be quantized in groups of {layer.group_size}"
        )
    return with_arrays(layer, **quantized_arrays(layer, _columns(dense_weight(layer), indices)))


NEURON_MAJOR, SCATTER = "neuron-major", "scatter"

# How to drop some inputs of a quantized layer. Columns share the scales of their groups, so they
# cannot be copied unchanged. docs/parts.md compares the policies.
DOWN_POLICIES: dict[str, Callable[[nn.Module, np.ndarray], nn.Module]] = {
    NEURON_MAJOR: lambda layer, indices: take_transposed(layer, indices, transposed_copy(layer)),
    "requantize": _requantized,
    SCATTER: _scattered,
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
    if "scales" not in layer:
        return 32
    block = 512 if layer.bits < 6 else 256
    return block if inputs(layer) >= 16 * block else int(layer.group_size)


def working_policy(layer: nn.Module, policy: str) -> str:
    """Return a policy for dropping inputs of a layer: the given one, or one that works instead.

    A layer whose outputs do not fill groups has no neuron-major copy, nor has one with a scale for
    each expert; "requantize", which saves as many bytes, works for every layer.
    """
    base = base_layer(layer)
    has_copy = "scales" not in base or (
        outputs(base) % base.group_size == 0 and base.get("global_scale") is None
    )
    return policy if has_copy or policy != NEURON_MAJOR else "requantize"


def take_inputs(
    layer: nn.Module,
    indices: np.ndarray,
    policy: str = "requantize",
    transposed: NeuronMajor | None = None,
) -> nn.Module:
    """Keep some inputs.

    Args:
        layer: weights (..., out, in).
        indices: (..., k) inputs to keep, checked by `check_indices`.
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
    if isinstance(layer, SummedLinear):
        return layer.with_linear(take_inputs(layer.linear, indices, policy, transposed))
    check_indices(indices, inputs(layer), experts(layer))
    if policy not in DOWN_POLICIES:
        raise ValueError(f"down policy {policy!r} is not one of {', '.join(DOWN_POLICIES)}")
    base = base_layer(layer)
    if "scales" not in base:
        sliced = with_arrays(base, weight=_columns(base.weight, indices))
    elif policy == NEURON_MAJOR and transposed is not None:
        sliced = take_transposed(base, indices, transposed)
    else:
        sliced = DOWN_POLICIES[policy](base, indices)
    if not is_adapted(layer):
        return sliced
    if experts(layer) is not None:
        lora_a = _columns(layer.lora_a, indices)
        return AdaptedStack(sliced, lora_a, layer.lora_b, layer.scale)
    lora_a = layer.lora_a[mx.array(indices)]
    return AdaptedLinear(sliced, lora_a, layer.lora_b, layer.scale, adapter_magnitude(layer))


def take_transposed(layer: nn.Module, indices: np.ndarray, transposed: NeuronMajor) -> nn.Module:
    """Keep some inputs of a layer by copying rows of its transposed copy."""
    return with_arrays(take_outputs(transposed, indices), bias=layer.get("bias"))


def put_inputs(
    layer: nn.Module,
    sliced: nn.Module,
    kept: np.ndarray,
    places: np.ndarray,
    transposed: NeuronMajor | None = None,
) -> None:
    """Replace some inputs of a slice, in place, by other inputs of its layer.

    Only what changes is copied, except in a requantized slice, whose inputs share scales: it is
    quantized again, in the slice's order, and its previous arrays are freed before that. Of a stack
    this holds for the experts with new inputs. The bias of what changes is the layer's again,
    without compensation.

    Args:
        layer: weights (..., out, in).
        sliced: a result of `take_inputs`, which changes.
        kept: (..., k) all inputs of the slice from now on, in the slice's order.
        places: (n,) where in `kept` the new inputs are, numbered through all experts of a stack.
        transposed: the copy that a neuron-major slice was taken from. Default: made here.

    Raises:
        ValueError: for inputs that are out of range or not distinct.
    """
    if isinstance(layer, SummedLinear):
        put_inputs(layer.linear, sliced.linear, kept, places, transposed)
        return
    count = experts(layer)
    check_indices(np.sort(kept), inputs(layer), count)
    base, smaller, indices = base_layer(layer), base_layer(sliced), kept.reshape(-1)[places]
    if isinstance(smaller, NeuronMajor):
        rows = indices if count is None else indices + places // kept.shape[-1] * inputs(layer)
        put_outputs(transposed or transposed_copy(base), smaller, places, rows)
    elif isinstance(smaller, Scattered):
        smaller.move(base, kept)
    elif count is not None:
        _put_experts(base, smaller, kept, _changed(places, kept))
    elif "scales" not in base:
        where = mx.broadcast_to(mx.array(places)[None], (outputs(base), len(places)))
        columns = _columns(base.weight, indices)
        smaller.weight = mx.put_along_axis(smaller.weight, where, columns, axis=1)
    else:
        smaller.update(without_bias(_requantized(base, kept)).parameters())
    bias = bias_of(layer)
    if count is not None:
        changed = _changed(places, kept)
        if is_adapted(layer):
            columns = _columns(layer.lora_a[mx.array(changed)], kept[changed])
            sliced.lora_a = overwritten(sliced.lora_a, changed, columns)
        if "bias" in sliced:
            rows = mx.zeros_like(sliced.bias[:1]) if bias is None else bias[mx.array(changed)]
            sliced.bias = overwritten(sliced.bias, changed, rows)
        return
    if is_adapted(layer):
        rows = layer.lora_a[mx.array(indices)]
        sliced.lora_a = overwritten(sliced.lora_a, places, rows)
    sliced.pop("bias", None)
    if bias is not None:
        sliced.bias = bias


def _changed(places: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the experts of a stack with new inputs; see `put_inputs`."""
    return np.unique(places // kept.shape[-1])


def _put_experts(
    layer: nn.Module, sliced: nn.Module, kept: np.ndarray, changed: np.ndarray
) -> None:
    """Slice some experts of a stack anew, in place; see `put_inputs`."""
    which = mx.array(changed)
    names = [n for n in ("weight", "scales", "biases", "global_scale") if layer.get(n) is not None]
    chosen = with_arrays(layer, **{name: layer[name][which] for name in names})
    if "scales" in layer:
        fresh = _requantized(chosen, kept[changed])
    else:
        fresh = with_arrays(chosen, weight=_columns(chosen.weight, kept[changed]))
    for name in names:
        sliced[name] = overwritten(sliced[name], changed, fresh[name])


class MeanCompensation(NamedTuple):
    """Constants that replace the inputs that a slice dropped.

    Attributes:
        inputs: (..., in) values of all inputs, for each expert of a stack.
        output: (out,) the layer's output for these inputs, without its bias; not for stacks.
            Default: computed.
        dtype: the dtype that the model computes in. Default: that of the inputs.
    """

    inputs: mx.array
    output: mx.array | None = None
    dtype: mx.Dtype | None = None


def add_mean_compensation(
    layer: nn.Module,
    sliced: nn.Module,
    kept: np.ndarray,
    means: MeanCompensation,
    changed: np.ndarray | None = None,
) -> None:
    """Add the dropped inputs' constant output to the bias of a slice.

    It is a small difference of large vectors, so it is computed in float32 and rounded at the end.
    A stack adds the bias of each expert to its output before the outputs of a token's experts are
    weighted and summed, so the constants are weighted like the rest of the expert.

    Args:
        layer: weights (..., out, in).
        sliced: a result of `take_inputs`, which changes.
        kept: (..., k) the inputs in the slice, in the slice's order.
        means: the values that replace the dropped inputs.
        changed: the experts of a stack to compensate. Default: all.
    """
    if isinstance(layer, SummedLinear):
        add_mean_compensation(layer.linear, sliced.linear, kept, means)
        return
    bias, sliced_without_bias = bias_of(layer), without_bias(sliced)
    constants, output = means.inputs.astype(mx.float32), means.output
    dtype = means.dtype or means.inputs.dtype
    if experts(layer) is not None:
        _compensate_experts(layer, sliced, kept, constants, changed, dtype)
        return
    if output is None:
        output = without_bias(layer)(constants[None])[0]
    dropped = output - sliced_without_bias(constants[mx.array(kept)][None])[0]
    total = dropped if bias is None else dropped + bias
    sliced.bias = total.astype(dtype)


def _compensate_experts(
    layer: nn.Module,
    sliced: nn.Module,
    kept: np.ndarray,
    constants: mx.array,
    changed: np.ndarray | None,
    dtype: mx.Dtype,
) -> None:
    """Compensate some experts of a stack; see `add_mean_compensation`.

    Args:
        layer: weights (experts, out, in).
        sliced: a result of `take_inputs`, which changes.
        kept: (experts, k) the inputs in the slice.
        constants: (experts, in) float32 values of all inputs.
        changed: the experts to compensate. Default: all.
        dtype: the dtype of the bias.
    """
    count = len(kept)
    changed = np.arange(count) if changed is None else changed
    which = mx.array(changed)
    constants = constants[which][:, None]
    kept_constants = mx.take_along_axis(constants, mx.array(kept[changed])[:, None], axis=-1)
    output = without_bias(layer)(constants, which)
    total = (output - without_bias(sliced)(kept_constants, which))[:, 0]
    bias = bias_of(layer)
    if bias is not None:
        total = total + bias[which]
    before = sliced.get("bias", mx.zeros((count, outputs(layer))) if bias is None else bias)
    sliced.bias = overwritten(before.astype(dtype), changed, total.astype(dtype))
