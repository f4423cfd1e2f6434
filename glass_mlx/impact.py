"""How much each neuron matters to the next token's loss: one backward pass a sequence."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from glass_mlx.models import FFN, Watch, find_ffns, with_modules, with_taps

import mlx.core as mx
import mlx.nn as nn


@mx.custom_function
def _measured(hidden: mx.array, mask: mx.array, total: mx.array) -> mx.array:
    """Pass hidden vectors (..., m) on; the "gradient" of `total` (m,) is the impact's sum."""
    return hidden


@_measured.vjp
def _measured_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, ...]:
    hidden, mask, total = primals
    impact = mx.abs(hidden.astype(mx.float32) * cotangent.astype(mx.float32))
    impact = (mask.reshape(1, -1) @ impact.reshape(-1, impact.shape[-1])).reshape(total.shape)
    # The gradient goes on when the impact is there, so that nothing is held for it.
    return mx.depends(cotangent, impact), mx.zeros_like(mask), impact


def _layer_path(path: str) -> str:
    """The path of the decoder layer, a member of a list, that the module at a path belongs to."""
    names = path.split(".")
    numbers = [n for n, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: numbers[0] + 1]) if numbers else ""


Totals = dict[str, mx.array]


@cache
def _recomputed_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class, so that the model around it still sees what it knows."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mx.checkpoint(self._run)(self._totals, args, kwargs)

    return type(f"Recomputed{kind.__name__}", (kind,), {"__call__": call})


def _recomputed(
    layer: nn.Module, totals: Totals, watched: Callable[[Totals], nn.Module]
) -> nn.Module:
    """A copy of a layer that keeps its inputs for the backward pass, and computes the rest again.

    Args:
        layer: the layer.
        totals: what gradients are wanted for. They must be arguments of what is computed again,
            which gives gradients for its arguments alone.
        watched: makes the layer to run, given the totals.
    """
    layer = copy.copy(layer)
    layer.__class__ = _recomputed_kind(type(layer))
    layer._totals = totals
    layer._run = lambda totals, args, kwargs: watched(totals)(*args, **kwargs)
    return layer


def _watched(model: nn.Module, ffns: list[FFN], totals: Totals, mask: mx.array) -> nn.Module:
    """A model in which the gradient of an FFN's total (m,) is the sum of its neurons' impact."""

    def watch_with(totals: Totals) -> Watch:
        return lambda path, hidden: _measured(hidden, mask, totals[path])

    layers: dict[str, list[FFN]] = {}
    for ffn in ffns:
        layers.setdefault(_layer_path(ffn.path), []).append(ffn)
    if "" in layers:  # not the usual list of layers: nothing to compute again one by one
        return with_taps(model, watch_with(totals))
    modules = dict(model.named_modules())
    changed: dict[str, dict[str, nn.Module]] = {}
    for at, members in layers.items():

        def watched(totals: Totals, at: str = at, members: list[FFN] = members) -> nn.Module:
            watch = watch_with(totals)
            taps = {ffn.path[len(at) + 1 :]: ffn.tapped(watch) for ffn in members}
            return with_modules(modules[at], taps)

        mine = {ffn.path: totals[ffn.path] for ffn in members}
        owner, _, name = at.rpartition(".")
        changed.setdefault(owner, {})[name] = _recomputed(modules[at], mine, watched)
    return with_modules(model, changed)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, in which mlx-lm's models avoid what has no gradient."""
    modules = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in modules:
            module._training = False


def impact(model: nn.Module, tokens: list[int], mask: list[int]) -> dict[str, mx.array]:
    """Measure the impact of each neuron on one sequence (I-GLASS, arXiv 2508.14302).

    The impact of neuron j is mean_t |h_tj * dL/dh_tj|, the first-order change of the loss if the
    neuron were zero (Taylor). L is the cross-entropy of the next tokens, summed, so that a
    token's part does not depend on the length of the sequence; the constants are ours.

    Layers are computed again in the backward pass. What is held beside the model is, for T
    tokens, each layer's input (T, hidden size), all that one layer computes, and four arrays of
    the size of the logits (T, vocabulary) in float32.

    Args:
        model: the dense model; in training mode while this runs.
        tokens: T token ids.
        mask: T flags, 1 for tokens that count. The last never does: no loss follows it.

    Returns:
        (m,) float32 scores of each FFN, evaluated.
    """
    ffns = find_ffns(model)
    mask = [*mask[:-1], 0]  # no loss follows the last token
    ids, counted = mx.array(tokens)[None], mx.array(mask, mx.float32)

    def loss(totals: dict[str, mx.array]) -> mx.array:
        logits = _watched(model, ffns, totals, counted)(ids)[0, :-1]
        return nn.losses.cross_entropy(logits.astype(mx.float32), ids[0, 1:], reduction="sum")

    totals = {ffn.path: mx.zeros((ffn.width,), mx.float32) for ffn in ffns}
    with _training(model):
        sums = mx.grad(loss)(totals)
        scores = {path: total / max(sum(mask), 1) for path, total in sums.items()}
        mx.eval(scores)
    return scores
