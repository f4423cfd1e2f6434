"""Find the FFNs of a model by what its modules compute.

Each module is run with a few random neurons to test whether it is an FFN that can be sliced, so its
class, its names and its activation do not matter.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .adapters import bias_of
from .division import division_of
from .expert_list import ExpertList, experts_per_token
from .ffn import FFN, LAYOUTS
from .linear import experts, inputs, is_sliceable, outputs
from .modules import layer_order

# Model types whose FFN looks sliceable but is not.
REFUSED = {
    "bitnet": "it normalises over all neurons of a layer",
    "prism_hadamard_qwen35": "it rotates the neurons of a layer into each other",
}

# Activations are quantized in groups of neurons with a common scale.
QUANTIZED_ACTIVATIONS = (
    "a model that quantizes activations cannot be sliced: neurons share scales, so each one's "
    "value depends on which others are kept; leave out --quantize-activations "
    "(quantize_activations)"
)

# An expert in a list. It sees only the tokens that are routed to it.
_EXPERT = re.compile(r"\bexperts\.\d+$")

# A few neurons and experts are enough to test a module, and cost nothing at any width.
_TRIAL_NEURONS = 8
_TRIAL_EXPERTS = 3


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find the FFNs of a model that can be sliced.

    In a mixture of experts these are dense layers and shared experts, which every token passes
    through, and stacks and lists of routed experts.

    Returns:
        The FFNs in the order of the layers.

    Raises:
        ValueError: if there are none, or if slicing them would be unsound, with the reason.
    """
    kind = getattr(model, "model_type", type(model).__name__)
    if kind in REFUSED:
        raise ValueError(f"models of type {kind} cannot be sliced: {REFUSED[kind]}")
    modules = dict(model.named_modules())
    if any(isinstance(module, nn.QQLinear) for module in modules.values()):
        raise ValueError(QUANTIZED_ACTIVATIONS)
    tested: dict[Any, bool] = {}
    matches = (
        _find_ffn(path, module, tested)
        for path, module in modules.items()
        if not _EXPERT.search(path)
    )
    ffns = [ffn for ffn in matches if ffn is not None]
    for path, module in modules.items():
        ffns += _find_lists(path, module, tested)
    if (division := division_of(model)) is not None:
        ffns = [ffn for ffn in ffns if ffn.path in division.shapes]
    if not ffns:
        reason = (
            "its routed experts are no stacks or lists of plain layers that treat their neurons "
            "one by one"
            if has_experts(model)
            else "no feed-forward network was found in it that treats its neurons one by one"
        )
        raise ValueError(f"models of type {kind} cannot be sliced: {reason}")
    return sorted(ffns, key=lambda ffn: layer_order(ffn.path))


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has routed experts, in a list or with their weights in one array."""
    return any(
        isinstance(module, (SwitchLinear, QuantizedSwitchLinear)) or _EXPERT.search(path)
        for path, module in model.named_modules()
    )


def _find_ffn(path: str, module: nn.Module, tested: dict[Any, bool]) -> FFN | None:
    """Return a module as an FFN, or None if it cannot be sliced.

    The projections are direct children of the module. Its other parts, such as an activation or
    norms before and after, do not matter as long as the module treats its neurons one by one.

    Args:
        path: the module's path in the model.
        module: the module.
        tested: the results of earlier tests by kind of module. This function adds to them.
    """
    candidates = list(_candidates(path, module))
    identity = _identity(module) if candidates else None
    for ffn in candidates:
        key = identity, *ffn.expand, ffn.contract[0], ffn.layout
        if key not in tested:
            tested[key] = _is_sum_over_neurons(module, ffn)
        if tested[key]:
            return ffn
    return None


def _find_lists(path: str, module: nn.Module, tested: dict[Any, bool]) -> Iterator[ExpertList]:
    """Yield the lists of routed experts among a module's members; see `_find_ffn`."""
    for name, members in module.children().items():
        if not isinstance(members, list) or not _EXPERT.search(f"{path}.{name}.0"):
            continue
        list_path = f"{path}.{name}"
        found = [_find_ffn(f"{list_path}.{n}", m, tested) for n, m in enumerate(members)]
        ffns = [ffn for ffn in found if ffn is not None]
        if len(ffns) < len(members) or len({(ffn.width, ffn.layout) for ffn in ffns}) != 1:
            continue
        hidden_size = inputs(next(iter(ffns[0].expand.values())))
        x = mx.random.normal((1, 3, hidden_size), key=mx.random.key(0))
        per_token = experts_per_token(module, name, ffns, x)
        if per_token is not None:
            yield ExpertList.of(list_path, ffns, members, per_token)


def _identity(module: nn.Module) -> Any:
    """Return a key that is equal for modules that differ only in their weights."""
    settings = {name: repr(value) for name, value in vars(module).items()}
    children = {name: type(child) for name, child in module.children().items()}
    return type(module), str(settings), str(children)


def _candidates(path: str, module: nn.Module) -> Iterator[FFN]:
    """Yield the FFNs that a module may be, judging by the shapes of its layers."""
    layers = {name: layer for name, layer in module.children().items() if is_sliceable(layer)}
    for name, down in layers.items():
        m, count = inputs(down), experts(down)
        others = {n: layer for n, layer in layers.items() if n != name and experts(layer) == count}
        same = [n for n, layer in others.items() if outputs(layer) == m]
        for chosen in (*combinations(same, 2), *combinations(same, 1)):
            if len({inputs(layers[n]) for n in chosen}) == 1:
                yield FFN(path, {n: layers[n] for n in chosen}, (name, down))
        for n in others:
            if outputs(layers[n]) == 2 * m:
                for layout in ("halves", "interleaved"):
                    yield FFN(path, {n: layers[n]}, (name, down), layout)


class _TrialLinear(nn.Linear):
    """A linear layer with given weights. Creating it does not change MLX's random state."""

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias


class _TrialStack(SwitchLinear):
    """A stack of linear layers with given weights."""

    __init__ = _TrialLinear.__init__


def _trial_layer(weight: mx.array, bias: mx.array | None) -> nn.Module:
    return (_TrialLinear if weight.ndim == 2 else _TrialStack)(weight, bias)


def _trial_ffn(ffn: FFN, key: mx.array) -> FFN:
    """Return a small random FFN that has the layers, layout and biases of a given FFN."""
    keys = iter(mx.random.split(key, 6))
    stack = () if ffn.experts is None else (_TRIAL_EXPERTS,)

    def trial(layer: nn.Module, rows: int, columns: int) -> nn.Module:
        weight = mx.random.normal((*stack, rows, columns), key=next(keys)) * columns**-0.5
        bias_key = next(keys)
        has_bias = bias_of(layer) is not None
        bias = mx.random.normal((*stack, rows), key=bias_key) if has_bias else None
        return _trial_layer(weight, bias)

    rows = len(LAYOUTS[ffn.layout](np.arange(_TRIAL_NEURONS), _TRIAL_NEURONS))
    name, down = ffn.contract
    expand = {n: trial(layer, rows, inputs(layer)) for n, layer in ffn.expand.items()}
    return FFN(ffn.path, expand, (name, trial(down, outputs(down), _TRIAL_NEURONS)), ffn.layout)


def _is_sum_over_neurons(module: nn.Module, ffn: FFN) -> bool:
    """Test with a few random neurons whether a module's output is a sum over its neurons.

    A stack of experts is called with the experts of each token.
    """
    trial_key, input_key = mx.random.split(mx.random.key(0))
    trial = _trial_ffn(ffn, trial_key)
    name, down = trial.contract
    silent = _trial_layer(mx.zeros_like(down.weight), down.get("bias"))
    hidden_size = inputs(next(iter(ffn.expand.values())))
    x = mx.random.normal((1, 3, hidden_size), key=input_key)
    routing = [] if ffn.experts is None else [mx.array([[[0, 2], [1, 0], [2, 1]]])]

    def run(parts: dict[str, nn.Module]) -> mx.array:
        changed = copy.copy(module)
        for n, part in (trial.layers | parts).items():
            changed[n] = part
        return changed(x, *routing, *[None] * (_required_arguments(module) - len(routing)))

    def run_only(*neurons: int) -> mx.array:
        indices = np.broadcast_to(neurons, (*trial.shape[:-1], len(neurons)))
        return run(trial.sliced(indices, "requantize"))

    try:
        nothing, everything = run({name: silent}), run({})
        sum_of_parts = run_only(0, 2, 3) + run_only(1, 4, 5, 6, 7) - nothing
        scale, error = mx.abs(everything - nothing).max(), mx.abs(sum_of_parts - everything).max()
        return bool(mx.logical_and(error >= 0, error < 1e-4 * scale))  # false for NaN
    except Exception:  # a module that is not an FFN can fail in any way
        return False


def _required_arguments(module: nn.Module) -> int:
    """Count the arguments that a module needs in addition to its input."""
    parameters = inspect.signature(module).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) - 1
