"""Observe the tokens that the dense model computes one by one, at little cost."""

from glass_mlx.models import Routing
from glass_mlx.statistics import NeuronStatistics
from glass_mlx.vocabulary import Shortlister

import mlx.core as mx

# So many tokens are held at most before they are added to the statistics.
_MAX_HELD = 32


class TokenObserver:
    """Holds what the dense model computes for single tokens, and adds it to statistics in batches.

    Adding a token takes a dozen small operations in every layer, an eighth of a small model's time.
    A batch takes no more. The vectors are parts of what the model computes anyway, and hold only
    their own memory.

    Args:
        text: the statistics of the generated text.
        shortlister: what the logits are added to, if the head is sliced.
    """

    def __init__(self, text: NeuronStatistics, shortlister: Shortlister | None) -> None:
        self._text, self._shortlister = text, shortlister
        self._hidden: dict[str, list[mx.array]] = {}
        self._routing: dict[str, list[Routing]] = {}
        self._outputs: dict[str, list[mx.array]] = {}
        self._logits: list[mx.array] = []

    def hidden(self, path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        """Hold the hidden vectors (..., 1, m) of an FFN for a token, and return them.

        Args:
            path: the FFN.
            hidden: its hidden vectors; (K, m) of the K experts of a stack.
            routing: the experts of a stack's hidden vectors.
        """
        self._hidden.setdefault(path, []).append(hidden)
        if routing is not None:
            self._routing.setdefault(path, []).append(routing)
        return hidden

    def outputs(self, path: str, outputs: mx.array) -> mx.array:
        """Hold the outputs (..., 1, out) of an FFN for a token, and return them."""
        self._outputs.setdefault(path, []).append(outputs)
        return outputs

    def logits(self, logits: mx.array) -> mx.array:
        """Hold the logits (..., 1, V) of a token, which end it, and return them."""
        if len(self._logits) == _MAX_HELD:
            self.flush()
        self._logits.append(logits)
        return logits

    def flush(self) -> None:
        """Add everything that is held to the statistics, which stay lazy."""
        if not self._logits:
            return
        for path, parts in self._hidden.items():
            routing = Routing.joined(self._routing[path]) if path in self._routing else None
            self._text.update(path, mx.concatenate(parts, axis=-2), routing=routing)
        for path, parts in self._outputs.items():
            self._text.update_outputs(path, mx.concatenate(parts, axis=-2))
        arrays: list[object] = [self._text.sums, self._text.outputs]
        if self._shortlister is not None:
            self._shortlister.observe(mx.concatenate(self._logits, axis=-2))
            arrays += self._shortlister.arrays
        self._hidden, self._routing, self._outputs, self._logits = {}, {}, {}, []
        mx.async_eval(arrays)
