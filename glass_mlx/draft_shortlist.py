"""The shortlist of drafts that the whole head checks: how many tokens it has, and how many drafts.

A draft is wrong if the whole head samples another token: one outside of the shortlist, or one that
the same random number stands for only if all tokens are there. Then the tokens that were drafted
after it are void. A longer shortlist makes that rarer, and a longer block spreads the bytes of the
whole head, which checks it, over more tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from glass_mlx.vocabulary import (
    NestedLists,
    Shortlist,
    Shortlister,
    VocabularyStatistics,
    expected_outside,
    shares_outside,
)

import mlx.core as mx
import numpy as np

# The shares of the vocabulary and the numbers of drafts that are compared.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
DRAFT_COUNTS = (2, 4, 6, 8)
MAX_DRAFTS = max(DRAFT_COUNTS)

# Vocabularies are sorted by frequency, as most merges of byte pairs are found first for the most
# frequent tokens. So each token is expected in proportion to 1 / (its id + this number).
_FREQUENT_TOKENS = 200

# After so many tokens that were not in the shortlist, it is chosen anew before its time.
MAX_MISSING = 2

# Before any draft is checked, as many are expected to be wrong as tokens are missing. This counts
# as much as one wrong draft.
_EXPECTED_WRONG = 1.0

# A draft is right at least this often, which keeps costs finite.
_MIN_RIGHT = 0.05

# Where drafts would cost this much of the dense model or more, they do not pay.
_MAX_COST = 0.98


@dataclass(frozen=True)
class HeadCost:
    """What the whole head costs.

    Attributes:
        share: its share of the dense model's bytes per token.
        times: how long a product with so many rows takes, over one with a single row, for the
            numbers of drafts that are compared.
    """

    share: float
    times: Mapping[int, float]


def cost_of_drafts(
    share: float, count: int, wrong: float, head: HeadCost, reads_again: bool = False
) -> float:
    """Return the cost of a token of the text, over the dense model's: its bytes, if rows are free.

    Drafts count as dense apart from the head. Where FFNs are sliced they cost less, and blocks are
    a little shorter than they could be.

    Args:
        share: the share of the vocabulary in the shortlist.
        count: the number of drafts in a block.
        wrong: the probability that a draft is wrong.
        head: what the whole head costs.
        reads_again: whether the drafts up to a wrong one are read again before the next block.
    """
    passes = float(count)
    if reads_again:
        passes += sum(n * wrong * (1 - wrong) ** (n - 1) for n in range(1, count))
    drafts = passes * (1 - head.share * (1 - share))
    check = head.share * head.times[count]
    taken = (1 - (1 - wrong) ** count) / wrong  # the mean of drafts up to the first wrong one
    return (drafts + check) / taken


class DraftShortlister(Shortlister):
    """Chooses shortlists for drafts, and measures how often they are wrong.

    Args:
        statistics: the local statistics, to which predictions are added.
        prior: (V,) the prior's mean flattened predictions, or None.
        always: returns the tokens to keep for the tokens of a text.
        size: the number V of tokens.
        head: what the whole head costs.

    Attributes:
        count: the number of drafts in a block.
        wrong: how many drafts were wrong so far.
        reads_again: whether the drafts up to a wrong one are read again; see `cost_of_drafts`.
    """

    def __init__(
        self,
        statistics: VocabularyStatistics,
        prior: np.ndarray | None,
        always: Callable[[Sequence[int]], Collection[int]],
        size: int,
        head: HeadCost,
    ) -> None:
        by_id = _by_id(size)
        expected = by_id if prior is None else (by_id + prior / max(float(prior.sum()), 1e-9)) / 2
        super().__init__(statistics, 1.0, expected, always)
        self.count, self.wrong, self.reads_again = 0, 0, False
        self._head = head
        self._outside: mx.array | None = None
        self._missed = mx.zeros(len(_SHARES))
        self._missed_before, self._expected = np.zeros(len(_SHARES)), 0.0
        self._place: int | None = None  # that of the current shortlist among the shares

    def observe(self, logits: mx.array) -> mx.array:
        """Add predictions (..., V) to the statistics, and measure them.

        Returns:
            The same logits, made to depend on the sums.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        self.add(mx.softmax(flat.astype(mx.float32), axis=-1))
        assert self.statistics.sums is not None
        return mx.depends(logits, [self.statistics.sums, self._missed])

    def add(self, probabilities: mx.array) -> None:
        """Add the probabilities (n, V) float32 of n predictions; see `observe`."""
        # Flattened by a temperature of 2, which saves exponentials of the whole vocabulary.
        roots = mx.sqrt(probabilities)
        self.statistics.add(roots / roots.sum(axis=-1, keepdims=True))
        if self._outside is not None:
            self._measured += len(probabilities)
            self._missed = self._missed + (probabilities @ self._outside).sum(0)
        mx.async_eval(self.arrays)

    def choose(self, text: Sequence[int]) -> Shortlist | None:
        """Choose the shortlist and the number of drafts that cost least.

        Args:
            text: the tokens so far, which begin with those of the last call.

        Returns:
            The shortlist, or None if drafts do not pay.
        """
        excess = self._excess()
        self.shortlist, self.count, self._place = None, 0, None
        scores = self.scores
        assert scores is not None
        kept = self._kept_of(text, len(scores))
        lists = NestedLists(scores, _SHARES, kept)
        missing = expected_outside(lists.outside, np.array(self._missed), self._measured)
        wrong = np.minimum(excess * missing, 1 - _MIN_RIGHT)
        costs = {
            (place, count): cost_of_drafts(
                lists.counts[place] / len(scores), count, wrong[place], self._head, self.reads_again
            )
            for place in range(len(_SHARES))
            for count in DRAFT_COUNTS
        }
        place, count = min(costs, key=lambda choice: costs[choice])
        self._outside = lists.is_outside()
        if costs[place, count] < _MAX_COST and lists.counts[place] < len(scores):
            self.count, self._place = count, place
            chosen = lists.rows(place)
            shares = shares_outside(scores, chosen)
            self.shortlist = Shortlist(chosen, float(wrong[place]), shares)
        return self.shortlist

    def _excess(self) -> float:
        """Return how many times as many drafts were wrong as tokens were expected to be missing."""
        missed = np.array(self._missed)
        if self._place is not None:
            self._expected += float((missed - self._missed_before)[self._place])
        self._missed_before = missed
        return (self.wrong + _EXPECTED_WRONG) / (self._expected + _EXPECTED_WRONG)


def _by_id(size: int) -> np.ndarray:
    """Return how likely each token (size,) is by its id alone."""
    weights = 1 / (np.arange(size, dtype=np.float32) + _FREQUENT_TOKENS)
    return weights / weights.sum()
