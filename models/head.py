"""The output head of a model: where it is, slices of its rows, and its logits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from .adapters import is_adapted
from .linear import check_indices, is_linear, is_quantized, outputs, put_outputs, take_outputs
from .modules import named_arrays, with_replacements
from .vocabulary import vocabulary_size

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)

# How long a product with several rows takes, over one with a single row: rows, and times between
# which those of other rows are interpolated. A product with few rows reads the weights once, where
# there is a kernel for it. CPU and CUDA were measured (docs/experiments.md); MLX's CPU backend is
# bound by arithmetic if weights are quantized. Figures for Metal are other people's: M3 and later
# from ml-explore/mlx issues 3839 and 3852, floats from 4265. M1 and M2 read affine weights once for
# each row; 3839 has 1.9 and 3.4 for 4 and 8 rows with such kernels, and 4265 has 3.3 and 6.1.
_CPU, _CPU_QUANTIZED, _CUDA = ((1, 8), (1, 2.05)), ((1, 8), (1, 8)), ((1, 8), (1, 1.28))
_METAL, _METAL_FLOAT = ((1, 2, 4, 8), (1, 1, 1.5, 2.9)), ((1, 2, 8), (1, 2, 2))
_METAL_ROW_BY_ROW = ((1, 8), (1, 4.8))
_M3 = 15  # its generation in the name of the architecture

# With CUDA and quantized weights, fewer rows than this take one product each, and this many take
# no longer than one.
_CUDA_ROWS = 8

# Shows (..., V) logits, and returns them.
LogitsObserver = Callable[[mx.array], mx.array]

# Sees the vectors (..., hidden) whose logits a head computes.
HiddenObserver = Callable[[mx.array], None]


@dataclass(frozen=True)
class Head:
    """The layer that computes a model's logits.

    Attributes:
        path: its path in the model.
        layer: a linear layer, or the embedding if the two are tied.
        size: the number of its rows V, which may exceed the tokenizer's vocabulary.
    """

    path: str
    layer: nn.Module
    size: int

    @property
    def bytes(self) -> int:
        """The bytes of its weights."""
        return sum(array.nbytes for _, array in named_arrays(self.layer))

    def time_of_rows(self, count: int) -> float:
        """Return how long a product with several rows takes, over one with a single row."""
        return float(np.interp(count, *self._times_of_rows()))

    def _times_of_rows(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if mx.default_device() == mx.cpu:
            return _CPU_QUANTIZED if is_quantized(self.layer) else _CPU
        if mx.cuda.is_available():
            return _CUDA
        if not is_quantized(self.layer):
            return _METAL_FLOAT
        is_affine = getattr(self.layer, "mode", "affine") == "affine"
        return _METAL_ROW_BY_ROW if is_affine and _apple_generation() < _M3 else _METAL

    def sliced(self, rows: np.ndarray) -> "SlicedHead":
        """Return a head that computes only some logits.

        Args:
            rows: (k,) the tokens whose logits it computes, strictly increasing.
        """
        return SlicedHead(self.layer, rows)


class SlicedHead(nn.Module):
    """A head that computes some of the logits. Rows are exact in every quantization mode.

    Args:
        layer: the whole head.
        rows: (k,) the tokens whose logits it computes, strictly increasing.

    Attributes:
        size: the number of rows of the whole head.
        rows: (k,) the tokens in the order of the logits.
    """

    def __init__(self, layer: nn.Module, rows: np.ndarray) -> None:
        super().__init__()
        self._whole = [layer]  # not a member, so that its weights do not count twice
        self.size = outputs(layer)
        self.slice = take_outputs(layer, rows)
        self.rows = rows
        self._observe: HiddenObserver | None = None

    def show(self, observe: HiddenObserver | None) -> None:
        """Show, from now on, the vectors whose logits are computed; to None for nobody."""
        self._observe = observe

    def move(self, rows: np.ndarray) -> None:
        """Replace some rows in place, which costs less than a new slice.

        Args:
            rows: (k,) the tokens to keep from now on, as many as before, strictly increasing.
        """
        check_indices(rows, self.size)
        places = np.flatnonzero(~np.isin(self.rows, rows, assume_unique=True))
        added = np.setdiff1d(rows, self.rows, assume_unique=True)
        if len(added):
            put_outputs(self._whole[0], self.slice, places, added)
            self.rows = self.rows.copy()
            self.rows[places] = added

    def __call__(self, x: mx.array) -> mx.array:
        """Compute (..., k) logits of (..., hidden), or look tokens up if the embedding is tied."""
        if isinstance(self.slice, _EMBEDDINGS):
            return self._whole[0](x)
        return self._logits(x, self.slice)

    def as_linear(self, x: mx.array) -> mx.array:
        """Compute (..., k) logits of (..., hidden) with a tied embedding."""
        return self._logits(x, self.slice.as_linear)

    def _logits(self, x: mx.array, compute: Callable[[mx.array], mx.array]) -> mx.array:
        if self._observe is not None:
            self._observe(x)
        return compute(x)


class BackedOffModel(nn.Module):
    """A model whose head computes some of the logits, and whose other logits are backed off.

    The other tokens share a fixed probability in fixed proportions, as in Katz's back-off
    (1987; see docs/method.md).

    Args:
        model: the model with a `SlicedHead`, whose logits are (..., k).
        rows: (k,) the tokens of these logits.
        others: (V,) float32 log-odds of every other token against all k tokens together. Entries
            of `rows` are ignored.
    """

    def __init__(self, model: nn.Module, rows: np.ndarray, others: mx.array) -> None:
        super().__init__()
        self.model = model
        self._rows, self._others = mx.array(rows), others

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Compute (..., V) logits; the arguments are the model's."""
        return with_other_logits(self.model(*args, **kwargs), self._rows, self._others)


def with_other_logits(logits: mx.array, rows: mx.array, others: mx.array) -> mx.array:
    """Put logits among those of all tokens; see `BackedOffModel`.

    Args:
        logits: (..., k) the logits of some tokens.
        rows: (k,) these tokens.
        others: (V,) float32 log-odds of every other token against these tokens together.
    """
    total = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
    full = (total + others).astype(logits.dtype)
    index = mx.broadcast_to(rows, logits.shape)
    return mx.put_along_axis(full, index, logits, axis=-1)


class DraftingModel(nn.Module):
    """A model whose head computes some of the logits, and that gives other tokens no chance.

    Args:
        model: the model with a `SlicedHead`, whose logits are (..., k).
        rows: (k,) the tokens of these logits.
        size: the number of all tokens V.
    """

    def __init__(self, model: nn.Module, rows: np.ndarray, size: int) -> None:
        super().__init__()
        self.model = model
        self._rows, self._size = mx.array(rows), size

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        """Compute logits (..., V), and the logarithm (..., 1) of the sum of their exponentials.

        The arguments are the model's.
        """
        logits = self.model(*args, **kwargs)
        full = mx.full((*logits.shape[:-1], self._size), -mx.inf, logits.dtype)
        full = mx.put_along_axis(full, mx.broadcast_to(self._rows, logits.shape), logits, axis=-1)
        return full, mx.logsumexp(logits, axis=-1, keepdims=True)


class ObservedLogits(nn.Module):
    """A model that shows its logits (..., V) to an observer, and returns what that returns."""

    def __init__(self, model: nn.Module, observe: LogitsObserver) -> None:
        super().__init__()
        self.model = model
        self._observe = observe

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Compute (..., V) logits; the arguments are the model's."""
        return self._observe(self.model(*args, **kwargs))


class _Stand(nn.Module):
    """A module in the place of a head: it looks tokens up, and leaves logits to a function."""

    def __init__(self, layer: nn.Module, logits: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._logits = logits

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer, such as its weights."""
        if "layer" not in self:  # in the constructor
            raise AttributeError(name)
        return self[name] if name in self else getattr(self["layer"], name)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) if isinstance(self.layer, _EMBEDDINGS) else self._logits(x)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._logits(x)


def _logits_of(layer: nn.Module) -> Callable[[mx.array], mx.array]:
    """Return the function of a head that computes logits (..., V) of vectors (..., hidden)."""
    return layer.as_linear if isinstance(layer, _EMBEDDINGS) else layer


class LogitsOfHidden:
    """Computes a model's logits of the vectors that its head has seen before.

    Args:
        model: the model.
        head: its head.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._compute = _logits_of(head.layer)
        is_padded = mx.cuda.is_available() and is_quantized(head.layer)
        self._least_rows = _CUDA_ROWS if is_padded else 1
        # Of one array. The function that returns it must not hold this object, which would then be
        # freed late, and the model with it.
        self._logits = logits = [mx.zeros((1, 1, head.size))]
        self._model = with_head(model, head, _Stand(head.layer, lambda x: logits[0]))
        # Some models end with the head, and others with something else, such as a soft cap.
        self._ends_with_head = self._after_head() is logits[0]

    def __call__(self, hidden: mx.array) -> mx.array:
        """Compute the logits (1, n, V) of vectors (1, n, hidden)."""
        count = hidden.shape[-2]
        missing = max(0, self._least_rows - count)
        padded = mx.pad(hidden, [(0, 0), (0, missing), (0, 0)])
        self._logits[0] = self._compute(padded)[:, :count]
        return self._logits[0] if self._ends_with_head else self._after_head()

    def _after_head(self) -> mx.array:
        """Return what the model makes of the head's logits.

        It is called with one token. MLX computes nothing of what comes before the head, because
        nothing depends on it.
        """
        logits: mx.array = self._model(mx.array([[0]], mx.uint32))
        return logits


def _apple_generation() -> int:
    """Return the generation of an Apple GPU: 13 for M1, 14 for M2, 15 for M3."""
    name = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return int(name[1]) if name else _M3


def _has_adapter(module: nn.Module | None) -> bool:
    """Return whether a module is a layer with an adapter, whose base layer is no head by itself."""
    return is_adapted(module) or isinstance(module, (LoRAEmbedding, DoRAEmbedding))


def find_head(model: nn.Module) -> Head | None:
    """Find the layer that computes a model's logits, by running the model on one token.

    MLX computes nothing for this, because the outputs are not evaluated.

    Returns:
        The head, or None if the logits are not the outputs of a layer that can be sliced.
    """
    size = vocabulary_size(model)
    modules = dict(model.named_modules())
    candidates = {
        path: layer
        for path, layer in modules.items()
        if (is_linear(layer) or is_adapted(layer) or type(layer) in _EMBEDDINGS)
        and outputs(layer) == size
        and not _has_adapter(modules.get(path.rpartition(".")[0]))
    }
    calls: list[str] = []

    def recorder(path: str, layer: nn.Module) -> _Stand:
        def logits(x: mx.array) -> mx.array:
            calls.append(path)
            return _logits_of(layer)(x)

        return _Stand(layer, logits)

    recorders = {path: recorder(path, layer) for path, layer in candidates.items()}
    with_replacements(model, recorders)(mx.array([[0]], mx.uint32))
    return Head(calls[-1], candidates[calls[-1]], size) if calls else None


def with_head(model: nn.Module, head: Head, module: nn.Module) -> nn.Module:
    """Return a model with another head. The given model does not change."""
    return with_replacements(model, {head.path: module})
