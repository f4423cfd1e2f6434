"""Ranks of neurons, and the consensus of two rankings.

The neurons of each expert of a stack are ranked among themselves: along the last axis.
"""

import numpy as np

# At this number of tokens an expert's prior weighs as much as that of an FFN that every token
# passes. The weight of that one was chosen for selections after a warm-up of so many tokens.
TYPICAL_TOKENS = 16


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank neurons by importance.

    Args:
        scores: (..., m) finite scores.

    Returns:
        (..., m) int64 ranks 1..m, m for the largest score. Among equal scores the first gets the
        largest rank.
    """
    order = _descending(scores)
    out = np.empty(scores.shape, np.int64)
    descending = np.broadcast_to(np.arange(scores.shape[-1], 0, -1), scores.shape)
    np.put_along_axis(out, order, descending, axis=-1)
    return out


def _descending(scores: np.ndarray) -> np.ndarray:
    """Return the indices (..., m) that sort finite scores from the largest to the smallest.

    Among equal scores the first index comes first. A stable argsort does the same, but all experts
    of a mixture have millions of neurons, and numpy sorts numbers several times as fast. So each
    single-precision score is sorted as one number with its index in the lower half.
    """
    if scores.dtype != np.float32:
        return np.argsort(-scores, axis=-1, kind="stable")
    bits = (0 - scores).view(np.uint32)  # of the negative; 0 has one sign
    # Of floats as integers, negative ones count backwards, and come after the others.
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = ordered << np.uint64(32) | np.arange(scores.shape[-1], dtype=np.uint64)
    return (np.sort(keys, axis=-1) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the sorted indices (..., count) int32 of the largest scores (..., m).

    Among equal scores the first is kept.
    """
    m = scores.shape[-1]
    if count < m:
        smallest = np.partition(scores, m - count, axis=-1)[..., m - count, None]
        above, equal = scores > smallest, scores == smallest
        room = count - above.sum(-1, keepdims=True)
        kept = above | equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= room)
    else:
        kept = np.ones(scores.shape, bool)
    indices = (np.flatnonzero(kept) % m).astype(np.int32)
    return indices.reshape(*scores.shape[:-1], count)


def check_prior_weight(prior_weight: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0 <= prior_weight <= 1:
        raise ValueError(f"the prior weight λ must be between 0 and 1, not {prior_weight}")


def fuse(local: np.ndarray, prior: np.ndarray, prior_weight: float | np.ndarray) -> np.ndarray:
    """Fuse two rankings by weighted rank aggregation (GLASS, arXiv 2508.14302).

    Sorting by the result gives the permutation r that minimizes
    `(1 - λ) * d(r, local) + λ * d(r, prior)`, where d is the squared Spearman distance
    `sum_j (r_j - s_j)^2`. It is the MAP estimate if both rankings are Mallows-distributed around r
    (docs/method.md has the proof).

    Args:
        local: (..., m) ranks 1..m by the local statistics.
        prior: (..., m) ranks 1..m by the global prior.
        prior_weight: λ in [0, 1]; 0 uses the local ranks alone, 1 the prior's alone. For a stack
            it may be (experts, 1).

    Returns:
        (..., m) float64 fused scores, larger for a more important neuron.

    Raises:
        ValueError: if λ is outside [0, 1].
    """
    for weight in np.ravel(prior_weight):
        check_prior_weight(weight)
    return (1 - prior_weight) * local + prior_weight * prior


def expert_prior_weights(
    prior_weight: float,
    tokens: np.ndarray,
    prior_tokens: np.ndarray | None = None,
    typical: int = TYPICAL_TOKENS,
) -> np.ndarray:
    """Return the prior's weight λ_e for each expert of a stack (docs/method.md derives it).

        λ_e = 1 / (1 + n_e (1 / c + 1 / N_e)),  c = n λ / (1 - λ)

    Args:
        prior_weight: λ in [0, 1], the weight for an expert that has read n tokens, if its prior is
            certain.
        tokens: (experts,) n_e, the tokens that the local ranking of each expert rests on.
        prior_tokens: (experts,) N_e, the tokens that the prior rests on. Default: no end of them.
        typical: n.

    Returns:
        (experts,) float64. It is 1 for an expert without local tokens, and 0 for one that has some
        and no prior.
    """
    certainty = prior_weight * typical
    if prior_tokens is None:
        prior_tokens = np.full(tokens.shape, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = np.float64(1 - prior_weight) / certainty + 1 / np.float64(prior_tokens)
        weights = 1 / (1 + tokens * noise)
    return np.where(tokens > 0, weights, 1.0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two rankings of 1..m: 1 - 6 d / (m (m^2 - 1)).

    d is the squared Spearman distance sum_j (a_j - b_j)^2. The correlation of a single neuron is 1,
    and that of a stack's rankings (experts, m) is the mean over experts.
    """
    m = a.shape[-1]
    distance = np.square((a - b).astype(np.float64)).sum(-1).mean()
    return 1.0 if m == 1 else float(1 - 6 * distance / (m * (m**2 - 1)))
