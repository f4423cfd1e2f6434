"""How active each neuron of each FFN was: running sums over tokens, and over sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np

# Below this a token's hidden vector counts as zero and adds nothing.
_TINY = 1e-30


@dataclass(frozen=True)
class _Chunk:
    """Hidden vectors of some tokens.

    Attributes:
        hidden: (S, T, m), of S sequences.
        squares: (S, T, m) float32, their squares.
        counted: (S, T) float32, 1 for tokens that count and 0 for those that do not.
        weight: (S, T) float32, that over the norm.
    """

    hidden: mx.array
    squares: mx.array
    counted: mx.array
    weight: mx.array


# Hidden vectors of half precision are read once, not converted first.
@partial(mx.compile, shapeless=True)
def _squares(hidden: mx.array) -> mx.array:
    return mx.square(hidden.astype(mx.float32))


@partial(mx.compile, shapeless=True)
def _magnitudes(hidden: mx.array) -> mx.array:
    return mx.abs(hidden.astype(mx.float32))


def _activation_sum(chunk: _Chunk) -> mx.array:
    return chunk.weight[:, None] @ _magnitudes(chunk.hidden)


def _griffin_sum(chunk: _Chunk) -> mx.array:
    return mx.square(chunk.weight)[:, None] @ chunk.squares


def _mean_sum(chunk: _Chunk) -> mx.array:
    return chunk.counted[:, None] @ chunk.hidden.astype(mx.float32)


# What a chunk adds to sums (S, 1, m), and what these become when divided by the tokens.
STATISTICS = {
    "activation": (_activation_sum, lambda mean: mean),
    "griffin": (_griffin_sum, np.sqrt),
}

# The plain mean of hidden vectors, which does not rank neurons but stands in for dropped ones.
MEAN = "mean"
_SUMS = STATISTICS | {MEAN: (_mean_sum, lambda mean: mean)}

# What a state has beside the sums of the statistics.
_OUTPUTS, _TOKENS = "outputs", "tokens"

# What a prior can be measured by: these, and what takes a backward pass (`impact`).
IMPACT = "impact"
PRIOR_STATISTICS = (*STATISTICS, IMPACT)


class NeuronStatistics:
    """Streaming per-neuron statistics of a set of FFNs.

    With h_t in R^m the hidden vector of token t:

    - "activation" (A-GLASS, arXiv 2508.14302): mean_t |h_tj| / ||h_t||_2
    - "griffin": sqrt(mean_t (h_tj / ||h_t||_2)^2), which ranks neurons as GRIFFIN's sum does
      (arXiv 2404.01365) and does not grow with the number of tokens
    - "mean" (`MEAN`): mean_t h_tj

    Sums are float32 and lazy. The hidden vectors that `update` returns depend on them, so that
    they are computed with the layer and no hidden vector outlives it; where nothing uses the
    layer's output, evaluate `sums`.

    Of an FFN's outputs, the mean over the tokens can be had, too (`update_outputs`).

    Args:
        widths: the number of neurons m of each FFN, by its path in the model.
        names: which statistics to keep, keys of `STATISTICS` or `MEAN`.
        sequences: how many sequences S a batch has, for `sequence_scores`.

    Raises:
        ValueError: for an unknown statistic.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        names: tuple[str, ...] = ("activation",),
        sequences: int = 1,
    ) -> None:
        for name in names:
            if name not in _SUMS:
                raise ValueError(f"statistic {name!r} is not one of {', '.join(STATISTICS)}")
        self.names = names
        self.sums = {
            path: {name: mx.zeros((sequences, m), mx.float32) for name in names}
            for path, m in widths.items()
        }
        self.outputs: dict[str, mx.array] = {}
        self.dtype = mx.float32  # of the hidden vectors
        self._sequences = sequences
        self._tokens = {path: np.zeros(sequences) for path in widths}

    def copy(self) -> "NeuronStatistics":
        """Return what has been seen so far, which later updates do not change."""
        other = NeuronStatistics({}, self.names, self._sequences)
        other.sums = {path: dict(sums) for path, sums in self.sums.items()}
        other._tokens, other.dtype = dict(self._tokens), self.dtype
        other.outputs = dict(self.outputs)
        return other

    def update(self, path: str, hidden: mx.array, mask: np.ndarray | None = None) -> mx.array:
        """Add the tokens of a chunk.

        Args:
            path: the FFN.
            hidden: (..., m) hidden vectors of its tokens, sequence after sequence.
            mask: (...), 1 for tokens that count and 0 for those that do not. Default: all count.

        Returns:
            The hidden vectors as they were given, depending on the FFN's sums.
        """
        self.dtype = hidden.dtype
        values = hidden.reshape(self._sequences, -1, hidden.shape[-1])
        squares = _squares(values)
        norm = mx.sqrt(squares.sum(-1))
        weight = mx.where(norm > _TINY, 1 / mx.maximum(norm, _TINY), 0)
        counted = mx.ones_like(weight)
        if mask is None:
            self._tokens[path] = self._tokens[path] + values.shape[1]
        else:
            mask = mask.reshape(self._sequences, -1).astype(np.float32)
            counted = mx.array(mask)
            weight = weight * counted
            self._tokens[path] = self._tokens[path] + mask.sum(-1)
        chunk = _Chunk(values, squares, counted, weight)
        sums = self.sums[path]
        for name in self.names:
            sums[name] = sums[name] + _SUMS[name][0](chunk).squeeze(1)
        return mx.depends(hidden, list(sums.values()))

    def update_outputs(self, path: str, outputs: mx.array) -> mx.array:
        """Add the outputs (..., out) of a chunk's tokens; return them, depending on the sum."""
        added = outputs.reshape(-1, outputs.shape[-1]).astype(mx.float32).sum(0)
        total = self.outputs.get(path)
        self.outputs[path] = added if total is None else total + added
        return mx.depends(outputs, [self.outputs[path]])

    def mean_outputs(self) -> dict[str, mx.array]:
        """The mean (out,) float32 of the outputs of each FFN whose outputs were shown."""
        return {path: total / self._tokens[path].sum() for path, total in self.outputs.items()}

    @property
    def widths(self) -> dict[str, int]:
        """The number of neurons of each FFN, by its path."""
        return {path: sums[self.names[0]].shape[-1] for path, sums in self.sums.items()}

    @property
    def tokens(self) -> int:
        """The number of tokens seen, by the FFN that saw most."""
        return max(int(count.sum()) for count in self._tokens.values())

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN, (m,) float32, larger for a more active neuron."""
        return {
            path: self._finished(name, np.array(sums[name]).sum(0), self._tokens[path].sum())
            for path, sums in self.sums.items()
        }

    def sequence_scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN for each sequence by itself, (S, m) float32."""
        return {
            path: self._finished(name, np.array(sums[name]), self._tokens[path][:, None])
            for path, sums in self.sums.items()
        }

    def state(self) -> dict[str, np.ndarray]:
        """The sums and counts, as named arrays that `restored` takes."""
        arrays = {
            f"{path}.{name}": np.array(total)
            for path, sums in self.sums.items()
            for name, total in sums.items()
        }
        arrays |= {f"{path}.{_OUTPUTS}": np.array(total) for path, total in self.outputs.items()}
        return arrays | {f"{path}.{_TOKENS}": count for path, count in self._tokens.items()}

    @staticmethod
    def restored(state: Mapping[str, np.ndarray], dtype: mx.Dtype) -> "NeuronStatistics":
        """The statistics that a `state` was taken of, of hidden vectors of a type."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, values in state.items():
            path, _, name = key.rpartition(".")
            groups.setdefault(path, {})[name] = values
        tokens = {path: arrays.pop(_TOKENS) for path, arrays in groups.items()}
        outputs = {path: arrays.pop(_OUTPUTS, None) for path, arrays in groups.items()}
        names = tuple(next(iter(groups.values())))
        restored = NeuronStatistics({}, names, len(next(iter(tokens.values()))))
        restored.sums = {
            path: {name: mx.array(arrays[name]) for name in names}
            for path, arrays in groups.items()
        }
        restored.outputs = {p: mx.array(total) for p, total in outputs.items() if total is not None}
        restored._tokens, restored.dtype = tokens, dtype
        return restored

    @staticmethod
    def _finished(name: str, sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return _SUMS[name][1](sums / np.maximum(tokens, 1)).astype(np.float32)


class SequenceMoments:
    """Mean and spread over sequences of per-neuron scores, for two halves of the sequences.

    Sequences go to the halves in turn, so that the halves say how far the mean can be trusted.

    Args:
        widths: the number of neurons m of each FFN, by its path in the model.
        names: the statistics that are kept.

    Attributes:
        sums: by statistic and FFN, (2, 2, m) float64: for each half the sum of the scores and of
            their squares.
        sequences: (2,) int64, the number of sequences in each half.
        tokens: the number of tokens in all of them.
    """

    def __init__(self, widths: Mapping[str, int], names: tuple[str, ...]) -> None:
        self.sums = {
            name: {path: np.zeros((2, 2, m)) for path, m in widths.items()} for name in names
        }
        self.sequences = np.zeros(2, np.int64)
        self.tokens = 0

    def add(self, scores: Mapping[str, Mapping[str, np.ndarray]], tokens: int) -> None:
        """Add a batch: scores (S, m) by statistic and FFN, and the tokens they are from."""
        first = int(self.sequences.sum()) % 2
        for name, sums in self.sums.items():
            for path, total in sums.items():
                values = scores[name][path].astype(np.float64)
                for half in (0, 1):
                    mine = values[half ^ first :: 2]
                    total[half] += mine.sum(0), np.square(mine).sum(0)
        count = len(values)
        self.sequences += [(count + 1 - (half ^ first)) // 2 for half in (0, 1)]
        self.tokens += tokens

    def mean(self, name: str, path: str, half: Literal[0, 1] | None = None) -> np.ndarray:
        """The mean score of each neuron, (m,) float64, over all sequences or those of a half."""
        return self._moments(name, path, half)[0]

    def variance(self, name: str, path: str) -> np.ndarray:
        """The variance over sequences of the score of each neuron, (m,) float64."""
        mean, square = self._moments(name, path, None)
        return np.maximum(square - mean**2, 0)

    def _moments(self, name: str, path: str, half: int | None) -> np.ndarray:
        sums = self.sums[name][path]
        if half is None:
            return sums.sum(0) / max(self.sequences.sum(), 1)
        return sums[half] / max(self.sequences[half], 1)

    def state(self) -> dict[str, np.ndarray]:
        """The sums and counts, as named arrays that `restore` takes back."""
        sums = {
            f"{path}.{name}": total
            for name, totals in self.sums.items()
            for path, total in totals.items()
        }
        return sums | {"sequences": self.sequences, "tokens": np.array([self.tokens])}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state` of the same FFNs and statistics."""
        for name, totals in self.sums.items():
            for path in totals:
                totals[path] = state[f"{path}.{name}"].copy()
        self.sequences, self.tokens = state["sequences"].copy(), int(state["tokens"][0])
