"""Statistics of hidden vectors."""

from glass_mlx.statistics import MEAN, MIN_GENERATED_TOKENS, LocalStatistics, NeuronStatistics

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


def test_vectors_whose_squares_vanish_add_nothing_to_the_ranking():
    statistics = NeuronStatistics({"f": 4}, ("activation", "griffin"))
    statistics.update("f", mx.full((3, 4), 1e-25))
    assert statistics.tokens == 3
    assert not any(statistics.scores(name)["f"].any() for name in statistics.names)


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


def test_one_token_has_its_own_values_as_means():
    h = hidden(1, 5)
    statistics = NeuronStatistics({"f": 5}, ("activation", MEAN))
    statistics.update("f", mx.array(h))
    np.testing.assert_allclose(statistics.scores(MEAN)["f"], h[0], rtol=1e-6)
    expected = np.abs(h[0]) / np.linalg.norm(h[0])
    np.testing.assert_allclose(statistics.scores("activation")["f"], expected, rtol=1e-6)


def test_statistics_are_restored_from_their_state():
    statistics = NeuronStatistics({"a": 5, "b": 3}, ("griffin", MEAN), sequences=2)
    for seed in range(2):
        statistics.update("a", mx.array(hidden(2, 4, 5, seed=seed)).astype(mx.float16))
        statistics.update_outputs("a", mx.array(hidden(2, 4, 7, seed=seed)))
    statistics.update("b", mx.array(hidden(2, 1, 3)).astype(mx.float16))
    state = statistics.state()
    restored = NeuronStatistics.restored(state, mx.float16)
    assert restored.names == statistics.names
    assert restored.shapes == statistics.shapes == {"a": (5,), "b": (3,)}
    assert restored.tokens == statistics.tokens == 16
    assert restored.dtype == statistics.dtype == mx.float16
    again = restored.state()
    assert again.keys() == state.keys()
    assert all(np.array_equal(values, state[key]) for key, values in again.items())
    assert restored.outputs.keys() == {"a"}
    means = [part.mean_outputs()["a"] for part in (statistics, restored)]
    assert mx.array_equal(*means)
    expected = np.concatenate([hidden(2, 4, 7, seed=seed) for seed in range(2)]).mean((0, 1))
    np.testing.assert_allclose(means[0], expected, rtol=1e-4, atol=1e-6)


def test_a_copy_does_not_change_with_later_updates():
    statistics = LocalStatistics.empty({"f": 5}, ["griffin"])
    assert statistics.text.names == ("griffin", MEAN)
    copy = statistics.copy()
    for part in (statistics.prompt, statistics.text):
        part.update("f", mx.array(hidden(3, 5)))
        part.update_outputs("f", mx.array(hidden(3, 2)))
    assert (copy.prompt.tokens, copy.text.tokens) == (0, 0)
    assert not copy.text.outputs
    assert not copy.prompt.scores("griffin")["f"].any()
    later = statistics.copy()
    statistics.text.update("f", mx.array(hidden(3, 5, seed=1)))
    statistics.text.update_outputs("f", mx.array(hidden(3, 2)))
    assert (later.prompt.tokens, later.text.tokens) == (3, 3)
    np.testing.assert_allclose(later.text.scores(MEAN)["f"], hidden(3, 5).mean(0), rtol=1e-5)
    np.testing.assert_allclose(later.text.mean_outputs()["f"], hidden(3, 2).mean(0), rtol=1e-5)


def test_generated_tokens_rank_neurons_once_there_are_enough():
    statistics = LocalStatistics.empty({"f": 5})
    statistics.prompt.update("f", mx.array(hidden(30, 5)))
    for tokens, enough in ((MIN_GENERATED_TOKENS - 1, False), (1, True), (1, True)):
        statistics.text.update("f", mx.array(hidden(tokens, 5)))
        assert statistics.has_enough_text == enough
        assert statistics.basis is (statistics.text if enough else statistics.prompt)
    assert len(statistics.arrays) == 4


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="variance"):
        NeuronStatistics({}, ("variance",))
