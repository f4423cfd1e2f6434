"""Feed-forward networks: what a module must compute to be one, and smaller ones from its neurons.

The output of an FFN is a sum over its neurons. Neuron j is what one column of the contracting
projection (down) is multiplied with, and depends on its own rows of the expanding ones alone:
h_j = act(gate_j · x) * (up_j · x), or act(in_j · x). Whether a module is like that is found out by
trying it with a few random neurons, so that its class, names and activation do not matter.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .linear import (
    Linear,
    Rest,
    check_indices,
    fill,
    input_multiple,
    inputs,
    is_linear,
    outputs,
    put_inputs,
    put_outputs,
    release,
    take_inputs,
    take_outputs,
)

# (FFN path, hidden vectors) to the hidden vectors that the FFN goes on with.
Watch = Callable[[str, mx.array], mx.array]

# Where the rows of m neurons are in an expanding projection: one each, or two, a gate's and
# another; these are in two halves, or side by side.
LAYOUTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "single": lambda indices, m: indices,
    "halves": lambda indices, m: np.concatenate([indices, indices + m]),
    "interleaved": lambda indices, m: np.stack([2 * indices, 2 * indices + 1], -1).reshape(-1),
}


class Tap(nn.Module):
    """A projection whose input passes through a function first, and its output through another."""

    def __init__(self, layer: nn.Module, path: str, watch: Watch, after: Watch | None) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._watch, self._after = path, watch, after

    def __call__(self, x: mx.array) -> mx.array:
        """Show (..., m) hidden vectors, project what comes back, and show that."""
        y = self.layer(self._watch(self._path, x))
        return y if self._after is None else self._after(self._path, y)


class Sampled(nn.Module):
    """An FFN that shows what it computes for some tokens of a long text, evenly spaced.

    Of a model's last FFN, whose outputs for a prompt are not used, no more is then computed.

    Args:
        module: the FFN.
        tapped: the same with taps.
        count: how many tokens to show, at least half and at most all of them.
    """

    def __init__(self, module: nn.Module, tapped: nn.Module, count: int) -> None:
        super().__init__()
        self.module, self.tapped = module, tapped
        self._count = count

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Compute what the FFN does, for (batch, T, hidden) showing less than all of it."""
        every = -(-x.shape[-2] // self._count)
        if every == 1 or x.ndim != 3 or args or kwargs:  # other arguments may be of each token
            return self.tapped(x, *args, **kwargs)
        self.tapped(x[:, ::every])
        return self.module(x)


@dataclass(frozen=True)
class FFN:
    """One feed-forward network inside an mlx-lm model.

    Attributes:
        path: where its module is in the model, such as "model.layers.3.mlp".
        expand: names and layers of the projections whose outputs are neurons (gate and up).
        contract: name and layer of the projection whose inputs are neurons (down).
        layout: where the neurons' rows are in the expanding projections, a key of `LAYOUTS`.
    """

    path: str
    expand: dict[str, Linear]
    contract: tuple[str, Linear]
    layout: str = "single"

    @property
    def width(self) -> int:
        """The number of neurons m."""
        return inputs(self.contract[1])

    @property
    def multiple(self) -> int:
        """What the number of kept neurons should be rounded to."""
        return input_multiple(self.contract[1])

    @property
    def kind(self) -> str:
        """How it is written: "gated", "plain", or with gate and up in one matrix."""
        if self.layout == "single":
            return "gated" if len(self.expand) == 2 else "plain"
        return f"gate and up in one, {self.layout}"

    def tapped(self, watch: Watch, after: Watch | None = None) -> dict[str, nn.Module]:
        """Modules to put in place of the FFN's own, so that its hidden vectors can be watched.

        Args:
            watch: see `Watch`.
            after: is shown its outputs in the same way, if they have no bias.
        """
        name, down = self.contract
        return {name: Tap(down, self.path, watch, None if "bias" in down else after)}

    def sliced(self, indices: np.ndarray, policy: str) -> dict[str, nn.Module]:
        """Modules to put in place of the FFN's own, so that it computes some of its neurons.

        Args:
            indices: (k,) neurons to keep, strictly increasing.
            policy: how a quantized down projection is sliced, see `linear.take_inputs`.
        """
        if len(indices) == self.width:
            return {}
        name, down = self.contract
        smaller = take_inputs(down, indices, policy)
        rows = LAYOUTS[self.layout](indices, self.width)
        return {n: take_outputs(layer, rows) for n, layer in self.expand.items()} | {name: smaller}

    def move(
        self, parts: Mapping[str, nn.Module], before: np.ndarray, indices: np.ndarray
    ) -> np.ndarray | None:
        """Put new neurons in the places of others in a slice, which costs less than a new one.

        Args:
            parts: what `sliced` made, which changes.
            before: (k,) its neurons, in the order of their places.
            indices: (k,) the neurons wanted.

        Returns:
            (k,) the neurons in the order of their places now, or None if that cannot be done.
        """
        name, down = self.contract
        check_indices(indices, self.width)
        places = np.flatnonzero(~np.isin(before, indices, assume_unique=True))
        new = np.setdiff1d(indices, before, assume_unique=True)
        after = before.copy()
        after[places] = new
        if not put_inputs(down, parts[name], places, new):
            return None
        layout = LAYOUTS[self.layout]
        for n, layer in self.expand.items():
            put_outputs(layer, parts[n], layout(places, len(before)), layout(new, self.width))
        return after

    def fill(self, parts: Mapping[str, nn.Module], kept: np.ndarray, rest: Rest) -> None:
        """Give a slice what stands in for the neurons it does not have. Without it: zero.

        Args:
            parts: what `sliced` made; down's bias changes.
            kept: (k,) its neurons, in the order of their places.
            rest: what the other neurons are taken to be, for every token.
        """
        name, down = self.contract
        fill(down, parts[name], kept, rest)

    def release(self, fresh: "FFN") -> None:
        """Free the dense weights; when they are used again, they are loaded as those of `fresh`."""
        for name, layer in self.expand.items():
            release(layer, fresh.expand[name])
        release(self.contract[1], fresh.contract[1])


# What modules were found to be, by what tells them apart; see `_identity`.
Known = dict[Any, bool]


def find_ffn(path: str, module: nn.Module, known: Known) -> FFN | None:
    """Return the FFN that a module is, or None if it is none that can be sliced.

    Its projections are its direct children; what else it has (an activation, norms before or
    after) is of no matter as long as it treats neurons one by one.

    Args:
        path: where the module is in the model.
        module: the module.
        known: what was found about other modules of the model, which this adds to.
    """
    candidates = list(_candidates(path, module))
    identity = _identity(module) if candidates else None
    for ffn in candidates:
        key = identity, *ffn.expand, ffn.contract[0], ffn.layout
        if key not in known:
            known[key] = _adds_up(module, ffn)
        if known[key]:
            return ffn
    return None


def _identity(module: nn.Module) -> Any:
    """Equal for modules that compute the same with other weights."""
    settings = {name: repr(value) for name, value in vars(module).items()}
    children = {name: type(child) for name, child in module.children().items()}
    return type(module), str(settings), str(children)


def _candidates(path: str, module: nn.Module) -> Iterator[FFN]:
    """What the FFN of a module can be, going by the shapes of its layers."""
    layers = {name: layer for name, layer in module.children().items() if is_linear(layer)}
    for name, down in layers.items():
        m = inputs(down)
        others = {n: layer for n, layer in layers.items() if n != name}
        same = [n for n, layer in others.items() if outputs(layer) == m]
        for chosen in (*combinations(same, 2), *combinations(same, 1)):
            if len({inputs(layers[n]) for n in chosen}) == 1:
                yield FFN(path, {n: layers[n] for n in chosen}, (name, down))
        for n in others:
            if outputs(layers[n]) == 2 * m:
                for layout in ("halves", "interleaved"):
                    yield FFN(path, {n: layers[n]}, (name, down), layout)


class _Trial(nn.Linear):
    """A linear layer with given weights; making it does not touch MLX's own random state."""

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias


# Few neurons are enough to try a module with, and cost nothing at any width.
_TRIED = 8


def _adds_up(module: nn.Module, ffn: FFN) -> bool:
    """Whether a module's output is a sum over its neurons, tried with a few random ones."""
    keys = iter(mx.random.split(mx.random.key(0), 8))
    name, down = ffn.contract
    hidden = inputs(next(iter(ffn.expand.values())))

    def small(layer: Linear, rows: int, columns: int) -> nn.Linear:
        weight = mx.random.normal((rows, columns), key=next(keys)) * columns**-0.5
        return _Trial(
            weight, mx.random.normal((rows,), key=next(keys)) if "bias" in layer else None
        )

    rows = len(LAYOUTS[ffn.layout](np.arange(_TRIED), _TRIED))
    expand = {n: small(layer, rows, hidden) for n, layer in ffn.expand.items()}
    contract = small(down, outputs(down), _TRIED)
    silent = _Trial(mx.zeros_like(contract.weight), contract.get("bias"))
    tried = FFN(ffn.path, expand, (name, contract), ffn.layout)
    x = mx.random.normal((1, 3, hidden), key=next(keys))

    def run(parts: dict[str, nn.Module]) -> mx.array:
        changed = copy.copy(module)
        for n, part in (expand | {name: contract} | parts).items():
            changed[n] = part
        return changed(x, *[None] * _required(module))

    def only(*neurons: int) -> mx.array:
        return run(tried.sliced(np.array(neurons), "requantize"))

    try:
        nothing, everything = run({name: silent}), run({})
        sum_of_parts = only(0, 2, 3) + only(1, 4, 5, 6, 7) - nothing
        scale, error = mx.abs(everything - nothing).max(), mx.abs(sum_of_parts - everything).max()
        return 0 <= error.item() < 1e-4 * scale.item()
    except Exception:  # whatever a module does that is not made for this
        return False


def _required(module: nn.Module) -> int:
    """How many arguments a module must be called with beside its input."""
    parameters = inspect.signature(module).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) - 1
