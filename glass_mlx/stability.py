"""How much two measurements of the same neurons agree."""

from collections.abc import Mapping

from glass_mlx.ranking import ranks, spearman
from glass_mlx.selection import jaccard, select

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
    agreement = {"spearman": {path: spearman(ranks(a[path]), ranks(b[path])) for path in a}}
    for density in DENSITIES:
        kept = (select(scores, density, dict.fromkeys(scores, 1)) for scores in (a, b))
        agreement[f"jaccard {density:g}"] = jaccard(*kept)
    return agreement


def overall(stability: Mapping[str, Stability]) -> float:
    """One figure for all statistics: the least of their mean Jaccard indices at density 0.5."""
    return min(float(np.mean([*s["jaccard 0.5"].values()])) for s in stability.values())
