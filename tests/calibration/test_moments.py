"""Mean and variance of scores over sequences."""

from glass_mlx.calibration.moments import SequenceMoments

import numpy as np
import pytest


def random_scores(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batches", [(7,), (3, 4), (1, 2, 1, 3)])
def test_moments_do_not_depend_on_the_batch_size(batches):
    scores, vocabulary = random_scores(7, 5), random_scores(7, 4, seed=1)
    moments = SequenceMoments({"f": 5}, ("activation",), 4)
    first = 0
    for size in batches:
        part = slice(first, first + size)
        moments.add({"activation": {"f": scores[part]}}, vocabulary[part].sum(0), 10 * size)
        first += size
    np.testing.assert_allclose(moments.mean("activation", "f"), scores.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance("activation", "f"), scores.var(0), rtol=1e-4)
    for half in (0, 1):
        np.testing.assert_allclose(
            moments.mean("activation", "f", half), scores[half::2].mean(0), rtol=1e-5
        )
    np.testing.assert_allclose(moments.vocabulary, vocabulary.sum(0), rtol=1e-4)
    assert (moments.sequences.tolist(), moments.tokens) == ([4, 3], 70)


def test_restored_moments_continue_like_the_original():
    a, b = (SequenceMoments({"f": 5}, ("activation",), 4) for _ in range(2))
    a.add({"activation": {"f": random_scores(3, 5)}}, np.ones(4), 3)
    b.restore(a.state())
    for moments in (a, b):
        moments.add({"activation": {"f": random_scores(4, 5, seed=1)}}, np.ones(4), 4)
    for half in (None, 0, 1):
        one, two = (m.mean("activation", "f", half) for m in (a, b))
        assert np.array_equal(one, two)
    assert a.tokens == b.tokens == 7
    assert a.vocabulary.tolist() == b.vocabulary.tolist() == [2, 2, 2, 2]
