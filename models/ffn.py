"""One feed-forward network (FFN) of a model, and slices of it.

The output of an FFN is a sum over its neurons. Neuron j is the factor of column j of the
contracting projection (down), and depends only on its own rows of the expanding projections:
h_j = act(gate_j · x) * (up_j · x), or act(in_j · x).

The experts of a mixture are as many FFNs of one width, whose projections are stacks. Each expert
keeps its own neurons, all the same number of them, so that the slices are stacks, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapters import base_layer
from .down import (
    NEURON_MAJOR,
    SCATTER,
    MeanCompensation,
    NeuronMajor,
    add_mean_compensation,
    input_multiple,
    put_inputs,
    take_inputs,
    transposed_copy,
    working_policy,
)
from .linear import (
    check_indices,
    experts,
    inputs,
    is_quantized,
    outputs,
    put_outputs,
    take_outputs,
)
from .modules import named_arrays

# The rows of neurons in an expanding projection with m neurons. Each neuron has one row, or two if
# gate and up are one matrix: in two halves, or interleaved. Neurons (..., n) may be numbered within
# an expert, or through all experts; so are their rows.
LAYOUTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "single": lambda indices, m: indices,
    "halves": lambda indices, m: np.concatenate(
        [first := indices + indices // m * m, first + m], axis=-1
    ),
    "interleaved": lambda indices, m: np.stack([2 * indices, 2 * indices + 1], -1).reshape(
        *indices.shape[:-1], -1
    ),
}


@dataclass(frozen=True)
class _TransposedCopy:
    """A transposed copy of a down projection, and the weights that it was made from."""

    source: mx.array
    layer: NeuronMajor


@dataclass(eq=False)
class FFN:
    """One feed-forward network inside an mlx-lm model.

    Attributes:
        path: the path of its module in the model, such as "model.layers.3.mlp".
        expand: names and layers of the projections whose outputs are neurons (gate and up).
        contract: name and layer of the projection whose inputs are neurons (down).
        layout: the order of the neurons' rows in the expanding projections, a key of `LAYOUTS`.
    """

    path: str
    expand: Mapping[str, nn.Module]
    contract: tuple[str, nn.Module]
    layout: str = "single"
    _transposed: _TransposedCopy | None = field(default=None, init=False, repr=False)

    @property
    def width(self) -> int:
        """The number of neurons m, for a stack those of one expert."""
        return inputs(self.contract[1])

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return outputs(self.contract[1])

    @property
    def experts(self) -> int | None:
        """The number of experts of a stack, or None for a single FFN."""
        return experts(self.contract[1])

    @property
    def members(self) -> list["FFN"]:
        """The FFNs whose arrays are those of this one; this one alone, unless it is a list."""
        return [self]

    @property
    def block_path(self) -> str:
        """The path of the module that computes the FFN of its tokens."""
        return self.path

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of arrays with an entry for each neuron: (m,), or (experts, m) for a stack."""
        return (self.width,) if self.experts is None else (self.experts, self.width)

    @property
    def multiple(self) -> int:
        """The multiple to round the number of kept neurons to."""
        return input_multiple(self.contract[1])

    @property
    def layers(self) -> dict[str, nn.Module]:
        """All projections by name, down last."""
        name, down = self.contract
        return {**self.expand, name: down}

    @property
    def kind(self) -> str:
        """The form: "gated", "plain", or with gate and up in one matrix, and whether of experts."""
        if self.layout == "single":
            form = "gated" if len(self.expand) == 2 else "plain"
        else:
            form = f"gate and up in one, {self.layout}"
        return form if self.experts is None else f"{form} experts"

    def neuron_bytes(self, policy: str) -> int:
        """Return the bytes of weights of all neurons; without down where its slices save none."""
        layers = (
            self.expand.values() if self.down_policy(policy) == SCATTER else self.layers.values()
        )
        return sum(array.nbytes for layer in layers for _, array in named_arrays(layer))

    def copied_bytes(self, policy: str) -> int:
        """Return the bytes of the transposed copy of down that slices are taken from, or 0."""
        _, down = self.contract
        if self.down_policy(policy) != NEURON_MAJOR or not is_quantized(down):
            return 0
        return sum(array.nbytes for _, array in named_arrays(base_layer(down)))

    def transposed_down(self) -> NeuronMajor:
        """Return the transposed copy of a quantized down projection.

        The copy is made once, and again only if the weights were replaced.
        """
        down = base_layer(self.contract[1])
        if self._transposed is None or self._transposed.source is not down.weight:
            layer = transposed_copy(down)
            mx.eval(layer.parameters())
            self._transposed = _TransposedCopy(down.weight, layer)
        return self._transposed.layer

    def down_policy(self, policy: str) -> str:
        """Return the policy by which down is sliced where `policy` is asked for."""
        return working_policy(self.contract[1], policy)

    def sliced(self, indices: np.ndarray, policy: str) -> dict[str, nn.Module]:
        """Return modules that compute only some neurons, to replace the FFN's projections.

        Args:
            indices: (..., k) neurons to keep, strictly increasing, for each expert of a stack.
            policy: how a quantized down projection is sliced; see `linear.take_inputs`, and
                `linear.working_policy` for layers that a policy does not suit.

        Returns:
            Modules by name; none if all neurons are kept.
        """
        if indices.shape == self.shape:
            return {}
        name, down = self.contract
        policy = self.down_policy(policy)
        is_transposed = policy == NEURON_MAJOR and is_quantized(down)
        transposed = self.transposed_down() if is_transposed else None
        smaller = take_inputs(down, indices, policy, transposed)
        rows = LAYOUTS[self.layout](indices, self.width)
        return {n: take_outputs(layer, rows) for n, layer in self.expand.items()} | {name: smaller}

    def move(
        self, parts: Mapping[str, nn.Module], before: np.ndarray, indices: np.ndarray
    ) -> np.ndarray:
        """Replace some neurons of a slice in place, which costs less than a new slice.

        What changes, which may be a few experts of a stack, is not compensated any more.

        Args:
            parts: a result of `sliced`, which changes.
            before: (..., k) the neurons in the slice, in the slice's order.
            indices: (..., k) the neurons to keep from now on, strictly increasing.

        Returns:
            (..., k) the neurons in the slice in their new order.
        """
        check_indices(indices, self.width, self.experts)
        wanted = membership(indices, self.width)
        # The places of dropped neurons, and the neurons for them, expert after expert.
        places = np.flatnonzero(~np.take_along_axis(wanted, before, -1))
        added = np.flatnonzero(wanted & ~membership(before, self.width))
        if len(places) == 0:
            return before
        after: np.ndarray = before.copy()
        after.reshape(-1)[places] = added % self.width
        name, down = self.contract
        is_transposed = isinstance(base_layer(parts[name]), NeuronMajor)
        transposed = self.transposed_down() if is_transposed else None
        put_inputs(down, parts[name], after, places, transposed)
        rows = LAYOUTS[self.layout]
        for n, layer in self.expand.items():
            put_outputs(layer, parts[n], rows(places, before.shape[-1]), rows(added, self.width))
        return after

    def compensate(
        self,
        parts: Mapping[str, nn.Module],
        kept: np.ndarray,
        means: MeanCompensation,
        changed: np.ndarray | None = None,
    ) -> None:
        """Replace the dropped neurons by constants. Without compensation they are zero.

        Args:
            parts: a result of `sliced`; down's bias changes.
            kept: (..., k) the neurons in the slice, in the slice's order.
            means: the values that replace the dropped neurons.
            changed: the experts of a stack to compensate. Default: all.
        """
        name, down = self.contract
        add_mean_compensation(down, parts[name], kept, means, changed)

    def drop_copies(self) -> None:
        """Free the transposed copy of down, which is made again when it is needed."""
        self._transposed = None

    def release(self, fresh: "FFN") -> None:
        """Free the dense weights. When they are needed again, the weights of `fresh` are loaded."""
        self.drop_copies()
        for name, layer in self.layers.items():
            layer.update(fresh.layers[name].parameters())


def membership(indices: np.ndarray, width: int) -> np.ndarray:
    """Return which of m neurons are in a selection, (..., m) bool, for indices (..., k)."""
    members = np.zeros((*indices.shape[:-1], width), bool)
    np.put_along_axis(members, indices, True, axis=-1)
    return members
