"""Thresholds on the inputs of every linear layer, as in TEAL (arXiv 2408.14690).

An input below its layer's threshold counts as zero, and a kernel made for that would not read its
column of the weights. There are no such kernels here: the products are computed whole, with zeros,
and the bytes are those that the kernels would read. The thresholds of a layer let the same share of
inputs pass in every layer. TEAL's own search for shares by layer is not repeated.
"""

from collections.abc import Mapping, Sequence

from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, Scores
from glass_mlx.models import named_arrays, with_call, with_replacements
from glass_mlx.models.linear import is_linear
from glass_mlx.session import Session
from glass_mlx.vocabulary import log_probabilities

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# So many tokens' inputs are kept to find quantiles.
_TOKENS = 256


class Thresholds:
    """The sizes of the inputs of every linear layer but the head, measured on texts.

    Args:
        session: the dense model's session.
        texts: continuations by the model. The inputs at written tokens count.

    Raises:
        ValueError: if the model has routed experts, whose inputs are not measured.
    """

    def __init__(self, session: Session, texts: Sequence[Continuation]) -> None:
        if any(ffn.experts is not None for ffn in session.ffns):
            raise ValueError("the method teal is for models without routed experts")
        self._session = session
        head = session.head.layer if session.head else None
        self.layers = {
            path: module
            for path, module in session.model.named_modules()
            if is_linear(module) and module is not head
        }
        sizes: dict[str, list[np.ndarray]] = {path: [] for path in self.layers}
        per_text = -(-_TOKENS // len(texts))
        for text in texts:
            self._observe(text, per_text, sizes)
        self._sizes = {path: np.sort(np.concatenate(parts)) for path, parts in sizes.items()}

    def _observe(self, text: Continuation, count: int, sizes: dict[str, list[np.ndarray]]) -> None:
        """Add the sizes of the inputs at some tokens of a text, evenly spaced."""
        start, stop = len(text.prompt), len(text.prompt) + len(text.written)
        chosen = mx.array(np.unique(np.linspace(start, stop - 1, count).astype(np.int32)))
        seen: dict[str, mx.array] = {}

        def observed(path: str, layer: nn.Module) -> nn.Module:
            def call(x: mx.array) -> mx.array:
                seen[path] = mx.abs(x[0, chosen]).astype(mx.float32).flatten()
                return layer(x)

            return with_call(layer, call)

        layers = {path: observed(path, layer) for path, layer in self.layers.items()}
        model = with_replacements(self._session.model, layers)
        mx.eval(model(mx.array([text.prompt + text.written])), seen)
        for path, values in seen.items():
            sizes[path].append(np.array(values))

    def at(self, density: float) -> dict[str, float]:
        """Return the threshold of each layer that lets a share of its inputs pass."""
        return {
            path: float(values[round((1 - density) * len(values))]) if density < 1 else 0.0
            for path, values in self._sizes.items()
        }

    def score(self, reading: DenseReading, density: float) -> Scores:
        """Score a continuation with thresholds. The dense model reads the prompt, as for slices.

        Args:
            reading: the continuation.
            density: the share of the inputs that pass.
        """
        passed: dict[str, mx.array] = {}
        model = _with_thresholds(reading.session.model, self.layers, self.at(density), passed)
        scores = Scores.exact(reading)
        everything = slice(0, reading.tokens)
        cache, _ = reading.state()
        logits = reading.logits(model, cache, everything)
        mx.eval(passed)
        scores.put(everything, reading, log_probabilities(logits), np.zeros(reading.tokens, bool))
        unread = sum(
            _column_bytes(self.layers[path]) * (1 - np.array(share))
            for path, share in passed.items()
        )
        scores.bytes[:] = 1 - unread / reading.session.weight_bytes
        return scores


def _column_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's weights without its output bias."""
    return sum(array.nbytes for name, array in named_arrays(layer) if name != "bias")


def _with_thresholds(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    thresholds: Mapping[str, float],
    passed: dict[str, mx.array],
) -> nn.Module:
    """Return a model whose layers see zeros for inputs below their thresholds.

    Args:
        model: the model, which does not change.
        layers: the layers by path.
        thresholds: their thresholds.
        passed: receives (T,) for each layer, the share of the inputs of each token that pass.
    """

    def thresholded(path: str, layer: nn.Module) -> nn.Module:
        def call(x: mx.array) -> mx.array:
            mask = mx.abs(x) >= thresholds[path]
            passed[path] = mask[0].astype(mx.float32).mean(-1)
            return layer(mx.where(mask, x, 0))

        return with_call(layer, call)

    return with_replacements(
        model, {path: thresholded(path, layer) for path, layer in layers.items()}
    )
