"""Ranks of scores and their fusion."""

from itertools import permutations

from glass_mlx.ranking import fuse, largest, ranks, spearman

import numpy as np
import pytest


def test_ranks_are_one_to_m_and_the_largest_score_ranks_highest():
    assert ranks(np.array([0.5, 2.0, -1.0])).tolist() == [2, 3, 1]


def test_equal_scores_rank_by_position():
    assert ranks(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [4, 2, 3, 1]


@pytest.mark.parametrize("m", range(1, 8))
@pytest.mark.parametrize("prior_weight", [0.0, 0.3, 0.5, 1.0])
def test_fused_order_is_the_map_ranking(m, prior_weight):
    """Compare with all permutations under a Mallows model with squared Spearman distance."""
    generator = np.random.default_rng(m)
    local, prior = (generator.permutation(m) + 1 for _ in range(2))
    candidates = np.array(list(permutations(range(1, m + 1))))

    def cost(r):
        return (1 - prior_weight) * ((r - local) ** 2).sum(-1) + prior_weight * (
            (r - prior) ** 2
        ).sum(-1)

    assert cost(ranks(fuse(local, prior, prior_weight))) == pytest.approx(cost(candidates).min())


@pytest.mark.parametrize("prior_weight", [-0.1, 1.1, float("nan")])
def test_a_prior_weight_outside_0_1_is_refused(prior_weight):
    with pytest.raises(ValueError, match="between 0 and 1"):
        fuse(np.array([1]), np.array([1]), prior_weight)


@pytest.mark.parametrize("m", [2, 3, 4, 9])
def test_spearman_is_the_correlation_of_ranks(m):
    generator = np.random.default_rng(m)
    a = generator.permutation(m) + 1
    for _ in range(5):
        b = generator.permutation(m) + 1
        assert spearman(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(a, a) == 1
    assert spearman(a, m + 1 - a) == pytest.approx(-1)


def test_a_single_neuron_correlates_with_itself():
    assert spearman(np.array([1]), np.array([1])) == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_and_the_largest_scores_are_those_of_a_stable_sort(dtype):
    """With ties, with signed zeros, with negative scores and with scores of every size."""
    generator = np.random.default_rng(0)
    spread = generator.normal(size=(7, 50)) * 10.0 ** generator.integers(-37, 37, (7, 50))
    ties = generator.integers(-3, 3, (7, 50)) * 0.5
    zeros = np.where(generator.random((7, 50)) < 0.5, 0.0, -0.0)
    for scores in (spread, ties, zeros, ties[0], np.zeros((2, 5)), np.ones(1)):
        values = scores.astype(dtype)
        order = np.argsort(-values, axis=-1, kind="stable")
        m = values.shape[-1]
        expected = np.empty(values.shape, np.int64)
        np.put_along_axis(expected, order, np.broadcast_to(m - np.arange(m), values.shape), -1)
        assert np.array_equal(ranks(values), expected)
        assert ranks(values).dtype == np.int64
        for count in {1, m // 3 + 1, m}:
            kept = largest(values, count)
            assert np.array_equal(kept, np.sort(order[..., :count], axis=-1))
            assert kept.dtype == np.int32
