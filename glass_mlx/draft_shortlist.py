"""The shortlist of drafts that the whole head checks: how many tokens it has, and how many drafts.

A draft is wrong if the dense model samples a token outside of the shortlist. Then the tokens that
were drafted after it are void. A longer shortlist makes that rarer, and a longer block spreads the
bytes of the whole head, which checks it, over more tokens.
"""

from collections.abc import Callable, Collection, Sequence

from glass_mlx.vocabulary import (
    Shortlist,
    Shortlister,
    VocabularyStatistics,
    choose_nested_rows,
    expected_outside,
    scores_outside,
    shares_outside,
)

import mlx.core as mx
import numpy as np

# The shares of the vocabulary and the numbers of drafts that are compared.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_COUNTS = (2, 4, 6, 8)

# A product with several rows takes this much longer for each further row. A GPU took 1.5 times as
# long for 4 rows as for one, and a CPU 1.2 times (docs/experiments.md).
_ROW_COST = 0.1

# Where this share of the bytes or more would be read, drafts do not pay.
_MAX_COST = 0.98


def cost_of_drafts(share: float, count: int, wrong: float, head_share: float) -> float:
    """Return the bytes per token of the text, over the dense model's.

    Args:
        share: the share of the vocabulary in the shortlist.
        count: the number of drafts in a block.
        wrong: the probability that a draft is wrong.
        head_share: the share of the whole head in the dense model's bytes.
    """
    drafts = count * (1 - head_share * (1 - share))
    check = head_share * (1 + _ROW_COST * (count - 1))
    taken = (1 - (1 - wrong) ** count) / wrong  # the mean of drafts up to the first wrong one
    return (drafts + check) / taken


class DraftShortlister(Shortlister):
    """Chooses shortlists for drafts, and measures how often they are wrong.

    Args:
        statistics: the local statistics, to which predictions are added.
        prior: (V,) the prior's mean flattened predictions, or None.
        always: returns the tokens to keep for the tokens of a text.
        head_share: the share of the whole head in the dense model's bytes per token.

    Attributes:
        count: the number of drafts in a block.
    """

    def __init__(
        self,
        statistics: VocabularyStatistics,
        prior: np.ndarray | None,
        always: Callable[[Sequence[int]], Collection[int]],
        head_share: float,
    ) -> None:
        super().__init__(statistics, 1.0, prior, always)
        self.count = 0
        self._head_share = head_share
        self._outside: mx.array | None = None
        self._sums = mx.zeros(len(_SHARES))

    @property
    def measured(self) -> None:
        """Nothing: a text of checked drafts costs no KL divergence."""
        return None

    def observe(self, logits: mx.array) -> mx.array:
        """Add predictions (..., V) of the dense model to the statistics, and measure them.

        Returns:
            The same logits, made to depend on the sums.
        """
        logits = self.statistics.update(logits)
        if self._outside is not None:
            flat = logits.reshape(-1, logits.shape[-1]).astype(mx.float32)
            self._measured += len(flat)
            self._sums = self._sums + (mx.softmax(flat, axis=-1) @ self._outside).sum(0)
            logits = mx.depends(logits, [self._sums])
        return logits

    def choose(self, text: Sequence[int]) -> Shortlist | None:
        """Choose the shortlist and the number of drafts that read the fewest bytes.

        Args:
            text: the tokens so far, which begin with those of the last call.

        Returns:
            The shortlist, or None if drafts do not pay.
        """
        self.shortlist, self.share, self.count = None, 1.0, 0
        scores = self.scores
        if scores is None:
            return None
        kept = self._kept_of(text, len(scores))
        rows = choose_nested_rows(scores, _SHARES, kept)
        of_scores = np.array([scores_outside(scores, r) for r in rows])
        wrong = expected_outside(of_scores, np.array(self._sums), self._measured)
        costs = {
            (place, count): cost_of_drafts(
                len(rows[place]) / len(scores), count, wrong[place], self._head_share
            )
            for place in range(len(_SHARES))
            for count in _COUNTS
        }
        place, count = min(costs, key=lambda choice: costs[choice])
        self._outside = _is_outside(rows, len(scores))
        chosen = np.sort(rows[place]).astype(np.int32)
        if costs[place, count] < _MAX_COST and len(chosen) < len(scores):
            self.count, self.share = count, len(chosen) / len(scores)
            shares = shares_outside(scores, chosen)
            self.shortlist = Shortlist(chosen, float(wrong[place]), shares)
        return self.shortlist


def _is_outside(rows: Sequence[np.ndarray], size: int) -> mx.array:
    """Return whether each token is outside of each of several nested lists, (size, lists) float32.

    Args:
        rows: the tokens of each list, among those of the next.
        size: the number of tokens.
    """
    first = np.full(size, len(rows), np.uint8)  # the first list that has the token
    for number, inside in reversed([*enumerate(rows)]):
        first[inside] = number
    return (mx.array(first)[:, None] > mx.arange(len(rows))).astype(mx.float32)
