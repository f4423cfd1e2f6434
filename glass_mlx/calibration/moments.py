"""Mean and spread of neuron scores over sequences, as running sums."""

from collections.abc import Mapping
from typing import Literal

from glass_mlx.statistics import Shape

import numpy as np

Half = Literal[0, 1]

# The name of the tokens of experts in a state, beside statistics.
_ROUTED = "routed"


class SequenceMoments:
    """Mean and variance over sequences of per-neuron scores, in total and by halves.

    Sequences are assigned alternately to two halves. The agreement of the halves shows how reliable
    the mean is.

    Few of a sequence's tokens reach an expert, and not the same number in every sequence. So each
    sequence counts for an expert by the number of its tokens that were routed there.

    Args:
        shapes: the number of neurons m of each FFN, or (experts, m), by its path in the model.
        names: the statistics to keep.
        vocabulary_size: the number of the model's tokens V.

    Attributes:
        sums: (2, 2, ..., m) float64 by statistic and FFN: for each half, the sum of the scores and
            the sum of their squares.
        routed: (2, experts) float64 by stack: for each half, the tokens routed to each expert.
        vocabulary: (V,) float64, the sum of flattened predictions; see `VocabularyStatistics`.
        sequences: (2,) int64, the number of sequences in each half.
        tokens: the number of tokens in all sequences.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], names: tuple[str, ...], vocabulary_size: int
    ) -> None:
        axes = {path: (s,) if isinstance(s, int) else s for path, s in shapes.items()}
        self.sums = {
            name: {path: np.zeros((2, 2, *shape)) for path, shape in axes.items()} for name in names
        }
        self.routed = {
            path: np.zeros((2, shape[0])) for path, shape in axes.items() if len(shape) == 2
        }
        self.vocabulary = np.zeros(vocabulary_size)
        self.sequences = np.zeros(2, np.int64)
        self.tokens = 0

    def add(
        self,
        scores: Mapping[str, Mapping[str, np.ndarray]],
        vocabulary: np.ndarray,
        tokens: int,
        routed: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add a batch of sequences.

        Args:
            scores: (S, ..., m) scores of S sequences, by statistic and FFN.
            vocabulary: (V,) the sum of flattened predictions.
            tokens: the number of tokens that the scores are measured on.
            routed: (S, experts) the tokens routed to each expert, by stack.
        """
        first_half, routed = int(self.sequences.sum()) % 2, routed or {}
        for name, sums in self.sums.items():
            for path, total in sums.items():
                values = scores[name][path].astype(np.float64)
                weights = routed[path][..., None] if path in self.routed else 1.0
                for half in (0, 1):
                    part = slice(half ^ first_half, None, 2)
                    weighted, half_values = (values * weights)[part], values[part]
                    total[half] += weighted.sum(0), (weighted * half_values).sum(0)
        for path, counts in self.routed.items():
            for half in (0, 1):
                counts[half] += routed[path][half ^ first_half :: 2].sum(0)
        count = len(values)
        self.sequences += [(count + 1 - (half ^ first_half)) // 2 for half in (0, 1)]
        self.vocabulary += vocabulary
        self.tokens += tokens

    def mean(self, name: str, path: str, half: Half | None = None) -> np.ndarray:
        """Return each neuron's mean score, (..., m) float64, over all sequences or one half."""
        mean, _ = self._moments(name, path, half)
        return mean

    def variance(self, name: str, path: str) -> np.ndarray:
        """Return the variance over sequences of each neuron's score, (..., m) float64."""
        mean, mean_square = self._moments(name, path, None)
        variance: np.ndarray = np.maximum(mean_square - mean**2, 0)
        return variance

    def weight(self, path: str, half: Half | None = None) -> np.ndarray:
        """Return what the means of an FFN rest on: sequences (), or tokens (experts, 1)."""
        counts = self.routed[path][..., None] if path in self.routed else self.sequences
        return np.asarray(counts.sum(0) if half is None else counts[half], np.float64)

    def _moments(self, name: str, path: str, half: Half | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of the scores and the mean of their squares, each (..., m) float64."""
        sums = self.sums[name][path]
        mean, mean_square = (sums.sum(0) if half is None else sums[half]) / np.maximum(
            self.weight(path, half), 1
        )
        return mean, mean_square

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums and counts as named arrays, for `restore`."""
        sums = {
            f"{path}.{name}": total
            for name, totals in self.sums.items()
            for path, total in totals.items()
        }
        counts = {"sequences": self.sequences, "tokens": np.array([self.tokens])}
        routed = {f"{path}.{_ROUTED}": counts for path, counts in self.routed.items()}
        return sums | routed | counts | {"vocabulary": self.vocabulary}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state` of the same FFNs and statistics."""
        for name, totals in self.sums.items():
            for path in totals:
                totals[path] = state[f"{path}.{name}"].copy()
        self.routed = {path: state[f"{path}.{_ROUTED}"].copy() for path in self.routed}
        self.sequences, self.tokens = state["sequences"].copy(), int(state["tokens"][0])
        self.vocabulary = state["vocabulary"].copy()
