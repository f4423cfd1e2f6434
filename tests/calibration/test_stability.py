"""Agreement between two measurements of a prior."""

from glass_mlx.calibration.stability import compare, overall_stability
from glass_mlx.ranking import spearman

import numpy as np
import pytest


def test_spearman_is_the_correlation_of_ranks():
    generator = np.random.default_rng(0)
    a, b = (generator.permutation(50) + 1 for _ in range(2))
    assert spearman(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(a, a) == 1
    assert spearman(a, 51 - a) == -1
    assert spearman(np.array([1]), np.array([1])) == 1


def test_two_measurements_are_compared_by_ffn():
    a = {"f": np.arange(8.0), "g": np.arange(4.0)}
    b = {"f": np.arange(8.0), "g": -np.arange(4.0)}
    agreement = compare(a, b)
    assert agreement["spearman"] == {"f": 1, "g": -1}
    assert agreement["jaccard 0.5"] == {"f": 1, "g": 0}
    assert agreement["jaccard 0.75"] == {"f": 1, "g": pytest.approx(2 / 4)}
    assert overall_stability({"activation": agreement, "impact": compare(a, a)}) == pytest.approx(
        0.5
    )
