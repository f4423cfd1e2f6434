"""Measure the scores of neurons on sequences: one score per neuron, sequence and statistic."""

from glass_mlx.calibration.impact import measure_impact
from glass_mlx.calibration.moments import SequenceMoments
from glass_mlx.calibration.texts import Sequence, pad
from glass_mlx.models import check_finite, with_taps
from glass_mlx.session import Session
from glass_mlx.statistics import IMPACT, STATISTICS, NeuronStatistics

import mlx.core as mx
import numpy as np

# Scores by statistic and FFN path, (S, m) for S sequences.
Scores = dict[str, dict[str, np.ndarray]]

# The maximum number of tokens read at once, which bounds the memory for reading.
_MAX_READ_TOKENS = 2048


def measure_sequences(
    session: Session,
    sequences: list[Sequence],
    statistics: tuple[str, ...],
    moments: SequenceMoments,
) -> None:
    """Read sequences densely, several at once, and add their scores.

    Args:
        session: the dense model's session.
        sequences: the sequences.
        statistics: the statistics to measure, a subset of `PRIOR_STATISTICS`.
        moments: the sums to add the scores to.

    Raises:
        ValueError: if the model has weights, or computes values, that are not finite.
    """
    streaming = tuple(name for name in statistics if name in STATISTICS)
    group_size = max(1, _MAX_READ_TOKENS // max(len(sequence.tokens) for sequence in sequences))
    for start in range(0, len(sequences), group_size):
        group = sequences[start : start + group_size]
        scores = _streaming_scores(session, group, streaming) if streaming else {}
        if IMPACT in statistics:
            scores[IMPACT] = _impact_scores(session, group)
        if not all(np.isfinite(v).all() for values in scores.values() for v in values.values()):
            check_finite(session.model)
            raise ValueError(
                "the model's activations or gradients are not finite in this precision; try "
                "another one with --dtype"
            )
        moments.add(scores, sum(sum(sequence.mask) for sequence in group))


def _streaming_scores(
    session: Session, sequences: list[Sequence], statistics: tuple[str, ...]
) -> Scores:
    """Measure statistics of the hidden vectors in one forward pass over padded sequences."""
    tokens, mask = pad(sequences)
    running = NeuronStatistics(session.widths, statistics, len(sequences))

    def observe(path: str, hidden: mx.array) -> mx.array:
        return running.update(path, hidden, mask)

    with_taps(session.model, observe, ffns=session.ffns)(tokens)
    mx.eval(running.sums)
    if running.tokens == 0:
        raise ValueError("this model does not run the modules that it exposes")
    return {name: running.sequence_scores(name) for name in statistics}


def _impact_scores(session: Session, sequences: list[Sequence]) -> dict[str, np.ndarray]:
    """Measure the impact in one backward pass per sequence, (S, m) by FFN path."""
    impacts = [measure_impact(session, sequence.tokens, sequence.mask) for sequence in sequences]
    return {path: np.stack([np.array(impact[path]) for impact in impacts]) for path in impacts[0]}
