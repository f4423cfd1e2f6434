"""FFNs with separate gate, up and down projections: h = act(gate(x)) * up(x), out = down(h)."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .linear import Linear, input_multiple, inputs, is_linear, outputs, take_inputs, take_outputs

# (FFN path, hidden vectors) to the hidden vectors that the FFN goes on with.
Watch = Callable[[str, mx.array], mx.array]


class Tap(nn.Module):
    """A projection whose input passes through a function first."""

    def __init__(self, layer: nn.Module, path: str, watch: Watch) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._watch = path, watch

    def __call__(self, x: mx.array) -> mx.array:
        """Show (..., m) hidden vectors and project what comes back."""
        return self.layer(self._watch(self._path, x))


@dataclass(frozen=True)
class FFN:
    """One feed-forward network inside an mlx-lm model.

    Attributes:
        path: where its module is in the model, such as "model.layers.3.mlp".
        expand: names and layers of the projections whose outputs are neurons (gate and up).
        contract: name and layer of the projection whose inputs are neurons (down).
    """

    path: str
    expand: dict[str, Linear]
    contract: tuple[str, Linear]

    @property
    def width(self) -> int:
        """The number of neurons m."""
        return inputs(self.contract[1])

    @property
    def multiple(self) -> int:
        """What the number of kept neurons should be rounded to."""
        return input_multiple(self.contract[1])

    def tapped(self, watch: Watch) -> dict[str, nn.Module]:
        """Modules to put in place of the FFN's own, so that its hidden vectors can be watched."""
        name, down = self.contract
        return {name: Tap(down, self.path, watch)}

    def sliced(
        self, indices: np.ndarray, policy: str, rest: mx.array | None = None
    ) -> dict[str, nn.Module]:
        """Modules to put in place of the FFN's own, so that it computes some of its neurons.

        Args:
            indices: (k,) neurons to keep, strictly increasing.
            policy: how a quantized down projection is sliced, see `linear.take_inputs`.
            rest: (m,) what the other neurons are taken to be, for every token. Default: zero.
        """
        if len(indices) == self.width:
            return {}
        name, down = self.contract
        parts = {n: take_outputs(layer, indices) for n, layer in self.expand.items()}
        return parts | {name: take_inputs(down, indices, policy, rest)}


def find_gated(path: str, module: nn.Module) -> FFN | None:
    """Return the FFN that a module is, or None if it is not one of this kind."""
    gate, up, down = (module.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(map(is_linear, (gate, up, down))):
        return None
    if not outputs(gate) == outputs(up) == inputs(down):
        return None
    return FFN(path, {"gate_proj": gate, "up_proj": up}, ("down_proj", down))
