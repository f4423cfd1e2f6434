"""How active the neurons of each FFN are: running sums over tokens.

In a stack of experts, a token counts for the experts that it was routed to.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from glass_mlx.models import Routing
from glass_mlx.segments import Segments
from glass_mlx.vocabulary import VocabularyStatistics

import mlx.core as mx
import numpy as np

# A token whose hidden vector has a smaller norm counts as zero and adds nothing.
_MIN_NORM = 1e-30

# Once the dense model has read this many generated tokens, they rank neurons instead of the prompt.
MIN_GENERATED_TOKENS = 8


# The shape of arrays with an entry for each neuron, as numpy takes shapes: m or (m,), or
# (experts, m) for a stack.
Shape = int | tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    """Hidden vectors of some tokens, each with its part in the sums.

    Attributes:
        hidden: (..., m) hidden vectors.
        squares: (..., m) float32, their squares.
        mask: (...) float32, 1 for tokens that count and 0 for the others.
        weight: (...) float32, the mask divided by the norm of the hidden vector.
    """

    hidden: mx.array
    squares: mx.array
    mask: mx.array
    weight: mx.array

    @staticmethod
    def of(
        hidden: mx.array, mask: mx.array | None, total: Callable[[mx.array], mx.array]
    ) -> "_Chunk":
        """Return a chunk of hidden vectors.

        Args:
            hidden: (..., m) the hidden vectors.
            mask: (...), 1 for tokens that count and 0 for the others. None: all count.
            total: turns the sums of squares (...) of these neurons into those of all neurons.
        """
        squares = _squares(hidden)
        norm = mx.sqrt(total(squares.sum(-1)))
        weight = mx.where(norm > _MIN_NORM, 1 / mx.maximum(norm, _MIN_NORM), 0)
        if mask is None:
            return _Chunk(hidden, squares, mx.ones_like(weight), weight)
        return _Chunk(hidden, squares, mask, weight * mask)


class _Terms(NamedTuple):
    """The terms of a sum over tokens, as factors (...) and vectors (..., m) float32."""

    factors: mx.array
    vectors: mx.array


# Compiled, so that hidden vectors in half precision are read once and not converted first.
@partial(mx.compile, shapeless=True)
def _squares(hidden: mx.array) -> mx.array:
    return mx.square(hidden.astype(mx.float32))


@partial(mx.compile, shapeless=True)
def _magnitudes(hidden: mx.array) -> mx.array:
    return mx.abs(hidden.astype(mx.float32))


def _activation_terms(chunk: _Chunk) -> _Terms:
    return _Terms(chunk.weight, _magnitudes(chunk.hidden))


def _griffin_terms(chunk: _Chunk) -> _Terms:
    return _Terms(mx.square(chunk.weight), chunk.squares)


def _mean_terms(chunk: _Chunk) -> _Terms:
    return _Terms(chunk.mask, chunk.hidden.astype(mx.float32))


def _identity(mean: np.ndarray) -> np.ndarray:
    return mean


# For each statistic, a chunk's terms of the sum, and a function of the mean over tokens that gives
# the scores.
_Statistic = tuple[Callable[[_Chunk], _Terms], Callable[[np.ndarray], np.ndarray]]
STATISTICS: dict[str, _Statistic] = {
    "activation": (_activation_terms, _identity),
    "griffin": (_griffin_terms, np.sqrt),
}

# The plain mean of hidden vectors. It does not rank neurons but replaces the dropped ones.
MEAN = "mean"
_SUMS = STATISTICS | {MEAN: (_mean_terms, _identity)}

# Turns sums over the neurons of an FFN in this process into sums over all of its neurons, by path.
Total = Callable[[str, mx.array], mx.array]


def alone(path: str, sums: mx.array) -> mx.array:
    """Return sums over the neurons of an FFN, all of which are in this process."""
    return sums


# Entries of a state in addition to the sums of the statistics.
_OUTPUTS, _TOKENS, _ROUTED = "outputs", "tokens", "routed"

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

    For an expert, h_t is its own hidden vector, and the mean is over the tokens routed to it.

    Sums are float32 and lazy. The hidden vectors that `update` returns depend on the sums, so the
    sums are computed together with the layer, and no hidden vector outlives the layer. If nothing
    uses the layer's output, evaluate `sums`.

    `update_outputs` sums the outputs of the FFNs, for `mean_outputs`.

    Args:
        shapes: the number of neurons m of each FFN, or (experts, m), by its path in the model.
        names: which statistics to keep, keys of `STATISTICS` or `MEAN`.
        sequences: the number of sequences S in a batch, for `sequence_scores`.
        total: for a divided model, whose ||h_t|| is over the neurons of all ranks. Default: all
            neurons are here.

    Raises:
        ValueError: for an unknown statistic.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        names: tuple[str, ...] = ("activation",),
        sequences: int = 1,
        total: Total = alone,
    ) -> None:
        for name in names:
            if name not in _SUMS:
                raise ValueError(f"statistic {name!r} is not one of {', '.join(STATISTICS)}")
        self.names = names
        self.sums: dict[str, dict[str, mx.array]] = {}
        for path, shape in shapes.items():
            axes = (shape,) if isinstance(shape, int) else shape
            self.sums[path] = {name: mx.zeros((sequences, *axes), mx.float32) for name in names}
            if len(axes) == 2:  # tokens by expert, which only the device knows
                self.sums[path][_ROUTED] = mx.zeros((sequences, axes[0]), mx.float32)
        self.outputs: dict[str, mx.array] = {}
        self.dtype = mx.float32  # the dtype of the hidden vectors, once there are any
        self._sequences, self.total = sequences, total
        self._tokens = {path: np.zeros(sequences) for path in shapes}

    def copy(self) -> "NeuronStatistics":
        """Return a copy that later updates do not change."""
        other = NeuronStatistics({}, self.names, self._sequences, self.total)
        other.sums = {path: dict(sums) for path, sums in self.sums.items()}
        other._tokens, other.dtype = dict(self._tokens), self.dtype
        other.outputs = dict(self.outputs)
        return other

    def update(
        self,
        path: str,
        hidden: mx.array,
        mask: np.ndarray | None = None,
        routing: Routing | None = None,
    ) -> mx.array:
        """Add the tokens of a chunk.

        Args:
            path: the FFN.
            hidden: (..., m) hidden vectors of its tokens, one sequence after the other; (R, m) of a
                stack.
            mask: (...), 1 for tokens that count and 0 for the others. Default: all count.
            routing: the experts and tokens of a stack's hidden vectors.

        Returns:
            The same hidden vectors, made to depend on the FFN's sums.
        """
        self.dtype = hidden.dtype
        if mask is None:
            count = routing.count if routing else hidden.size // hidden.shape[-1]
            self._tokens[path] = self._tokens[path] + count // self._sequences
        else:
            mask = mask.reshape(self._sequences, -1).astype(np.float32)
            self._tokens[path] = self._tokens[path] + mask.sum(-1)
        if routing is None:
            self._add(path, hidden, mask)
        else:
            self._add_routed(path, hidden, mask, routing)
        return mx.depends(hidden, list(self.sums[path].values()))

    def _add(self, path: str, hidden: mx.array, mask: np.ndarray | None) -> None:
        """Add the tokens of a single FFN; see `update`."""
        values = hidden.reshape(self._sequences, -1, hidden.shape[-1])
        chunk = _Chunk.of(
            values, None if mask is None else mx.array(mask), partial(self.total, path)
        )
        sums = self.sums[path]
        for name in self.names:
            factors, vectors = _SUMS[name][0](chunk)
            sums[name] = sums[name] + (factors[:, None] @ vectors).squeeze(1)

    def _add_routed(
        self, path: str, hidden: mx.array, mask: np.ndarray | None, routing: Routing
    ) -> None:
        """Add the tokens of a stack of experts; see `update`.

        Every expert of every sequence is a segment. The hidden vectors are sorted by segment and
        summed, so that nothing grows with the number of experts but the sums themselves.
        """
        sums = self.sums[path]
        experts = sums[_ROUTED].shape[1]
        sequence = routing.tokens // max(1, routing.count // self._sequences)
        numbers = sequence * experts + routing.experts
        segments = Segments(numbers, self._sequences * experts, is_sorted=routing.count > 1)
        row_mask = None
        if mask is not None:
            row_mask = segments.ordered(mx.array(mask).reshape(-1)[routing.tokens])
        chunk = _Chunk.of(segments.ordered(hidden), row_mask, partial(self.total, path))
        for name in self.names:
            sums[name] = segments.add(sums[name], *_SUMS[name][0](chunk))
        ones = mx.ones((hidden.shape[0], 1), mx.float32)
        sums[_ROUTED] = segments.add(sums[_ROUTED][..., None], chunk.mask, ones).squeeze(-1)

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape (m,) or (experts, m) of each FFN's arrays, by its path."""
        return {path: sums[self.names[0]].shape[1:] for path, sums in self.sums.items()}

    @property
    def tokens(self) -> int:
        """The number of tokens added to the FFN that has the most."""
        return max(int(count.sum()) for count in self._tokens.values())

    def routed(self, path: str) -> np.ndarray | None:
        """Return the number of tokens routed to each expert of a stack, or None for an FFN."""
        return np.array(self.sums[path][_ROUTED]).sum(0) if _ROUTED in self.sums[path] else None

    def sequence_routed(self) -> dict[str, np.ndarray]:
        """Return the number of each sequence's tokens by expert, (S, experts), for all stacks."""
        return {
            path: np.array(sums[_ROUTED]) for path, sums in self.sums.items() if _ROUTED in sums
        }

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN, (m,) float32, larger for a more active neuron.

        For a stack the scores are (experts, m). They are 0 for an expert without tokens.
        """
        return {
            path: self._to_scores(name, np.array(sums[name]).sum(0), self._counts(path).sum(0))
            for path, sums in self.sums.items()
        }

    def sequence_scores(self, name: str) -> dict[str, np.ndarray]:
        """Return the scores of every FFN separately for each sequence, (S, ...); see `scores`."""
        return {
            path: self._to_scores(name, np.array(sums[name]), self._counts(path))
            for path, sums in self.sums.items()
        }

    def combined(
        self, other: "NeuronStatistics", path: str, name: str, alone: np.ndarray
    ) -> np.ndarray:
        """Return the scores (experts, m) of a stack from two sets of statistics.

        Args:
            other: statistics of the same stack.
            path: the stack.
            name: the statistic.
            alone: (experts,) whether an expert's scores come from these statistics alone.
        """
        weights = np.where(alone, 0, 1)[:, None]
        sums, others = (np.array(part.sums[path][name]).sum(0) for part in (self, other))
        tokens = self._counts(path).sum(0) + weights * other._counts(path).sum(0)
        return self._to_scores(name, sums + weights * others, tokens)

    def _counts(self, path: str) -> np.ndarray:
        """Return the tokens of each sequence, (S, 1), or of its experts, (S, experts, 1)."""
        routed = self.sums[path].get(_ROUTED)
        return (self._tokens[path] if routed is None else np.array(routed))[..., None]

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
        names = tuple(name for name in next(iter(groups.values())) if name != _ROUTED)
        restored = NeuronStatistics({}, names, len(next(iter(tokens.values()))))
        for path, arrays in groups.items():
            shapes = {arrays[name].shape[1:] for name in names}
            is_stack = _ROUTED in arrays
            expected = {*names, _ROUTED} if is_stack else {*names}
            if arrays.keys() != expected or len(shapes) != 1 or len(*shapes) != 1 + is_stack:
                raise ValueError(f"the statistics of {path} do not fit together")
            if is_stack and arrays[_ROUTED].shape[1:] != next(iter(shapes))[:1]:
                raise ValueError(f"the statistics of {path} are of another number of experts")
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
            path: {name: mx.array(values) for name, values in arrays.items()}
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
    def empty(
        shapes: Mapping[str, Shape], names: Iterable[str] = STATISTICS, total: Total = alone
    ) -> "LocalStatistics":
        """Return statistics without any tokens.

        Args:
            shapes: the number of neurons m of each FFN, or (experts, m), by its path.
            names: which statistics to keep, keys of `STATISTICS`.
            total: for a divided model; see `NeuronStatistics`.
        """
        names = tuple(names)
        return LocalStatistics(
            NeuronStatistics(shapes, names, total=total),
            NeuronStatistics(shapes, (*names, MEAN), total=total),
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

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Return the local scores (..., m) of every FFN's neurons by one statistic.

        A single FFN is scored by the text if it is long enough, or by the prompt. An expert sees
        few tokens: until it has enough of the text's, it is scored by prompt and text together.
        """
        scores = self.basis.scores(name)
        for path in scores:
            if (routed := self.text.routed(path)) is not None:
                enough = routed >= MIN_GENERATED_TOKENS
                scores[path] = self.text.combined(self.prompt, path, name, enough)
        return scores

    def routed(self, path: str) -> np.ndarray | None:
        """Return the number of tokens (experts,) that a stack's scores rest on; None for an FFN."""
        text, prompt = self.text.routed(path), self.prompt.routed(path)
        if text is None or prompt is None:
            return None
        return np.where(text >= MIN_GENERATED_TOKENS, text, text + prompt)
