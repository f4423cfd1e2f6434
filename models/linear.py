"""Smaller copies of linear layers: some of the outputs, or some of the inputs."""

import copy
import weakref
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Linear = nn.Linear | nn.QuantizedLinear


def is_linear(module: object) -> bool:
    """Whether this is a layer that can be sliced here; subclasses may compute something else."""
    return type(module) in (nn.Linear, nn.QuantizedLinear)


def outputs(layer: Linear) -> int:
    """The number of output features."""
    return layer.weight.shape[0]


def inputs(layer: Linear) -> int:
    """The number of input features."""
    columns = layer.weight.shape[1]
    return columns * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else columns


def check_indices(indices: np.ndarray, size: int) -> None:
    """Refuse indices that MLX, which does not check bounds, would read garbage for.

    Raises:
        ValueError: unless `indices` is a non-empty, strictly increasing integer vector in
            [0, size).
    """
    if indices.ndim != 1 or len(indices) == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("neuron indices must be a non-empty vector of integers")
    if indices[0] < 0 or indices[-1] >= size or np.any(np.diff(indices) <= 0):
        raise ValueError(f"neuron indices must be strictly increasing and within 0..{size - 1}")


def _with(layer: Linear, **arrays: mx.array | None) -> Linear:
    """A shallow copy of a layer with other arrays, and without those that are None."""
    layer = copy.copy(layer)
    for name, array in arrays.items():
        if array is None:
            layer.pop(name, None)
        else:
            setattr(layer, name, array)
    return layer


def take_outputs(layer: Linear, indices: np.ndarray) -> Linear:
    """Keep some outputs. Exact in every quantization mode, since a row's groups stay whole.

    Args:
        layer: weights (out, in).
        indices: (k,) outputs to keep, checked by `check_indices`.

    Returns:
        A layer of the same kind with weights (k, in).
    """
    check_indices(indices, outputs(layer))
    rows = mx.array(indices)
    return _with(layer, **{name: layer[name][rows] for name in _per_output(layer)})


def _per_output(layer: nn.Module) -> list[str]:
    """The names of a layer's arrays, all of which have a row an output."""
    names = ("weight", "scales", "biases", "bias")
    return [name for name in names if layer.get(name) is not None]


def put_outputs(layer: Linear, into: Linear, places: np.ndarray, indices: np.ndarray) -> None:
    """Put some outputs of a layer in the places of others in a slice of it, which changes.

    Args:
        layer: weights (out, in).
        into: what `take_outputs` made of it.
        places: (n,) outputs of the slice.
        indices: (n,) outputs of the layer.
    """
    where, rows = mx.array(places), mx.array(indices)
    for name in _per_output(layer):
        array = into[name]
        wide = _widest(array)
        moved = array.view(wide)
        moved[where] = layer[name].view(wide)[rows]
        into[name] = moved.view(array.dtype)


def _widest(array: mx.array) -> mx.Dtype:
    """The type to move an array's rows as: MLX's CPU build moves them element by element."""
    fits = mx.default_device() == mx.cpu and array.ndim == 2 and array[0].nbytes % 8 == 0
    return mx.uint64 if fits else array.dtype


def dense_weight(layer: nn.Module, rows: slice = slice(None)) -> mx.array:
    """The float weights of a layer as they are held, or some rows of them."""
    if "scales" not in layer:
        return layer.weight[rows]
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight[rows],
        layer.scales[rows],
        None if biases is None else biases[rows],
        layer.group_size,
        layer.bits,
        layer.mode,
    )


class ScatteredLinear(nn.Module):
    """A linear layer that is given some of its inputs; the others count as zero."""

    def __init__(self, layer: nn.QuantizedLinear, indices: np.ndarray) -> None:
        super().__init__()
        self.layer = _with(layer, bias=None)
        if "bias" in layer:
            self.bias = layer.bias
        self._indices, self._inputs = mx.array(indices), inputs(layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., k) kept inputs to (..., out)."""
        full = mx.zeros((*x.shape[:-1], self._inputs), x.dtype)
        full[..., self._indices] = x
        y = self.layer(full)
        return y + self.bias if "bias" in self else y


def _columns(weight: mx.array, indices: np.ndarray) -> mx.array:
    """Columns of (out, in), contiguous; on a CPU 18 times faster than indexing with an array."""
    every_row = mx.broadcast_to(mx.array(indices)[None], (weight.shape[0], len(indices)))
    return mx.take_along_axis(weight, every_row, axis=1)


def _requantized(layer: nn.QuantizedLinear, indices: np.ndarray) -> nn.QuantizedLinear:
    columns = _columns(dense_weight(layer), indices)
    weight, scales, *biases = mx.quantize(columns, layer.group_size, layer.bits, layer.mode)
    biases = biases[0] if biases else None
    return _with(layer, weight=weight, scales=scales, biases=biases)


class NeuronMajor(nn.Module):
    """A quantized layer held the other way round: a row an input, quantized along its outputs.

    Rows can then be taken exactly, which takes no time; but the matrix is quantized once more.
    """

    def __init__(self, layer: nn.QuantizedLinear) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        if outputs(layer) % layer.group_size:
            raise ValueError(
                f"the down policy neuron-major cannot quantize {outputs(layer)} outputs in groups "
                f"of {layer.group_size}; use another one"
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


# By the identity of a layer: its weight, and the same the other way round. Made once, not by slice.
_turned: dict[int, tuple[mx.array, NeuronMajor]] = {}


def _turn(layer: nn.QuantizedLinear) -> NeuronMajor:
    weight, turned = _turned.get(id(layer), (None, None))
    if weight is not layer.weight:
        turned = NeuronMajor(layer)
        mx.eval(turned.parameters())
        _turned[id(layer)] = layer.weight, turned
        weakref.finalize(layer, _turned.pop, id(layer), None)
    return turned


def release(layer: Linear, fresh: Linear) -> None:
    """Let go of a layer's arrays, and of what was made of them, for the same ones not loaded."""
    _turned.pop(id(layer), None)
    layer.update(fresh.parameters())


def _neuron_major(layer: nn.QuantizedLinear, indices: np.ndarray) -> NeuronMajor:
    return _with(take_outputs(_turn(layer), indices), bias=layer.get("bias"))


# How a quantized layer gives up some of its inputs. Groups of inputs share a scale, so columns
# cannot be taken as they are; docs/results.md has the comparison behind the choice.
DOWN_POLICIES: dict[str, Callable[[nn.QuantizedLinear, np.ndarray], nn.Module]] = {
    "neuron-major": _neuron_major,
    "requantize": _requantized,
    "scatter": ScatteredLinear,
}


def default_down_policy() -> str:
    """The policy that is best where MLX computes.

    On a CPU the neuron-major product is 3.5 times as fast as the other one, and its slices are
    rows. On Metal the other one has the tuned kernels (qmv_fast), and quantizing is fast, too.
    """
    return "neuron-major" if mx.default_device() == mx.cpu else "requantize"


def input_multiple(layer: Linear) -> int:
    """What a number of inputs to keep should be rounded to.

    Metal's fast matrix-vector kernels read quantized rows in blocks of 512 inputs (256 from 6 bits
    on); where that is too coarse for the layer, whole groups are still needed.
    """
    if not isinstance(layer, nn.QuantizedLinear):
        return 32
    block = 512 if layer.bits < 6 else 256
    return block if inputs(layer) >= 16 * block else layer.group_size


class Rest(NamedTuple):
    """What the inputs that a slice does not have are taken to be, for every token.

    Attributes:
        inputs: (in,) values for all inputs, in the type that the model computes in.
        output: (out,) what the layer, without its bias, gives for these. Default: computed.
    """

    inputs: mx.array
    output: mx.array | None = None


def fill(layer: Linear, sliced: nn.Module, kept: np.ndarray, rest: Rest) -> None:
    """Give a slice of a layer, made by `take_inputs`, the bias that stands for the other inputs.

    Args:
        layer: weights (out, in).
        sliced: the slice, which changes.
        kept: (k,) the inputs that it has, in the order of their places.
        rest: what the others are taken to be.
    """
    own = layer.get("bias")
    bare = _with(sliced, bias=None)
    output = _with(layer, bias=None)(rest.inputs[None])[0] if rest.output is None else rest.output
    others = output - bare(rest.inputs[mx.array(kept)][None])[0]
    sliced.bias = others if own is None else others + own


def take_inputs(layer: Linear, indices: np.ndarray, policy: str = "requantize") -> nn.Module:
    """Keep some inputs.

    Args:
        layer: weights (out, in).
        indices: (k,) inputs to keep, checked by `check_indices`.
        policy: for quantized layers, a key of `DOWN_POLICIES`. "requantize" quantizes the kept
            columns again in the layer's own format: fewest bytes, a small error. "neuron-major"
            takes them from a copy of the whole layer that is quantized along its outputs, made
            once: as few bytes, as small an error, slices in no time, but memory for the copy.
            "scatter" keeps the whole layer and places the k inputs among zeros: exact, and no
            bytes are saved.

    Returns:
        A layer that maps (..., k) to (..., out).

    Raises:
        ValueError: for indices out of range, an unknown policy, with "requantize" a k that is not
            a multiple of the layer's group size, with "neuron-major" such a number of outputs.
    """
    check_indices(indices, inputs(layer))
    if policy not in DOWN_POLICIES:
        raise ValueError(f"down policy {policy!r} is not one of {', '.join(DOWN_POLICIES)}")
    if isinstance(layer, nn.QuantizedLinear):
        if policy == "requantize" and len(indices) % layer.group_size:
            raise ValueError(
                f"{len(indices)} inputs cannot be quantized in groups of {layer.group_size}"
            )
        return DOWN_POLICIES[policy](layer, indices)
    return _with(layer, weight=_columns(layer.weight, indices))


def put_inputs(layer: Linear, into: nn.Module, places: np.ndarray, indices: np.ndarray) -> bool:
    """Put some inputs of a layer in the places of others in a slice of it, which changes.

    Args:
        layer: weights (out, in).
        into: what `take_inputs` made of it.
        places: (n,) inputs of the slice.
        indices: (n,) inputs of the layer.

    Returns:
        Whether that can be done; not where inputs share scales.
    """
    if isinstance(into, NeuronMajor):
        put_outputs(_turn(layer), into, places, indices)
    elif type(into) is nn.Linear:
        where = mx.broadcast_to(mx.array(places)[None], (outputs(layer), len(places)))
        columns = _columns(layer.weight, indices)
        into.weight = mx.put_along_axis(into.weight, where, columns, axis=1)
    else:
        return False
    return True
