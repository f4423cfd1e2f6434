"""Observe the tokens that the dense model computes one by one or in drafts, at little cost."""

from itertools import zip_longest

from glass_mlx.models import Routing
from glass_mlx.statistics import NeuronStatistics
from glass_mlx.vocabulary import Shortlister

import mlx.core as mx
import numpy as np

# So many tokens are held at most before they are added to the statistics.
_MAX_HELD = 32


class TokenObserver:
    """Holds what the dense model computes for single tokens, and adds it to statistics in batches.

    Where passes may compute drafts, of a draft model or of a short head, `take` must follow each of
    them.

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
        self._rows: list[int] = []
        self._taken: list[int] = []

    def hidden(self, path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        """Hold the hidden vectors (..., n, m) of an FFN for n tokens, and return them.

        Args:
            path: the FFN.
            hidden: its hidden vectors; (n K, m) of the K experts of a stack.
            routing: the experts of a stack's hidden vectors.
        """
        self._hidden.setdefault(path, []).append(hidden)
        if routing is not None:
            self._routing.setdefault(path, []).append(routing)
        return hidden

    def outputs(self, path: str, outputs: mx.array) -> mx.array:
        """Hold the outputs (..., n, out) of an FFN for n tokens, and return them."""
        self._outputs.setdefault(path, []).append(outputs)
        return outputs

    def logits(self, logits: mx.array) -> mx.array:
        """Hold the logits (..., n, V) of n tokens, which end them, and return them."""
        if len(self._rows) == _MAX_HELD:
            self.flush()
        self._logits.append(logits)
        self.end_pass(logits.shape[-2])
        return logits

    def end_pass(self, tokens: int) -> None:
        """Note how many tokens a pass has computed. `logits` does that itself."""
        self._rows.append(tokens)

    def take(self, count: int) -> None:
        """Count only the first tokens of the earliest pass without a count. The others are void."""
        self._taken.append(count)
        if len(self._taken) == len(self._rows) and sum(self._rows) >= _MAX_HELD:
            self.flush()

    def flush(self) -> None:
        """Add everything that is held to the statistics, which stay lazy."""
        if not self._rows:
            return
        mask = self._mask()
        for path, parts in self._hidden.items():
            routing = Routing.joined(self._routing[path]) if path in self._routing else None
            self._text.update(path, mx.concatenate(parts, axis=-2), mask, routing)
        for path, parts in self._outputs.items():
            self._text.update_outputs(path, self._joined(parts))
        arrays: list[object] = [self._text.sums, self._text.outputs]
        if self._shortlister is not None and self._logits:
            self._shortlister.observe(self._joined(self._logits))
            arrays += self._shortlister.arrays
        self._hidden, self._routing, self._outputs = {}, {}, {}
        self._logits, self._rows, self._taken = [], [], []
        mx.async_eval(arrays)

    def _mask(self) -> np.ndarray | None:
        """Return which of the tokens that are held count, (T,) of 1 and 0, or None for all."""
        if not self._taken:
            return None
        if self._rows == self._taken:
            return None
        # A pass that failed has rows, and nothing of it was taken.
        pairs = zip_longest(self._rows, self._taken, fillvalue=0)
        return np.concatenate([np.arange(n) < taken for n, taken in pairs])

    def _joined(self, parts: list[mx.array]) -> mx.array:
        """Return the vectors (..., T, n) of all tokens that count."""
        if self._taken:
            parts = [part[..., :n, :] for part, n in zip(parts, self._taken, strict=False)]
        return mx.concatenate(parts, axis=-2)
