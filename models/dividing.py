"""Divide a model over several processes, as mlx-lm does for its own commands."""

from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from .adapters import base_layer, is_adapted
from .discovery import find_ffns
from .division import Division, mark
from .ffn import FFN
from .linear import is_quantized
from .ranks import Ranks
from .summed import is_summed, summed

# The names of the numbers of attention heads, which are divided, too.
_HEADS = ("n_heads", "n_kv_heads", "num_heads", "num_attention_heads", "num_key_value_heads")


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
    shapes = {ffn.path: ffn.shape for ffn in ffns}  # before some layers change in place
    if is_pipeline:
        _into_layers(model, ranks)
    else:
        _into_neurons(model, ranks, ffns)
    # With one head, the values and outputs of attention look like an FFN.
    here = {ffn.path: ffn.shape for ffn in find_ffns(model) if ffn.path in shapes}
    split = {path for path, shape in here.items() if shape != shapes[path]}
    for path in split:
        *experts, width = shapes[path]
        if here[path] != (*experts, width // ranks.size):
            raise ValueError(f"mlx-lm divides {path} of this architecture in an unknown way")
    mark(model, Division(ranks, is_pipeline, shapes, frozenset(here), frozenset(split), layers))


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
