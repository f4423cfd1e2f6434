"""Statistics of hidden vectors."""

from glass_mlx.statistics import MEAN, NeuronStatistics

import mlx.core as mx
import numpy as np
import pytest


def hidden(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_statistics_follow_their_formulas():
    h = hidden(7, 5)
    statistics = NeuronStatistics({"f": 5}, ("activation", "griffin"))
    statistics.update("f", mx.array(h))
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    np.testing.assert_allclose(
        statistics.scores("activation")["f"], np.abs(unit).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(
        statistics.scores("griffin")["f"], np.sqrt((unit**2).mean(0)), rtol=1e-5
    )
    assert statistics.tokens == 7


def test_masked_tokens_do_not_count():
    h = hidden(2, 4, 5)
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    masked, plain = NeuronStatistics({"f": 5}), NeuronStatistics({"f": 5})
    masked.update("f", mx.array(h), mask)
    plain.update("f", mx.array(np.concatenate([h[0, 1:], h[1, :2]])))
    np.testing.assert_allclose(
        masked.scores("activation")["f"], plain.scores("activation")["f"], rtol=1e-6
    )
    assert masked.tokens == plain.tokens == 5


def test_zero_vectors_and_half_precision_stay_finite():
    statistics = NeuronStatistics({"f": 4}, ("activation", "griffin"))
    large = mx.full((1, 4), 60000, mx.float16)
    statistics.update("f", mx.concatenate([large, mx.zeros((1, 4), mx.float16)]))
    np.testing.assert_allclose(statistics.scores("activation")["f"], 0.25)
    np.testing.assert_allclose(statistics.scores("griffin")["f"], 0.5**1.5)


def test_update_returns_the_hidden_vectors():
    statistics = NeuronStatistics({"f": 5})
    h = mx.array(hidden(3, 5))
    returned = statistics.update("f", h)
    assert mx.array_equal(returned, h)


def test_hidden_vectors_are_freed_when_the_layer_is_computed():
    """Sums that were not computed with the layer would hold all hidden vectors until then."""
    statistics = NeuronStatistics({"f": 1024}, ("activation", "griffin", MEAN))
    before = mx.get_active_memory()
    h = mx.random.normal((2048, 1024))
    returned = statistics.update("f", h)
    output = statistics.update_outputs("f", returned @ mx.ones((1024, 1024)))
    mx.eval(output[:1])
    del h, returned, output
    assert mx.get_active_memory() - before < 1e6  # hidden vectors and outputs have 8 MB each
    assert statistics.sums["f"][MEAN].shape == (1, 1024)


def test_each_sequence_of_a_batch_has_separate_scores():
    h = hidden(2, 4, 5)
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    batch = NeuronStatistics({"f": 5}, ("activation", "griffin"), sequences=2)
    batch.update("f", mx.array(h[:, :2]), mask[:, :2])
    batch.update("f", mx.array(h[:, 2:].reshape(4, 5)), mask[:, 2:])  # flat, as in some models
    for row, part in enumerate((h[0, 1:], h[1, :2])):
        alone = NeuronStatistics({"f": 5}, ("activation", "griffin"))
        alone.update("f", mx.array(part))
        for name in batch.names:
            np.testing.assert_allclose(
                batch.sequence_scores(name)["f"][row], alone.scores(name)["f"], rtol=1e-5
            )
    assert batch.tokens == 5


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="variance"):
        NeuronStatistics({}, ("variance",))
