"""Where the feed-forward networks (FFNs) of an mlx-lm model are, and how to swap their parts."""

import copy
import re
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .ffn import FFN, Known, Sampled, Watch, find_ffn
from .linear import DOWN_POLICIES, Rest, default_down_policy, dense_weight, is_linear, outputs

__all__ = [
    "DOWN_POLICIES",
    "FFN",
    "Rest",
    "Watch",
    "default_down_policy",
    "find_ffns",
    "fingerprint",
    "has_experts",
    "layer_order",
    "weight_bytes",
    "with_modules",
    "with_taps",
]

# Model types whose FFN looks sliceable and is not.
REFUSED = {
    "gemma3n": "its activation depends on the mean over all neurons of a layer",
    "bitnet": "it normalises over all neurons of a layer",
    "prism_hadamard_qwen35": "it rotates the neurons of a layer into each other",
}

# An expert in a list; it sees only the tokens that are routed to it.
_EXPERT = re.compile(r"\bexperts\.\d+$")


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find the FFNs of a model that can be sliced, by what its modules compute (see `ffn`).

    Of a mixture of experts these are the FFNs that every token goes through: dense layers and
    shared experts. Routed experts stay as they are.

    Returns:
        The FFNs in the order of the layers.

    Raises:
        ValueError: if there is none, or if slicing them would be unsound, with the reason.
    """
    kind = getattr(model, "model_type", type(model).__name__)
    if kind in REFUSED:
        raise ValueError(f"models of type {kind} cannot be sliced: {REFUSED[kind]}")
    modules = dict(model.named_modules())
    if any(hasattr(module, "lora_a") for module in modules.values()):
        raise ValueError(
            "this model has adapters that are not fused into its weights; "
            "give adapter_path to glass_mlx.load, which fuses them"
        )
    known: Known = {}
    found = (find_ffn(path, m, known) for path, m in modules.items() if not _EXPERT.search(path))
    ffns = [ffn for ffn in found if ffn is not None]
    if not ffns:
        reason = (
            "all its neurons are in routed experts, which are not sliced"
            if has_experts(model)
            else "no feed-forward network was found in it that treats its neurons one by one"
        )
        raise ValueError(f"models of type {kind} cannot be sliced: {reason}")
    return sorted(ffns, key=lambda ffn: layer_order(ffn.path))


def has_experts(model: nn.Module) -> bool:
    """Whether a model has routed experts, in a list or with their weights in one array."""
    return any(
        isinstance(module, (SwitchLinear, QuantizedSwitchLinear)) or _EXPERT.search(path)
        for path, module in model.named_modules()
    )


def layer_order(path: str) -> str:
    """A key that sorts the paths of modules as the layers stand."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), path)


def with_modules(model: nn.Module, modules: Mapping[str, Mapping[str, nn.Module]]) -> nn.Module:
    """Return a model with some modules replaced. The given model is not touched.

    Only the modules on the way from the root to a replaced one are new objects; everything else,
    and so every array, is shared. Nothing has to be put back afterwards, and several such models
    can be in use at the same time.

    Args:
        model: the model.
        modules: new modules by name, by the path of the module or list that they belong to.
    """
    root = copy.copy(model)
    copies = {"": root}
    for path, replacements in modules.items():
        node, at = root, ""
        for name in path.split(".") if path else ():
            at += f".{name}"
            key = _key(node, name)
            if at not in copies:
                copies[at] = node[key] = copy.copy(node[key])
            node = copies[at]
        for name, module in replacements.items():
            node[_key(node, name)] = module
    return root


def _key(node: nn.Module | list[nn.Module], name: str) -> str | int:
    """What a part of a path selects in a module, or in a list of modules."""
    return int(name) if isinstance(node, list) else name


def with_taps(
    model: nn.Module, watch: Watch, after: Watch | None = None, few: int | None = None
) -> nn.Module:
    """Return a model whose FFNs show their hidden vectors. The given model is not touched.

    Args:
        model: the model.
        watch: called with an FFN's path and its hidden vectors (..., m); the FFN goes on with
            what it returns.
        after: called in the same way with its outputs, of FFNs whose outputs have no bias.
        few: of the last layer's FFN show at most so many tokens of a text (see `Sampled`).
            Default: all.
    """
    ffns = find_ffns(model)
    tapped = with_modules(model, {ffn.path: ffn.tapped(watch, after) for ffn in ffns})
    path = ffns[-1].path
    if few is None or f".{len(model.layers) - 1}." not in f".{path}.":
        return tapped
    whole, shown = (dict(m.named_modules())[path] for m in (model, tapped))
    parent, _, name = path.rpartition(".")
    return with_modules(tapped, {parent: {name: Sampled(whole, shown, few)}})


def fingerprint(model: nn.Module) -> dict[str, np.ndarray]:
    """Take a sample of weights from each FFN: a corner, (4, 32) float32, of its first matrix.

    It tells models apart whatever precision or quantization their weights are in.
    """
    corners = {}
    for ffn in find_ffns(model):
        first = next(iter(ffn.expand.values()))
        corners[ffn.path] = dense_weight(first, slice(4))[:, :32].astype(mx.float32)
    mx.eval(corners)
    return {path: np.array(corner) for path, corner in corners.items()}


def weight_bytes(model: nn.Module) -> int:
    """The bytes of weights that decoding one token reads.

    That is all of them, but for embeddings that are looked up and not multiplied with. Experts of
    a mixture are counted as if all were read.
    """
    layers = dict(model.named_modules()).values()
    heads = {outputs(layer) for layer in layers if is_linear(layer)}
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    for layer in layers:
        if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) and (
            layer.weight.shape[0] in heads
        ):
            total -= sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
    return total
