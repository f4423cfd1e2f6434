"""Measure the scores of neurons on sequences: one score per neuron, sequence and statistic."""

from glass_mlx.calibration.impact import measure_impact
from glass_mlx.calibration.moments import SequenceMoments
from glass_mlx.calibration.texts import Sequence, pad
from glass_mlx.models import Routing, check_finite, with_taps
from glass_mlx.session import Session
from glass_mlx.statistics import IMPACT, STATISTICS, NeuronStatistics
from glass_mlx.vocabulary import flattened

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

# Scores by statistic and FFN path, (S, m) or (S, experts, m) for S sequences.
Scores = dict[str, dict[str, np.ndarray]]

# Bounds of the number of tokens and of logits that are read at once, and so of the memory.
_MAX_READ_TOKENS, _MAX_LOGITS = 2048, 2**26


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
    session.ranks.settle()
    streaming = tuple(name for name in statistics if name in STATISTICS)
    max_tokens = min(_MAX_READ_TOKENS, _MAX_LOGITS // len(moments.vocabulary))
    group_size = max(1, max_tokens // max(len(sequence.tokens) for sequence in sequences))
    for start in range(0, len(sequences), group_size):
        group = sequences[start : start + group_size]
        scores, vocabulary, routed = _streaming_scores(session, group, streaming)
        if IMPACT in statistics:
            scores[IMPACT] = _impact_scores(session, group)
        arrays = [vocabulary, *(v for values in scores.values() for v in values.values())]
        if not all(np.isfinite(array).all() for array in arrays):
            check_finite(session.model)
            raise ValueError(
                "the model's activations or gradients are not finite in this precision; try "
                "another one with --dtype"
            )
        moments.add(scores, vocabulary, sum(sum(sequence.mask) for sequence in group), routed)


def _streaming_scores(
    session: Session, sequences: list[Sequence], statistics: tuple[str, ...]
) -> tuple[Scores, np.ndarray, dict[str, np.ndarray]]:
    """Measure hidden vectors and predictions in one forward pass over padded sequences.

    Returns:
        The scores, the sum of flattened predictions (V,) (see `VocabularyStatistics`), and the
        tokens of each sequence that were routed to each expert, (S, experts) by stack.
    """
    tokens, mask = pad(sequences)
    running = NeuronStatistics(session.shapes, statistics, len(sequences), session.total)

    def observe(path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        return running.update(path, hidden, mask, routing)

    # Some models share keys and values between layers by their caches.
    cache = make_prompt_cache(session.model)
    logits = with_taps(session.model, observe, ffns=session.ffns)(tokens, cache=cache)
    vocabulary = (flattened(logits) * mx.array(mask)[..., None]).sum((0, 1))
    mx.eval(running.sums, vocabulary)
    if running.tokens == 0:
        raise ValueError("this model does not run the modules that it exposes")
    scores = {name: running.sequence_scores(name) for name in statistics}
    routed = running.sequence_routed()
    if session.division is not None:
        scores = {name: session.division.whole(values) for name, values in scores.items()}
        routed = {p: counts for part in session.ranks.gather(routed) for p, counts in part.items()}
    return scores, np.array(vocabulary), routed


def _impact_scores(session: Session, sequences: list[Sequence]) -> dict[str, np.ndarray]:
    """Measure the impact in one backward pass per sequence, (S, ..., m) by FFN path."""
    impacts = [measure_impact(session, sequence.tokens, sequence.mask) for sequence in sequences]
    return {path: np.stack([np.array(impact[path]) for impact in impacts]) for path in impacts[0]}
