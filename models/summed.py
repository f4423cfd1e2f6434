"""A down projection whose inputs are divided over the ranks of a group.

mlx-lm shards a down projection as one layer of MLX, which projects a rank's neurons, sums the
outputs over ranks and adds the bias. Here the projection is a layer of its own, which is sliced as
any other. Constants for a rank's dropped neurons are its bias, and so are summed over ranks, too.
"""

import copy

import mlx.core as mx
import mlx.nn as nn

# MLX's layers, and the plain layers that project in the same way.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.ShardedToAllLinear: nn.Linear,
    nn.QuantizedShardedToAllLinear: nn.QuantizedLinear,
}


class SummedLinear(nn.Module):
    """A layer whose outputs are summed over ranks.

    Args:
        linear: projects this rank's inputs.
        group: the group of ranks.
        bias: (out,) added to the sum, or None.
    """

    def __init__(
        self, linear: nn.Module, group: mx.distributed.Group, bias: mx.array | None
    ) -> None:
        super().__init__()
        self.linear = linear
        self._group = group
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., in) of this rank to (..., out), the same on all ranks."""
        y = mx.distributed.all_sum(self.linear(x), group=self._group)
        return y + self.bias if "bias" in self else y

    def with_linear(self, linear: nn.Module) -> "SummedLinear":
        """Return a layer that projects otherwise, with the same bias and ranks."""
        changed = copy.copy(self)
        changed.linear = linear
        return changed


def is_summed(layer: nn.Module) -> bool:
    """Return whether a layer is one of MLX's whose outputs are summed over ranks."""
    return type(layer) in _PLAIN


def summed(layer: nn.Module) -> SummedLinear:
    """Return one of MLX's layers as a `SummedLinear`, which computes the same bit for bit."""
    plain = _PLAIN[type(layer)]
    linear = plain.__new__(plain)
    nn.Module.__init__(linear)
    for name in ("weight", "scales", "biases"):
        if layer.get(name) is not None:
            setattr(linear, name, layer[name])
    for name in ("group_size", "bits", "mode"):
        if hasattr(layer, name):
            setattr(linear, name, getattr(layer, name))
    return SummedLinear(linear, layer.group, layer.get("bias"))
