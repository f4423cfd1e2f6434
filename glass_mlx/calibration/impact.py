"""Measure each neuron's impact on the next-token loss, with one backward pass per sequence."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from glass_mlx.models import (
    FFN,
    ExpertList,
    Observer,
    Routing,
    tapped,
    with_replacements,
    with_taps,
)
from glass_mlx.segments import Segments
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn

# By FFN, zeros whose gradient is the sum of the neurons' impact: (m,), or (experts, m + 1) for a
# stack, whose last column counts the tokens of each expert.
Totals = dict[str, mx.array]


@mx.custom_function
def _pass_through(hidden: mx.array, mask: mx.array, total: mx.array) -> mx.array:
    """Return hidden vectors (..., m); the "gradient" of `total` (m,) is the sum of the impact."""
    return hidden


@_pass_through.vjp
def _pass_through_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, ...]:
    hidden, mask, total = primals
    impact = mx.abs(hidden.astype(mx.float32) * cotangent.astype(mx.float32))
    impact = (mask.reshape(1, -1) @ impact.reshape(-1, impact.shape[-1])).reshape(total.shape)
    # The gradient depends on the impact, so the impact is computed at once and holds no memory.
    return mx.depends(cotangent, impact), mx.zeros_like(mask), impact


@mx.custom_function
def _pass_through_routed(
    hidden: mx.array, mask: mx.array, experts: mx.array, total: mx.array
) -> mx.array:
    """Return a stack's hidden vectors (R, m); see `_pass_through`. mask and experts are (R,)."""
    return hidden


@_pass_through_routed.vjp
def _pass_through_routed_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, ...]:
    hidden, mask, experts, total = primals
    impact = mx.abs(hidden.astype(mx.float32) * cotangent.astype(mx.float32))
    impact = mx.concatenate([impact, mx.ones_like(impact[:, :1])], axis=-1)
    segments = Segments(experts, len(total))
    impact = segments.add(mx.zeros_like(total), segments.ordered(mask), segments.ordered(impact))
    others = mx.zeros_like(mask), mx.zeros_like(experts)
    return mx.depends(cotangent, impact), *others, impact


def _layer_path(path: str) -> str:
    """Return the path of a module's decoder layer, a member of a list, or "" if there is none."""
    names = path.split(".")
    numbers = [n for n, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: numbers[0] + 1]) if numbers else ""


@cache
def _recomputing_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a layer's class, so that the model still recognizes the layer."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mx.checkpoint(self._run)(self._totals, args, kwargs)

    return type(f"Recomputing{layer_class.__name__}", (layer_class,), {"__call__": call})


def _recomputing_layer(
    layer: nn.Module, totals: Totals, observe: Callable[[Totals], nn.Module]
) -> nn.Module:
    """Copy a layer so that it keeps only its inputs and is computed again in the backward pass.

    Args:
        layer: the layer.
        totals: the arrays that need gradients. A recomputed function returns gradients for its
            arguments alone, so the totals must be among them.
        observe: returns the layer to run, given the totals.
    """
    layer = copy.copy(layer)
    layer.__class__ = _recomputing_class(type(layer))
    layer._totals = totals
    layer._run = lambda totals, args, kwargs: observe(totals)(*args, **kwargs)
    return layer


def _observed_model(model: nn.Module, ffns: list[FFN], totals: Totals, mask: mx.array) -> nn.Module:
    """Return a model in which the gradient of an FFN's total is the sum of the neurons' impact."""

    def observer(totals: Totals) -> Observer:
        def observe(path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
            if routing is None:
                return cast(mx.array, _pass_through(hidden, mask, totals[path]))
            row_mask = mask[routing.tokens]
            return cast(
                mx.array, _pass_through_routed(hidden, row_mask, routing.experts, totals[path])
            )

        return observe

    layers: dict[str, list[FFN]] = {}
    for ffn in ffns:
        layers.setdefault(_layer_path(ffn.path), []).append(ffn)
    if "" in layers:  # no list of layers, so nothing can be recomputed layer by layer
        return with_taps(model, observer(totals))
    modules = dict(model.named_modules())
    replacements: dict[str, nn.Module] = {}
    for layer_path, members in layers.items():

        def observe(
            totals: Totals, layer_path: str = layer_path, members: list[FFN] = members
        ) -> nn.Module:
            ffns = {ffn.path[len(layer_path) + 1 :]: ffn for ffn in members}
            return tapped(modules[layer_path], ffns, observer(totals))

        layer_totals = {ffn.path: totals[ffn.path] for ffn in members}
        replacements[layer_path] = _recomputing_layer(modules[layer_path], layer_totals, observe)
    return with_replacements(model, replacements)


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, in which mlx-lm's models use only differentiable code."""
    modules = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in modules:
            module._training = False


def measure_impact(
    model: nn.Module | Session, tokens: list[int], mask: list[int]
) -> dict[str, mx.array]:
    """Measure the impact of each neuron on one sequence (I-GLASS, arXiv 2508.14302).

    The impact of neuron j is mean_t |h_tj * dL/dh_tj|, the first-order change of the loss if the
    neuron were zero (Taylor). L is the sum of the cross-entropy of the next tokens, so that the
    contribution of a token does not depend on the length of the sequence. The paper does not fix
    these constants.

    Layers are computed again in the backward pass. For T tokens, the memory needed in addition to
    the model is each layer's input (T, hidden size), everything that one layer computes, and four
    arrays of the size of the logits (T, vocabulary) in float32.

    Args:
        model: the dense model, or a session of it. It is in training mode during the call.
        tokens: T token ids.
        mask: T flags, 1 for tokens that count. The last token never counts: no loss follows it.

    Returns:
        (m,) float32 scores of each FFN, evaluated; (experts, m) for a stack, whose experts' means
        are over their own tokens.

    Raises:
        ValueError: if the model has its experts in lists, whose gradients are not seen.
    """
    session = Session.of(model)
    dense, ffns = session.model, session.ffns
    if any(isinstance(ffn, ExpertList) for ffn in ffns):
        raise ValueError("the statistic impact cannot be measured on experts in a list")
    mask = [*mask[:-1], 0]
    ids, token_weights = mx.array(tokens)[None], mx.array(mask, mx.float32)

    def loss(totals: Totals) -> mx.array:
        logits = _observed_model(dense, ffns, totals, token_weights)(ids)[0, :-1]
        return nn.losses.cross_entropy(logits.astype(mx.float32), ids[0, 1:], reduction="sum")

    totals = {
        ffn.path: mx.zeros((*ffn.shape[:-1], ffn.width + len(ffn.shape) - 1), mx.float32)
        for ffn in ffns
    }
    with _training_mode(dense):
        sums = mx.grad(loss)(totals)
        scores = {
            path: total / max(sum(mask), 1)
            if total.ndim == 1
            else total[:, :-1] / mx.maximum(total[:, -1:], 1)
            for path, total in sums.items()
        }
        mx.eval(scores)
    return scores
