"""GlassConfig validates its values in its constructor."""

from glass_mlx.config import GlassConfig
from glass_mlx.statistics import MEAN

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0}, "warm-up must be at least 1"),
        ({"refresh": 1}, "at least 2 tokens, or 0"),
        ({"refresh": -3}, "at least 2 tokens, or 0"),
        ({"prior_weight": 1.5}, "between 0 and 1"),
        ({"statistic": MEAN}, "statistic 'mean'"),
        ({"density": "high"}, "must be a number or 'auto'"),
        ({"density": "high", "max_kl": 0.1}, "must be a number or 'auto'"),
        ({"density": "auto"}, "give both or none"),
        ({"max_kl": 0.1}, "give both or none"),
        ({"density": "auto", "max_kl": 0}, "bound on KL must be positive"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlassConfig(**options)
