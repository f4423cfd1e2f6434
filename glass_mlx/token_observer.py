"""Observe the tokens that the dense model computes one by one or in drafts, at little cost."""

from itertools import zip_longest
from typing import TypeVar

from glass_mlx.models import Routing
from glass_mlx.statistics import NeuronStatistics
from glass_mlx.vocabulary import Shortlister

import mlx.core as mx
import numpy as np

T = TypeVar("T")

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
        if sum(self._rows[: len(self._taken)]) >= _MAX_HELD:
            self._flush(len(self._taken))

    def flush(self) -> None:
        """Add everything that is held to the statistics, which stay lazy."""
        self._flush(len(self._rows))

    def _flush(self, passes: int) -> None:
        """Add the first passes to the statistics. Those without a count are void."""
        if not passes:
            return
        mask = self._mask(passes)
        # All of it at the end: a model may call an FFN more than once in a pass.
        parts_of_each = None if passes == len(self._rows) else passes
        hidden = _pop_first(self._hidden, parts_of_each)
        routings = _pop_first(self._routing, parts_of_each)
        for path, parts in hidden.items():
            routing = Routing.joined(routings[path]) if path in routings else None
            self._text.update(path, mx.concatenate(parts, axis=-2), mask, routing)
        for path, parts in _pop_first(self._outputs, parts_of_each).items():
            self._text.update_outputs(path, self._joined(parts))
        arrays: list[object] = [self._text.sums, self._text.outputs]
        if self._shortlister is not None and self._logits:
            self._shortlister.observe(self._joined(self._logits[:passes]))
            arrays += self._shortlister.arrays
            del self._logits[:passes]
        del self._rows[:passes], self._taken[:passes]
        mx.async_eval(arrays)

    def _mask(self, passes: int) -> np.ndarray | None:
        """Return which tokens of the first passes count, (T,) of 1 and 0, or None for all."""
        rows, taken = self._rows[:passes], self._taken[:passes]
        if not taken or rows == taken:
            return None
        # A pass that failed has rows, and nothing of it was taken.
        pairs = zip_longest(rows, taken, fillvalue=0)
        return np.concatenate([np.arange(n) < taken for n, taken in pairs])

    def _joined(self, parts: list[mx.array]) -> mx.array:
        """Return the vectors (..., T, n) of all tokens that count."""
        if self._taken:
            parts = [part[..., :n, :] for part, n in zip(parts, self._taken, strict=False)]
        return mx.concatenate(parts, axis=-2)


def _pop_first(held: dict[str, list[T]], count: int | None) -> dict[str, list[T]]:
    """Take the first parts, or all, out of what is held of each FFN."""
    first = {path: parts[:count] for path, parts in held.items()}
    for path, parts in [*held.items()]:
        del parts[:count]
        if not parts:
            del held[path]
    return first
