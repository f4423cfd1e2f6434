"""How active the neurons of each FFN are: running sums over tokens."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from glass_mlx.vocabulary import VocabularyStatistics

import mlx.core as mx
import numpy as np

# A token whose hidden vector has a smaller norm counts as zero and adds nothing.
_MIN_NORM = 1e-30

# Once the dense model has read this many generated tokens, they rank neurons instead of the prompt.
MIN_GENERATED_TOKENS = 8


@dataclass(frozen=True)
class _Chunk:
    """Hidden vectors of some tokens of S sequences.

    Attributes:
        hidden: (S, T, m) hidden vectors.
        squares: (S, T, m) float32, their squares.
        mask: (S, T) float32, 1 for tokens that count and 0 for the others.
        weight: (S, T) float32, the mask divided by the norm of the hidden vector.
    """

    hidden: mx.array
    squares: mx.array
    mask: mx.array
    weight: mx.array


# Compiled, so that hidden vectors in half precision are read once and not converted first.
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
    return chunk.mask[:, None] @ chunk.hidden.astype(mx.float32)


def _identity(mean: np.ndarray) -> np.ndarray:
    return mean


# For each statistic, a chunk's contribution to the sums (S, 1, m), and a function of the mean over
# tokens that gives the scores.
_Statistic = tuple[Callable[[_Chunk], mx.array], Callable[[np.ndarray], np.ndarray]]
STATISTICS: dict[str, _Statistic] = {
    "activation": (_activation_sum, _identity),
    "griffin": (_griffin_sum, np.sqrt),
}

# The plain mean of hidden vectors. It does not rank neurons but replaces the dropped ones.
MEAN = "mean"
_SUMS = STATISTICS | {MEAN: (_mean_sum, _identity)}

# Entries of a state in addition to the sums of the statistics.
_OUTPUTS, _TOKENS = "outputs", "tokens"

# The statistics of a prior: those above, and one that needs a backward pass (`calibration.impact`).
IMPACT = "impact"
PRIOR_STATISTICS = (*STATISTICS, IMPACT)


class NeuronStatistics:
    """Streaming per-neuron statistics of a set of FFNs.

    With h_t in R^m the hidden vector of token t:

    - "activation" (A-GLASS, arXiv 2508.14302): mean_t |h_tj| / ||h_t||_2
    - "griffin": sqrt(mean_t (h_tj / ||h_t||_2)^2), which ranks neurons as GRIFFIN's sum does
      (arXiv 2404.01365) but does not grow with the number of tokens
    - "mean" (`MEAN`): mean_t h_tj

    Sums are float32 and lazy. The hidden vectors that `update` returns depend on the sums, so the
    sums are computed together with the layer, and no hidden vector outlives the layer. If nothing
    uses the layer's output, evaluate `sums`.

    `update_outputs` sums the outputs of the FFNs, for `mean_outputs`.

    Args:
        widths: the number of neurons m of each FFN, by its path in the model.
        names: which statistics to keep, keys of `STATISTICS` or `MEAN`.
        sequences: the number of sequences S in a batch, for `sequence_scores`.

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
        self.dtype = mx.float32  # the dtype of the hidden vectors, once there are any
        self._sequences = sequences
        self._tokens = {path: np.zeros(sequences) for path in widths}

    def copy(self) -> "NeuronStatistics":
        """Return a copy that later updates do not change."""
        other = NeuronStatistics({}, self.names, self._sequences)
        other.sums = {path: dict(sums) for path, sums in self.sums.items()}
        other._tokens, other.dtype = dict(self._tokens), self.dtype
        other.outputs = dict(self.outputs)
        return other

    def update(self, path: str, hidden: mx.array, mask: np.ndarray | None = None) -> mx.array:
        """Add the tokens of a chunk.

        Args:
            path: the FFN.
            hidden: (..., m) hidden vectors of its tokens, one sequence after the other.
            mask: (...), 1 for tokens that count and 0 for the others. Default: all count.

        Returns:
            The same hidden vectors, made to depend on the FFN's sums.
        """
        self.dtype = hidden.dtype
        values = hidden.reshape(self._sequences, -1, hidden.shape[-1])
        squares = _squares(values)
        norm = mx.sqrt(squares.sum(-1))
        weight = mx.where(norm > _MIN_NORM, 1 / mx.maximum(norm, _MIN_NORM), 0)
        token_mask = mx.ones_like(weight)
        if mask is None:
            self._tokens[path] = self._tokens[path] + values.shape[1]
        else:
            mask = mask.reshape(self._sequences, -1).astype(np.float32)
            token_mask = mx.array(mask)
            weight = weight * token_mask
            self._tokens[path] = self._tokens[path] + mask.sum(-1)
        chunk = _Chunk(values, squares, token_mask, weight)
        sums = self.sums[path]
        for name in self.names:
            sums[name] = sums[name] + _SUMS[name][0](chunk).squeeze(1)
        return mx.depends(hidden, list(sums.values()))

    def update_outputs(self, path: str, outputs: mx.array) -> mx.array:
        """Add the outputs (..., out) of a chunk's tokens; return them, depending on the sum."""
        chunk_sum = outputs.reshape(-1, outputs.shape[-1]).astype(mx.float32).sum(0)
        total = self.outputs.get(path)
        self.outputs[path] = chunk_sum if total is None else total + chunk_sum
        return mx.depends(outputs, [self.outputs[path]])

    def mean_outputs(self) -> dict[str, mx.array]:
        """Return the mean output (out,) float32 of each FFN whose outputs were added."""
        return {path: total / self._tokens[path].sum() for path, total in self.outputs.items()}

    @property
    def widths(self) -> dict[str, int]:
        """The number of neurons of each FFN, by its path."""
        return {path: sums[self.names[0]].shape[-1] for path, sums in self.sums.items()}

    @property
    def tokens(self) -> int:
        """The number of tokens added to the FFN that has the most."""
        return max(int(count.sum()) for count in self._tokens.values())

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN, (m,) float32, larger for a more active neuron."""
        return {
            path: self._to_scores(name, np.array(sums[name]).sum(0), self._tokens[path].sum())
            for path, sums in self.sums.items()
        }

    def sequence_scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN separately for each sequence, (S, m) float32."""
        return {
            path: self._to_scores(name, np.array(sums[name]), self._tokens[path][:, None])
            for path, sums in self.sums.items()
        }

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums and counts as named arrays, for `restored`."""
        arrays = {
            f"{path}.{name}": np.array(total)
            for path, sums in self.sums.items()
            for name, total in sums.items()
        }
        arrays |= {f"{path}.{_OUTPUTS}": np.array(total) for path, total in self.outputs.items()}
        return arrays | {f"{path}.{_TOKENS}": count for path, count in self._tokens.items()}

    @staticmethod
    def restored(state: Mapping[str, np.ndarray], dtype: mx.Dtype) -> "NeuronStatistics":
        """Restore statistics from a `state`, and the dtype of their hidden vectors.

        Raises:
            KeyError, StopIteration, ValueError: if the arrays are not those of a state.
        """
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, values in state.items():
            path, _, name = key.rpartition(".")
            groups.setdefault(path, {})[name] = values
        tokens = {path: arrays.pop(_TOKENS) for path, arrays in groups.items()}
        outputs = {path: arrays.pop(_OUTPUTS, None) for path, arrays in groups.items()}
        names = tuple(next(iter(groups.values())))
        restored = NeuronStatistics({}, names, len(next(iter(tokens.values()))))
        for path, arrays in groups.items():
            widths = {arrays[name].shape[1:] for name in names}
            if arrays.keys() != {*names} or len(widths) != 1 or len(*widths) != 1:
                raise ValueError(f"the statistics of {path} do not fit together")
            if any(len(a) != restored._sequences for a in (tokens[path], *arrays.values())):
                raise ValueError(f"the statistics of {path} are of another number of sequences")
            counts = tokens[path]
            if (
                counts.dtype != np.float64
                or counts.ndim != 1
                or any(a.dtype != np.float32 for a in arrays.values())
            ):
                raise ValueError(f"the statistics of {path} have another data type or shape")
        restored.sums = {
            path: {name: mx.array(arrays[name]) for name in names}
            for path, arrays in groups.items()
        }
        kinds = {(total.dtype, total.shape) for total in outputs.values() if total is not None}
        if len(kinds) > 1 or any(dtype != np.float32 or len(shape) != 1 for dtype, shape in kinds):
            raise ValueError("the sums of outputs have different data types or shapes")
        restored.outputs = {p: mx.array(total) for p, total in outputs.items() if total is not None}
        restored._tokens, restored.dtype = tokens, dtype
        return restored

    @staticmethod
    def _to_scores(name: str, sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return _SUMS[name][1](sums / np.maximum(tokens, 1)).astype(np.float32)


@dataclass(frozen=True)
class LocalStatistics:
    """The statistics of the text that the dense model has read in a generation or conversation.

    Attributes:
        prompt: statistics of the prompt.
        text: statistics of the generated tokens that the dense model has read.
        vocabulary: statistics of the predictions after these generated tokens.
    """

    prompt: NeuronStatistics
    text: NeuronStatistics
    vocabulary: VocabularyStatistics = field(default_factory=VocabularyStatistics)

    @staticmethod
    def empty(widths: Mapping[str, int], names: Iterable[str] = STATISTICS) -> "LocalStatistics":
        """Return statistics without any tokens.

        Args:
            widths: the number of neurons of each FFN, by its path.
            names: which statistics to keep, keys of `STATISTICS`.
        """
        names = tuple(names)
        return LocalStatistics(
            NeuronStatistics(widths, names), NeuronStatistics(widths, (*names, MEAN))
        )

    def copy(self) -> "LocalStatistics":
        """Return a copy that later updates do not change."""
        return LocalStatistics(self.prompt.copy(), self.text.copy(), self.vocabulary.copy())

    @property
    def arrays(self) -> list[object]:
        """All sums, for `mx.eval`: prefill does not compute those of the last FFN."""
        return [self.prompt.sums, self.text.sums, self.text.outputs, self.vocabulary.sums]

    @property
    def has_enough_text(self) -> bool:
        """Whether there are enough generated tokens to rank neurons from these alone."""
        return self.text.tokens >= MIN_GENERATED_TOKENS

    @property
    def basis(self) -> NeuronStatistics:
        """The statistics that rank neurons: the text's if it is long enough, or the prompt's."""
        return self.text if self.has_enough_text else self.prompt
