"""Observe the hidden vectors of FFNs while a model runs."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapters import bias_of
from .discovery import find_ffns
from .ffn import FFN
from .modules import with_modules

# Maps (FFN path, hidden vectors) to the hidden vectors that the FFN continues with.
Observer = Callable[[str, mx.array], mx.array]


class Tap(nn.Module):
    """A projection whose input passes through one observer, and its output through another."""

    def __init__(
        self, layer: nn.Module, path: str, observe: Observer, observe_output: Observer | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._observe, self._observe_output = path, observe, observe_output

    def __call__(self, x: mx.array) -> mx.array:
        """Show (..., m) hidden vectors, project what the observer returns, and show the output."""
        y = self.layer(self._observe(self._path, x))
        return y if self._observe_output is None else self._observe_output(self._path, y)


class SampledFFN(nn.Module):
    """An FFN that shows the hidden vectors of some tokens of a long text, evenly spaced.

    In prefill, the outputs of a model's last FFN are unused, so nothing else is computed there.

    Args:
        module: the FFN.
        tapped: the same FFN with taps.
        max_samples: the maximum number of tokens to show. At least half as many are shown.
    """

    def __init__(self, module: nn.Module, tapped: nn.Module, max_samples: int) -> None:
        super().__init__()
        self.module, self.tapped = module, tapped
        self._max_samples = max_samples

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Compute the FFN's output of (batch, T, hidden), and show some of its tokens."""
        stride = -(-x.shape[-2] // self._max_samples)
        if stride == 1 or x.ndim != 3 or args or kwargs:  # arguments may differ between tokens
            return self.tapped(x, *args, **kwargs)
        self.tapped(x[:, ::stride])
        return self.module(x)


def tap(
    ffn: FFN, observe: Observer, observe_output: Observer | None = None
) -> dict[str, nn.Module]:
    """Return modules that show an FFN's hidden vectors, to replace the FFN's projections.

    Args:
        ffn: the FFN.
        observe: see `Observer`.
        observe_output: called in the same way with the FFN's outputs, if they have no bias.
    """
    name, down = ffn.contract
    return {name: Tap(down, ffn.path, observe, observe_output if bias_of(down) is None else None)}


def with_taps(
    model: nn.Module,
    observe: Observer,
    observe_output: Observer | None = None,
    max_samples: int | None = None,
    ffns: list[FFN] | None = None,
) -> nn.Module:
    """Return a model whose FFNs show their hidden vectors. The given model does not change.

    Args:
        model: the model.
        observe: called with an FFN's path and its hidden vectors (..., m). The FFN continues with
            the hidden vectors that it returns.
        observe_output: called in the same way with the outputs of FFNs without an output bias.
        max_samples: the maximum number of tokens of a text that the last layer's FFN shows (see
            `SampledFFN`). Default: all.
        ffns: the model's FFNs. Default: found by `find_ffns`.
    """
    ffns = find_ffns(model) if ffns is None else ffns
    tapped = with_modules(model, {ffn.path: tap(ffn, observe, observe_output) for ffn in ffns})
    path = ffns[-1].path
    if max_samples is None or f".{len(model.layers) - 1}." not in f".{path}.":
        return tapped
    dense_ffn, tapped_ffn = (dict(m.named_modules())[path] for m in (model, tapped))
    parent, _, name = path.rpartition(".")
    return with_modules(tapped, {parent: {name: SampledFFN(dense_ffn, tapped_ffn, max_samples)}})
