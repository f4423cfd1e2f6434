"""How far two measurements of the same neurons agree."""

from collections.abc import Mapping

from glass_mlx.ranking import ranks, spearman
from glass_mlx.selection import neurons_to_keep

import numpy as np

DENSITIES = (0.25, 0.5, 0.75)

# Values by measure and FFN path.
Stability = dict[str, dict[str, float]]


def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Stability:
    """Compare two sets of scores, (..., m) by FFN path.

    Returns:
        For each FFN, "spearman", the correlation of the ranks, and for each density D "jaccard D",
        the Jaccard index of the neurons that the two sets keep.
    """
    stability: Stability = {name: {} for name in ("spearman", *map(_jaccard_name, DENSITIES))}
    for path in a:
        ranks_a, ranks_b = ranks(a[path]), ranks(b[path])
        stability["spearman"][path] = spearman(ranks_a, ranks_b)
        for density in DENSITIES:
            # The same as `selection.select` and `selection.jaccard`, without sorting again.
            width = ranks_a.shape[-1]
            smallest = width - neurons_to_keep(width, density)
            kept = (ranks_a > smallest, ranks_b > smallest)
            share = np.logical_and(*kept).sum() / np.logical_or(*kept).sum()
            stability[_jaccard_name(density)][path] = float(share)
    return stability


def overall_stability(stability: Mapping[str, Stability]) -> float:
    """Return the lowest mean Jaccard index at density 0.5 among all statistics."""
    return min(float(np.mean([*s[_jaccard_name(0.5)].values()])) for s in stability.values())


def _jaccard_name(density: float) -> str:
    return f"jaccard {density:g}"
