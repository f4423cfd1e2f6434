"""How much two measurements of the same neurons agree."""

from collections.abc import Mapping

from glass_mlx.ranking import ranks, spearman
from glass_mlx.selection import budget

import numpy as np

DENSITIES = (0.25, 0.5, 0.75)

# measure -> FFN -> value
Stability = dict[str, dict[str, float]]


def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Stability:
    """Compare two sets of scores, (m,) by FFN.

    Returns:
        By FFN, "spearman", the correlation of the ranks, and "jaccard D" for each density D, the
        Jaccard index of the neurons that the two keep.
    """
    stability: Stability = {name: {} for name in ("spearman", *map(_jaccard_name, DENSITIES))}
    for path in a:
        one, two = ranks(a[path]), ranks(b[path])
        stability["spearman"][path] = spearman(one, two)
        for density in DENSITIES:
            # as `selection.select` and `jaccard` have it, without sorting again
            kept = [rank > len(rank) - budget(len(rank), density) for rank in (one, two)]
            share = np.logical_and(*kept).sum() / np.logical_or(*kept).sum()
            stability[_jaccard_name(density)][path] = float(share)
    return stability


def _jaccard_name(density: float) -> str:
    return f"jaccard {density:g}"


def overall(stability: Mapping[str, Stability]) -> float:
    """One figure for all statistics: the least of their mean Jaccard indices at density 0.5."""
    return min(float(np.mean([*s[_jaccard_name(0.5)].values()])) for s in stability.values())
