"""Mean and spread of neuron scores over sequences, as running sums."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Half = Literal[0, 1]


class SequenceMoments:
    """Mean and variance over sequences of per-neuron scores, in total and by halves.

    Sequences are assigned alternately to two halves. The agreement of the halves shows how reliable
    the mean is.

    Args:
        widths: the number of neurons m of each FFN, by its path in the model.
        names: the statistics to keep.
        vocabulary_size: the number of the model's tokens V.

    Attributes:
        sums: (2, 2, m) float64 by statistic and FFN: for each half, the sum of the scores and the
            sum of their squares.
        vocabulary: (V,) float64, the sum of flattened predictions; see `VocabularyStatistics`.
        sequences: (2,) int64, the number of sequences in each half.
        tokens: the number of tokens in all sequences.
    """

    def __init__(
        self, widths: Mapping[str, int], names: tuple[str, ...], vocabulary_size: int
    ) -> None:
        self.sums = {
            name: {path: np.zeros((2, 2, m)) for path, m in widths.items()} for name in names
        }
        self.vocabulary = np.zeros(vocabulary_size)
        self.sequences = np.zeros(2, np.int64)
        self.tokens = 0

    def add(
        self, scores: Mapping[str, Mapping[str, np.ndarray]], vocabulary: np.ndarray, tokens: int
    ) -> None:
        """Add a batch of sequences.

        Args:
            scores: (S, m) scores of S sequences, by statistic and FFN.
            vocabulary: (V,) the sum of flattened predictions.
            tokens: the number of tokens that the scores are measured on.
        """
        first_half = int(self.sequences.sum()) % 2
        for name, sums in self.sums.items():
            for path, total in sums.items():
                values = scores[name][path].astype(np.float64)
                for half in (0, 1):
                    half_values = values[half ^ first_half :: 2]
                    total[half] += half_values.sum(0), np.square(half_values).sum(0)
        count = len(values)
        self.sequences += [(count + 1 - (half ^ first_half)) // 2 for half in (0, 1)]
        self.vocabulary += vocabulary
        self.tokens += tokens

    def mean(self, name: str, path: str, half: Half | None = None) -> np.ndarray:
        """Return the mean score of each neuron, (m,) float64, over all sequences or one half."""
        mean, _ = self._moments(name, path, half)
        return mean

    def variance(self, name: str, path: str) -> np.ndarray:
        """Return the variance over sequences of each neuron's score, (m,) float64."""
        mean, mean_square = self._moments(name, path, None)
        variance: np.ndarray = np.maximum(mean_square - mean**2, 0)
        return variance

    def _moments(self, name: str, path: str, half: Half | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of the scores and the mean of their squares, each (m,) float64."""
        sums, sequences = self.sums[name][path], self.sequences
        if half is None:
            mean, mean_square = sums.sum(0) / max(sequences.sum(), 1)
        else:
            mean, mean_square = sums[half] / max(sequences[half], 1)
        return mean, mean_square

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums and counts as named arrays, for `restore`."""
        sums = {
            f"{path}.{name}": total
            for name, totals in self.sums.items()
            for path, total in totals.items()
        }
        counts = {"sequences": self.sequences, "tokens": np.array([self.tokens])}
        return sums | counts | {"vocabulary": self.vocabulary}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state` of the same FFNs and statistics."""
        for name, totals in self.sums.items():
            for path in totals:
                totals[path] = state[f"{path}.{name}"].copy()
        self.sequences, self.tokens = state["sequences"].copy(), int(state["tokens"][0])
        self.vocabulary = state["vocabulary"].copy()
