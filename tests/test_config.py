"""The values that a user decides on are checked where they are given."""

from glass_mlx.config import GlassConfig
from glass_mlx.statistics import MEAN

import pytest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": 0}, "warm-up must be at least 1"),
        ({"refresh": 1}, "at least 2 tokens, or 0"),
        ({"refresh": -3}, "at least 2 tokens, or 0"),
        ({"prior_weight": 1.5}, "between 0 and 1"),
        ({"statistic": MEAN}, "statistic 'mean'"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GlassConfig(**wrong)
