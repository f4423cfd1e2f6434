"""GlassConfig validates its values in its constructor."""

from glass_mlx.config import GlassConfig, Setting
from glass_mlx.statistics import MEAN

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0}, "warm-up must be at least 1"),
        ({"refresh": 1}, "refresh must be at least 2 tokens, or 0"),
        ({"refresh": -3}, "refresh must be at least 2 tokens, or 0"),
        ({"dense_every": 1}, "dense_every must be at least 2 tokens, or 0"),
        ({"prior_weight": 1.5}, "between 0 and 1"),
        ({"statistic": MEAN}, "statistic 'mean'"),
        ({"density": 0.0}, "density must be above 0"),
        ({"density": float("nan")}, "density must be above 0"),
        ({"vocabulary": 1.5}, "share of the vocabulary must be above 0 and at most 1"),
        ({"max_kl": 0.1, "density": 0.5}, "give either the bound, or density and vocabulary"),
        ({"max_kl": 0.1, "vocabulary": 0.5}, "give either the bound, or density and vocabulary"),
        ({"max_kl": -1}, "bound on KL must be at least 0"),
        ({"max_kl": float("nan")}, "bound on KL must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlassConfig(**options)


def test_a_share_that_is_not_given_is_1_unless_a_bound_decides():
    assert GlassConfig().has_budget
    assert not GlassConfig().is_dense
    assert GlassConfig(density=0.5).shares == (0.5, 1)
    assert GlassConfig(vocabulary=0.5).shares == (1, 0.5)
    assert GlassConfig(density=1.0, vocabulary=1.0).is_dense
    assert not GlassConfig(density=1.0).is_dense  # its tokens are drafted
    assert not GlassConfig(density=1.0, vocabulary=0.5).is_dense


def test_settings_are_named_by_their_flags():
    assert Setting(max_kl=0.05).flags == "--max-kl 0.05"
    assert Setting(density=0.5).flags == "--density 0.5"
    assert Setting(density=0.5, vocabulary=1).flags == "--density 0.5 --vocabulary 1"
    assert Setting(density=1, vocabulary=0.25).flags == "--density 1 --vocabulary 0.25"
    assert Setting(vocabulary=0.25).flags == "--vocabulary 0.25"
