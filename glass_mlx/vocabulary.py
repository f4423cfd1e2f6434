"""The shortlist: the tokens whose logits the sliced model computes.

All other tokens share a small probability that is measured on the dense model's predictions.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from glass_mlx.models.head import with_other_logits

import mlx.core as mx
import numpy as np

# The prior counts as much as this many tokens of the text.
_PRIOR_TOKENS = 16

# Before anything is measured, the probability outside of a shortlist is expected to be this much of
# the squared share of the scores outside, because scores are sums of about the square roots of
# probabilities. The expectation counts as much as this many measured tokens.
# docs/experiments.md has measurements.
_EXPECTED_OUTSIDE, _EXPECTATION_TOKENS = 0.2, 8

# Every token outside gets at least this share of what it would get if all shares were equal.
_MIN_SHARE = 1e-3

# A word of the text may continue from tokens that were already read, at most this many.
_OVERLAP = 8

# The number of rows of the head is rounded to this multiple, which suits the kernels.
_MULTIPLE = 64


class VocabularyStatistics:
    """How plausible each token is: the sum of flattened predictions.

    A prediction is flattened by a temperature of 2, so that a token that is always a little likely
    counts as much as one that is very likely once. docs/experiments.md compares it with other
    functions of the probabilities.

    Attributes:
        sums: (V,) float32, lazy; None before the first token.
    """

    def __init__(self, sums: mx.array | None = None) -> None:
        self.sums = sums

    def copy(self) -> "VocabularyStatistics":
        """Return a copy that later updates do not change."""
        return VocabularyStatistics(self.sums)

    def update(self, logits: mx.array) -> mx.array:
        """Add the predictions (..., V) of some tokens; return them, depending on the sum."""
        flat = logits.reshape(-1, logits.shape[-1])
        self.add(flattened(flat))
        assert self.sums is not None
        return mx.depends(logits, [self.sums])

    def add(self, predictions: mx.array) -> None:
        """Add flattened predictions (n, V)."""
        total = predictions.sum(0)
        self.sums = total if self.sums is None else self.sums + total

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums as a named array, for `restored`."""
        return {} if self.sums is None else {"sums": np.array(self.sums)}

    @staticmethod
    def restored(state: dict[str, np.ndarray]) -> "VocabularyStatistics":
        """Restore statistics from a `state`.

        Raises:
            KeyError, ValueError: if the arrays are not those of a state.
        """
        if not state:
            return VocabularyStatistics()
        sums = state["sums"]
        if sums.dtype != np.float32 or sums.ndim != 1 or not np.all(sums >= 0):
            raise ValueError("the statistics of the vocabulary have another data type or shape")
        return VocabularyStatistics(mx.array(sums))


def log_probabilities(logits: mx.array) -> mx.array:
    """Return the log-probabilities, (..., V) float32, of logits (..., V)."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def flattened(logits: mx.array) -> mx.array:
    """Return the probabilities at a temperature of 2, (..., V) float32, of logits (..., V)."""
    return mx.softmax(logits.astype(mx.float32) / 2, axis=-1)


def rows_to_keep(size: int, share: float) -> int:
    """Return the number of rows that a head of `size` rows keeps: a multiple, or all."""
    return size if share >= 1 else min(size, _MULTIPLE * max(1, round(share * size / _MULTIPLE)))


class NestedLists:
    """The tokens of the largest scores for several shares, each list among those of the next.

    A list is described by its smallest score, because to sort out the tokens of all lists takes
    several times as long.

    Args:
        scores: (V,) scores of the tokens.
        shares: the shares of tokens to keep, in (0, 1], increasing.
        always: tokens to keep whatever their scores are. If there are more of them than a share
            allows, all of them are kept.

    Attributes:
        counts: the number of tokens in each list.
        outside: (lists,) the share of the scores outside of each list.
    """

    def __init__(self, scores: np.ndarray, shares: Sequence[float], always: Iterable[int]) -> None:
        size, kept = len(scores), np.unique(np.array([*always], np.int64))
        least = min(size, _MULTIPLE * -(-len(kept) // _MULTIPLE))
        self.counts = [max(rows_to_keep(size, share), least) for share in shares]
        self._scores = scores.copy()
        self._scores[kept] = np.inf
        self._smallest = np.empty(len(shares), scores.dtype)
        total = max(float(scores.sum()), np.finfo(np.float32).tiny)
        inside, of_kept = np.empty(len(shares)), float(scores[kept].sum())
        largest = self._scores
        for place, count in reversed([*enumerate(self.counts)]):
            largest = np.partition(largest, len(largest) - count)[len(largest) - count :]
            self._smallest[place] = largest[0]
            inside[place] = of_kept + float(largest[np.isfinite(largest)].sum())
        self.outside = 1 - inside / total

    def rows(self, place: int) -> np.ndarray:
        """Return the tokens of a list by its place, (k,) int32, sorted."""
        smallest = self._smallest[place]
        is_inside = self._scores > smallest
        equal = np.flatnonzero(self._scores == smallest)
        is_inside[equal[: self.counts[place] - np.count_nonzero(is_inside)]] = True
        return np.flatnonzero(is_inside).astype(np.int32)

    def is_outside(self) -> mx.array:
        """Return which tokens are outside of each list, (V, lists) float32.

        Tokens with the smallest score of a list count as inside.
        """
        outside = mx.array(self._scores)[:, None] < mx.array(self._smallest)
        return outside.astype(mx.float32)


def choose_rows(scores: np.ndarray, share: float, always: Iterable[int]) -> np.ndarray:
    """Choose the tokens of the largest scores; see `NestedLists`.

    Returns:
        (k,) int32 sorted token ids.
    """
    return NestedLists(scores, [share], always).rows(0)


def shares_outside(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the share (V,) of each token outside of `rows` in their probability; see `Shortlist`.

    Args:
        scores: (V,) scores of the tokens.
        rows: (k,) the tokens inside, fewer than V.
    """
    others = scores / max(scores.sum(), np.finfo(np.float32).tiny)
    others[rows] = 0
    others **= 2
    others += _MIN_SHARE * others.mean() + np.finfo(np.float32).tiny
    others[rows] = 0
    return (others / others.sum()).astype(np.float32)


def expected_outside(of_scores: Any, measured: Any, tokens: int) -> Any:
    """Return the expected probability outside of a shortlist.

    Args:
        of_scores: the share of the scores outside.
        measured: the sum of the probabilities outside over measured tokens.
        tokens: the number of these tokens.
    """
    total = measured + _EXPECTATION_TOKENS * _EXPECTED_OUTSIDE * of_scores**2
    return np.clip(total / (tokens + _EXPECTATION_TOKENS), 1e-9, 0.99)


@dataclass(frozen=True)
class Shortlist:
    """The tokens whose logits are computed, and the probabilities of all others.

    Attributes:
        rows: (k,) int32 sorted token ids.
        outside: the probability of all other tokens together.
        shares: (V,) float32, the share of each other token in it; 0 for the tokens in `rows`.
    """

    rows: np.ndarray
    outside: float
    shares: np.ndarray

    @property
    def share(self) -> float:
        """The share of tokens whose logits are computed."""
        return len(self.rows) / len(self.shares)

    @cached_property
    def _is_other(self) -> mx.array:
        """Whether a token is not in `rows`, (V,) float32."""
        return mx.array((self.shares > 0).astype(np.float32))

    @property
    def log_odds(self) -> mx.array:
        """The log-odds (V,) float32 of every other token against all tokens in `rows` together."""
        odds = self.outside / (1 - self.outside)
        return mx.array(np.log(np.maximum(self.shares * odds, 1e-30)).astype(np.float32))

    def back_off(self, logits: mx.array) -> mx.array:
        """Replace the logits (..., V) of all other tokens by their constant odds."""
        rows = mx.array(self.rows)
        return with_other_logits(logits[..., rows], rows, self.log_odds)

    def missed(self, logits: mx.array) -> mx.array:
        """Return the probability (n,) float32 that predictions give to all other tokens.

        Args:
            logits: (n, V) the dense model's logits of n tokens.
        """
        return mx.softmax(logits.astype(mx.float32), axis=-1) @ self._is_other


class Shortlister:
    """Chooses the shortlists of one generation, and measures what they leave out.

    Args:
        statistics: the local statistics, to which predictions are added.
        share: the share of tokens to keep, in (0, 1].
        prior: (V,) the prior's mean flattened predictions, or None.
        always: returns the tokens to keep for the tokens of a text. Default: the same tokens.

    Attributes:
        share: the share of tokens.
        shortlist: the latest shortlist, or None if all tokens are kept.
    """

    def __init__(
        self,
        statistics: VocabularyStatistics,
        share: float,
        prior: np.ndarray | None,
        always: Callable[[Sequence[int]], Collection[int]] = frozenset,
    ) -> None:
        self.statistics, self.share = statistics, share
        self.shortlist: Shortlist | None = None
        self._prior, self._always = prior, always
        self._kept: set[int] = set()
        self._read = 0
        self._measured, self._missed = 0, mx.zeros(())

    @property
    def arrays(self) -> list[object]:
        """All sums, for `mx.eval`: prefill does not compute logits."""
        return [self.statistics.sums, self._missed]

    @property
    def scores(self) -> np.ndarray | None:
        """The scores (V,) of all tokens, or None if nothing is known of them."""
        local = self.statistics.sums
        if local is None:
            return None if self._prior is None else self._prior.copy()
        scores: np.ndarray = np.array(local)
        return scores if self._prior is None else scores + _PRIOR_TOKENS * self._prior

    def observe(self, logits: mx.array) -> mx.array:
        """Add predictions (..., V) of the dense model to the statistics, and measure them.

        Returns:
            The same logits, made to depend on the sums.
        """
        logits = self.statistics.update(logits)
        if self.shortlist is None:
            return logits
        flat = logits.reshape(-1, logits.shape[-1])
        self._measured += len(flat)
        self._missed = self._missed + self.shortlist.missed(flat).sum()
        return mx.depends(logits, [self._missed])

    def keep(self, text: Sequence[int]) -> None:
        """Keep, from now on, the tokens that a text always needs."""
        self._kept.update(self._always(text))

    def choose(self, text: Sequence[int]) -> Shortlist | None:
        """Choose the shortlist for the next tokens.

        Args:
            text: the tokens so far, which begin with those of the last call.

        Returns:
            The shortlist, or None if all tokens are kept.
        """
        self.shortlist = None
        scores = self.scores
        if scores is not None and self.share < 1:
            lists = NestedLists(scores, [self.share], self._kept_of(text, len(scores)))
            rows = lists.rows(0)
            if len(rows) < len(scores):
                outside = self._expected_outside(float(lists.outside[0]))
                self.shortlist = Shortlist(rows, outside, shares_outside(scores, rows))
        return self.shortlist

    def _kept_of(self, text: Sequence[int], size: int) -> list[int]:
        """Return the tokens below a vocabulary's size that a text needs; see `choose`."""
        self.keep(text[max(0, self._read - _OVERLAP) :])
        self._read = len(text)
        return [token for token in self._kept if token < size]

    def _expected_outside(self, of_scores: float) -> float:
        """Return the expected probability outside of a shortlist, from that of the scores."""
        return float(expected_outside(of_scores, float(self._missed), self._measured))
