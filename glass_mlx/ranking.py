"""Ranks of neurons, and the consensus of two rankings."""

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank neurons by importance.

    Args:
        scores: (m,) finite scores.

    Returns:
        (m,) int64 ranks 1..m, m for the largest score. Of equal scores the one that stands first
        gets the larger rank.
    """
    order = np.argsort(-scores, kind="stable")
    out = np.empty(len(scores), np.int64)
    out[order] = np.arange(len(scores), 0, -1)
    return out


def fuse(local: np.ndarray, prior: np.ndarray, mix: float) -> np.ndarray:
    """Fuse two rankings by weighted rank aggregation (GLASS, arXiv 2508.14302).

    Sorting by the result gives the permutation r that minimises
    `(1 - mix) * d(r, local) + mix * d(r, prior)` with d the squared Spearman distance
    `sum_j (r_j - s_j)^2`: the MAP estimate when both are Mallows-distributed around r
    (docs/method.md has the proof).

    Args:
        local: (m,) ranks 1..m from the prompt.
        prior: (m,) ranks 1..m from the global prior.
        mix: λ in [0, 1]; 0 takes the prompt alone, 1 the prior alone.

    Returns:
        (m,) float64 fused scores, larger for a more important neuron.

    Raises:
        ValueError: if `mix` is outside [0, 1].
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"the mix λ must be between 0 and 1, not {mix}")
    return (1 - mix) * local + mix * prior


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two rankings (m,) of 1..m: 1 - 6 d / (m (m^2 - 1)).

    d is the squared Spearman distance sum_j (a_j - b_j)^2. One neuron agrees with itself: 1.
    """
    m = len(a)
    distance = np.square((a - b).astype(np.float64)).sum()
    return 1.0 if m == 1 else float(1 - 6 * distance / (m * (m**2 - 1)))
