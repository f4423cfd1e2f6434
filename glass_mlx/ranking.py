"""Ranks of neurons, and the consensus of two rankings."""

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank neurons by importance.

    Args:
        scores: (m,) finite scores.

    Returns:
        (m,) int64 ranks 1..m, m for the largest score. Among equal scores the first gets the
        largest rank.
    """
    order = np.argsort(-scores, kind="stable")
    out = np.empty(len(scores), np.int64)
    out[order] = np.arange(len(scores), 0, -1)
    return out


def check_prior_weight(prior_weight: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0 <= prior_weight <= 1:
        raise ValueError(f"the prior weight λ must be between 0 and 1, not {prior_weight}")


def fuse(local: np.ndarray, prior: np.ndarray, prior_weight: float) -> np.ndarray:
    """Fuse two rankings by weighted rank aggregation (GLASS, arXiv 2508.14302).

    Sorting by the result gives the permutation r that minimizes
    `(1 - λ) * d(r, local) + λ * d(r, prior)`, where d is the squared Spearman distance
    `sum_j (r_j - s_j)^2`. It is the MAP estimate if both rankings are Mallows-distributed around r
    (docs/method.md has the proof).

    Args:
        local: (m,) ranks 1..m by the local statistics.
        prior: (m,) ranks 1..m by the global prior.
        prior_weight: λ in [0, 1]; 0 uses the local ranks alone, 1 the prior's alone.

    Returns:
        (m,) float64 fused scores, larger for a more important neuron.

    Raises:
        ValueError: if λ is outside [0, 1].
    """
    check_prior_weight(prior_weight)
    return (1 - prior_weight) * local + prior_weight * prior


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two rankings (m,) of 1..m: 1 - 6 d / (m (m^2 - 1)).

    d is the squared Spearman distance sum_j (a_j - b_j)^2. The correlation of a single neuron is 1.
    """
    m = len(a)
    distance = np.square((a - b).astype(np.float64)).sum()
    return 1.0 if m == 1 else float(1 - 6 * distance / (m * (m**2 - 1)))
