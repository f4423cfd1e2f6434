"""Selections of neurons by score."""

from glass_mlx.selection import densities, jaccard, neurons_to_keep, select

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("width", "density", "multiple", "kept"),
    [
        (1536, 0.5, 32, 768),
        (1536, 0.9, 32, 1376),
        (100, 0.999, 32, 96),
        (100, 1.0, 32, 100),
        (100, 0.01, 32, 32),
        (20, 0.5, 32, 20),
        (8192, 0.45, 512, 3584),
    ],
)
def test_neurons_to_keep_are_multiples_within_the_width(width, density, multiple, kept):
    assert neurons_to_keep(width, density, multiple) == kept


@pytest.mark.parametrize("density", [0, -1, 1.01, 2, float("nan")])
def test_a_density_outside_0_1_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        neurons_to_keep(10, density)


def test_the_largest_scores_are_kept_in_order_and_ties_go_to_the_first():
    selection = select({"a": np.array([3.0, 1.0, 3.0, 9.0, 3.0])}, 0.6, {"a": 1})
    assert selection.indices["a"].tolist() == [0, 2, 3]
    assert selection.density == 0.6


def test_the_density_counts_neurons_over_ffns_of_different_widths():
    scores = {"a": np.arange(64.0), "b": np.arange(32.0)}
    assert select(scores, 0.5, {"a": 32, "b": 32}).density == pytest.approx(64 / 96)


def test_ffns_kept_dense_lower_the_density_of_the_others():
    widths = {"a": 64, "b": 32, "c": 32}
    assert densities(widths, 0.5, ()) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert densities(widths, 0.5, ["b"]) == {"a": pytest.approx(1 / 3), "b": 1, "c": 1 / 3}
    # Too few neurons would remain for a and c: less than half of what all FFNs would get.
    assert densities(widths, 0.42, ["b"])["a"] == pytest.approx((0.42 - 0.25) / 0.75)
    assert densities(widths, 0.39, ["b"]) == {"a": 0.39, "b": 0.39, "c": 0.39}
    assert densities(widths, 0.3, ["b"]) == {"a": 0.3, "b": 0.3, "c": 0.3}
    assert densities(widths, 0.5, ["a", "b", "c"]) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert densities(widths, 1.0, ["b"]) == {"a": 1, "b": 1, "c": 1}
    scores = {path: np.arange(width) for path, width in widths.items()}
    selection = select(scores, 0.5, {"a": 1, "b": 1, "c": 1}, ["b"])
    assert [len(kept) for kept in selection.indices.values()] == [21, 32, 11]
    assert selection.density == 0.5


def test_jaccard_index_by_ffn():
    a = select({"f": np.array([4.0, 3, 2, 1])}, 0.5, {"f": 1})
    b = select({"f": np.array([4.0, 1, 2, 3])}, 0.5, {"f": 1})
    assert jaccard(a, a) == {"f": 1.0}
    assert jaccard(a, b) == {"f": pytest.approx(1 / 3)}


def test_jaccard_index_of_selections_of_different_sizes():
    a = select({"f": np.arange(8.0)}, 0.75, {"f": 1})
    b = select({"f": -np.arange(8.0)}, 0.5, {"f": 1})
    assert jaccard(a, b) == jaccard(b, a) == {"f": 2 / 8}


def test_by_default_any_number_of_neurons_is_kept():
    assert [neurons_to_keep(10, density) for density in (0.1, 0.3, 0.5, 1)] == [1, 3, 5, 10]
