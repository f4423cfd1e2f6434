"""A model that is divided over several processes, and this process's part of it.

Tensor-parallel, each rank holds some of the neurons of every FFN, the same number of them. In a
pipeline, each rank holds some of the layers. Both are mlx-lm's work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .adapters import base_layer, is_adapted
from .discovery import find_ffns
from .ffn import FFN
from .linear import is_quantized
from .ranks import Ranks
from .summed import is_summed, summed

# The names of the numbers of attention heads, which are divided, too.
_HEADS = ("n_heads", "n_kv_heads", "num_heads", "num_attention_heads", "num_key_value_heads")


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
    return getattr(model, "_division", None)


def divide(model: nn.Module, ranks: Ranks, is_pipeline: bool) -> None:
    """Divide a model over ranks in place. Its weights may be lazy, and stay so.

    Args:
        model: the whole model, the same on all ranks.
        ranks: the ranks.
        is_pipeline: whether to divide layers, and not neurons.

    Raises:
        ValueError: if the model cannot be divided, with the reason.
    """
    ffns, layers = find_ffns(model), len(model.layers)
    if is_pipeline:
        _into_layers(model, ranks)
    else:
        _into_neurons(model, ranks, ffns)
    here = {ffn.path: ffn.shape for ffn in find_ffns(model)}
    shapes = {ffn.path: ffn.shape for ffn in ffns}
    split = {path for path, shape in here.items() if shape != shapes.get(path)}
    for path in split:
        *experts, width = shapes.get(path, (0,))
        if here[path] != (*experts, width // ranks.size):
            raise ValueError(f"mlx-lm divides {path} of this architecture in an unknown way")
    model._division = Division(
        ranks, is_pipeline, shapes, frozenset(here), frozenset(split), layers
    )


def _into_layers(model: nn.Module, ranks: Ranks) -> None:
    """Give each rank some of the layers."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "pipeline"):
        raise ValueError(
            f"mlx-lm cannot run models of type {_kind(model)} as a pipeline; leave out --pipeline, "
            "or use one machine"
        )
    if len(inner.layers) < ranks.size:
        raise ValueError(
            f"the model's {len(inner.layers)} layers are fewer than the {ranks.size} machines; use "
            "fewer"
        )
    inner.pipeline(ranks.group)


def _into_neurons(model: nn.Module, ranks: Ranks, ffns: list[FFN]) -> None:
    """Give each rank some of the neurons and attention heads."""
    if not hasattr(model, "shard"):
        raise ValueError(
            f"mlx-lm cannot run models of type {_kind(model)} tensor-parallel; use --pipeline or "
            "one machine"
        )
    _check_sizes(model, ranks.size, ffns)
    model.shard(ranks.group)
    layers = [(p, summed(layer)) for p, layer in model.named_modules() if is_summed(layer)]
    model.update_modules(tree_unflatten(layers))


def _kind(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


def _check_sizes(model: nn.Module, count: int, ffns: list[FFN]) -> None:
    """Check that neurons, their quantization groups and attention heads can be divided."""
    advice = "use another number, --pipeline or one machine"
    for ffn in ffns:
        if ffn.width % count:
            raise ValueError(
                f"the {ffn.width} neurons of {ffn.path} cannot be divided over {count} machines; "
                f"{advice}"
            )
        down = base_layer(ffn.contract[1])
        if is_quantized(down) and ffn.width // count % down.group_size:
            raise ValueError(
                f"the {ffn.width} neurons of {ffn.path} in quantization groups of "
                f"{down.group_size} cannot be divided over {count} machines; {advice}"
            )
    for path, module in model.named_modules():
        if is_adapted(module):
            raise ValueError("mlx-lm cannot divide a model with adapters; fuse them first")
        for name in _HEADS if "o_proj" in module else ():
            heads = getattr(module, name, None)
            if isinstance(heads, int) and heads % count:
                raise ValueError(
                    f"the {heads} attention heads ({name}) of {path} cannot be divided over "
                    f"{count} machines; {advice}"
                )
