"""How a model is divided over several processes, and which part of it is in this one.

Tensor-parallel, each rank holds some of the neurons of every FFN, the same number of them. In a
pipeline, each rank holds some of the layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .ranks import Ranks

_ATTRIBUTE = "_division"


@dataclass(frozen=True)
class Division:
    """How a model is divided.

    Attributes:
        ranks: the ranks that the model is divided over.
        is_pipeline: whether ranks hold layers, and not neurons.
        shapes: the shape (m,) or (experts, m) of every FFN of the whole model, by path.
        here: the paths of the FFNs that this rank holds, or holds neurons of.
        split: the paths of the FFNs whose neurons are divided over the ranks.
        layers: the number of layers of the whole model.
    """

    ranks: Ranks
    is_pipeline: bool
    shapes: Mapping[str, tuple[int, ...]]
    here: frozenset[str]
    split: frozenset[str]
    layers: int

    def part(self, path: str, values: np.ndarray) -> np.ndarray:
        """Return this rank's part (..., m / ranks) of an array (..., m) over an FFN's neurons."""
        if path not in self.split:
            return values
        width = values.shape[-1] // self.ranks.size
        return values[..., self.ranks.rank * width : (self.ranks.rank + 1) * width]

    def parts(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return this rank's parts of arrays (..., m) over the neurons of all FFNs, by path."""
        return {p: self.part(p, values) for p, values in arrays.items() if p in self.here}

    def whole(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put arrays over the neurons of this rank's FFNs together with those of all other ranks.

        Args:
            arrays: (..., m / ranks) for each FFN in `split`, and (..., m) for each other FFN.

        Returns:
            (..., m) for each FFN of the model, in the order of the layers.
        """
        parts = self.ranks.gather(dict(arrays))
        found = {p: [part[p] for part in parts if p in part] for p in self.shapes}
        return {
            path: np.concatenate(values, axis=-1) if path in self.split else values[0]
            for path, values in found.items()
        }

    def total(self, path: str, values: mx.array) -> mx.array:
        """Return the sum over ranks of what each computes from its neurons of an FFN, lazily."""
        return self.ranks.sum(values) if path in self.split else values


def division_of(model: nn.Module) -> Division | None:
    """Return how a model is divided, or None if all of it is in this process."""
    return getattr(model, _ATTRIBUTE, None)


def mark(model: nn.Module, division: Division) -> None:
    """Note on a model how it is divided, for `division_of`."""
    setattr(model, _ATTRIBUTE, division)
