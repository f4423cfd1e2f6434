"""Observe the hidden vectors of FFNs while a model runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapters import bias_of
from .discovery import find_ffns
from .division import division_of
from .expert_list import ExpertCalls, ExpertList
from .ffn import FFN
from .modules import with_call, with_modules, with_replacements
from .summed import SummedLinear


@dataclass(frozen=True)
class Routing:
    """Which expert computed each hidden vector of a stack, and for which token.

    Attributes:
        experts: (R,) the experts.
        tokens: (R,) the tokens, numbered from 0 through all sequences of a batch.
        count: the number of tokens T in the batch, each of which has R / T experts.
    """

    experts: mx.array
    tokens: mx.array
    count: int

    @staticmethod
    def joined(parts: Sequence["Routing"]) -> "Routing":
        """Return the routing of several batches one after the other."""
        starts = [0, *accumulate(part.count for part in parts)]
        experts = mx.concatenate([part.experts for part in parts])
        if starts[-1] == len(parts):  # single tokens: known here, at no cost to the device
            sizes = [part.experts.size for part in parts]
            return Routing(experts, mx.array(np.repeat(starts[:-1], sizes)), starts[-1])
        tokens = [part.tokens + start for part, start in zip(parts, starts, strict=False)]
        return Routing(experts, mx.concatenate(tokens), starts[-1])


class Observer(Protocol):
    """Sees hidden vectors, and returns those that the FFN continues with."""

    def __call__(self, path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        """See an FFN's hidden vectors.

        Args:
            path: the FFN's path.
            hidden: (..., m) for a single FFN; (R, m) for a stack of experts.
            routing: the experts and tokens of a stack's hidden vectors. A single FFN gives none.
        """


class OutputObserver(Protocol):
    """Sees the outputs (..., out) of an FFN, and returns those that the model continues with."""

    def __call__(self, path: str, outputs: mx.array) -> mx.array:
        """See an FFN's outputs."""


class Tap(nn.Module):
    """A projection whose input passes through one observer, and its output through another."""

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        observe: Observer,
        observe_output: OutputObserver | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._observe, self._observe_output = path, observe, observe_output

    def __call__(self, x: mx.array) -> mx.array:
        """Show (..., m) hidden vectors, project what the observer returns, and show the output."""
        y = self.layer(self._observe(self._path, x))
        return y if self._observe_output is None else self._observe_output(self._path, y)


class StackTap(nn.Module):
    """A stacked projection whose input passes through an observer, with its routing."""

    def __init__(self, layer: nn.Module, path: str, observe: Observer) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._observe = path, observe
        self._tokens, self._count = mx.zeros(0, mx.uint32), 0

    def route(self, experts: mx.array) -> None:
        """Receive the experts (..., K) of the tokens that the stack computes next.

        From 64 of them on, mlx-lm's stacks sort them with `argsort` before the first projection.
        The same sort tells the token of each sorted expert.
        """
        self._count = math.prod(experts.shape[:-1])
        self._tokens = mx.argsort(experts.flatten()) // experts.shape[-1]

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Show hidden vectors (..., 1, m) of experts (...), and project what comes back."""
        chosen = experts.flatten()
        per_token = chosen.size // self._count
        tokens = self._tokens if sorted_indices else mx.arange(chosen.size) // per_token
        hidden = x.reshape(-1, x.shape[-1])
        shown = self._observe(self._path, hidden, routing=Routing(chosen, tokens, self._count))
        return self.layer(shown.reshape(x.shape), experts, sorted_indices=sorted_indices)


class ListTap(nn.Module):
    """A projection of an expert in a list, which records its input."""

    def __init__(self, layer: nn.Module, expert: int, calls: ExpertCalls) -> None:
        super().__init__()
        self.layer = layer
        self._expert, self._calls = expert, calls

    def __call__(self, x: mx.array) -> mx.array:
        """Record a hidden vector (m,), and project it."""
        self._calls.add(self._expert, x)
        return self.layer(x)


def tapped(
    root: nn.Module,
    ffns: Mapping[str, FFN],
    observe: Observer,
    observe_output: OutputObserver | None = None,
) -> nn.Module:
    """Return a module whose FFNs show their hidden vectors. The given module does not change.

    Args:
        root: the module.
        ffns: FFNs in it, by their path in it. Observers get the path in the model.
        observe: see `Observer`.
        observe_output: shown the outputs of single FFNs that neither have an output bias nor are
            summed over ranks.
    """
    parts: dict[str, dict[str, nn.Module]] = {}
    calls: dict[str, tuple[ExpertList, ExpertCalls]] = {}
    for path, ffn in ffns.items():
        name, down = ffn.contract
        if isinstance(ffn, ExpertList):
            own = ExpertCalls(ffn.per_token)
            for n, member in enumerate(ffn.members):
                parts[f"{path}.{n}"] = {name: ListTap(member.contract[1], n, own)}
            calls[path.rpartition(".")[0]] = ffn, own
        elif ffn.experts is not None:
            parts[path] = {name: StackTap(down, ffn.path, observe)}
        else:
            # The outputs of a sum are those of all ranks.
            is_alone = bias_of(down) is None and not isinstance(down, SummedLinear)
            outputs = observe_output if is_alone else None
            parts[path] = {name: Tap(down, ffn.path, observe, outputs)}
    root = with_modules(root, parts)
    modules = dict(root.named_modules())
    routed = {
        path: _routed(modules[path], ffn.contract[0])
        for path, ffn in ffns.items()
        if ffn.experts is not None and not isinstance(ffn, ExpertList)
    }
    listed = {path: _listed(modules[path], *own, observe) for path, own in calls.items()}
    return with_replacements(root, routed | listed)


def _listed(block: nn.Module, ffn: ExpertList, calls: ExpertCalls, observe: Observer) -> nn.Module:
    """Return a block that shows the hidden vectors of the experts in its list.

    What the observer returns is not what the experts continue with.
    """
    block._training = False  # a copy; in training, blocks call experts with several tokens

    def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        calls.begin(x)
        y = block(x, *args, **kwargs)
        hidden, experts, tokens, count = calls.end()
        return mx.depends(y, observe(ffn.path, hidden, routing=Routing(experts, tokens, count)))

    return with_call(block, call)


def _routed(stack: nn.Module, name: str) -> nn.Module:
    """Return a tapped stack that tells its tap the experts of the tokens."""

    def call(x: mx.array, experts: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        stack[name].route(experts)
        return stack(x, experts, *args, **kwargs)

    return with_call(stack, call)


def _sampled(ffn: FFN, module: nn.Module, tapped: nn.Module, max_samples: int) -> nn.Module:
    """Return an FFN that shows the hidden vectors of some tokens of a long text, evenly spaced.

    In prefill, the outputs of a model's last FFN are unused, so nothing else is computed there.

    Args:
        ffn: the FFN.
        module: its module.
        tapped: the same module with taps.
        max_samples: the maximum number of tokens to show. At least half as many are shown.
    """

    def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # Other arguments may differ between tokens in a way that is not known here.
        given = 0 if ffn.experts is None else 1
        stride = -(-x.shape[-2] // max_samples)
        if stride == 1 or x.ndim != 3 or len(args) != given or kwargs:
            return tapped(x, *args, **kwargs)
        tapped(x[:, ::stride], *(experts[:, ::stride] for experts in args))
        return module(x, *args)

    return with_call(module, call)


def with_taps(
    model: nn.Module,
    observe: Observer,
    observe_output: OutputObserver | None = None,
    max_samples: int | None = None,
    ffns: list[FFN] | None = None,
) -> nn.Module:
    """Return a model whose FFNs show their hidden vectors. The given model does not change.

    Args:
        model: the model.
        observe: see `Observer`.
        observe_output: called with the outputs of FFNs without an output bias, and of no stacks.
        max_samples: the maximum number of tokens of a text that the last layer's FFNs show (see
            `_sampled`). Default: all.
        ffns: the model's FFNs. Default: found by `find_ffns`.
    """
    ffns = find_ffns(model) if ffns is None else ffns
    observed = tapped(model, {ffn.path: ffn for ffn in ffns}, observe, observe_output)
    if max_samples is None:
        return observed
    division = division_of(model)
    last = f".{(division.layers if division else len(model.layers)) - 1}."
    dense_modules, tapped_modules = (dict(m.named_modules()) for m in (model, observed))
    sampled = {
        ffn.path: _sampled(ffn, dense_modules[ffn.path], tapped_modules[ffn.path], max_samples)
        for ffn in ffns
        if last in f".{ffn.path}." and not isinstance(ffn, ExpertList)
    }
    return with_replacements(observed, sampled)
