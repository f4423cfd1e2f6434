"""Which tokens a shortlist has, and what it leaves out."""

from glass_mlx.vocabulary import (
    Shortlist,
    Shortlister,
    VocabularyStatistics,
    choose_rows,
    flattened,
    rows_to_keep,
)

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 1024


def random_logits(tokens, seed=0, scale=3.0):
    return mx.array(np.random.default_rng(seed).normal(size=(tokens, SIZE)) * scale, mx.float32)


def test_flattened_predictions_are_softmax_at_temperature_2():
    logits = random_logits(3)
    roots = np.sqrt(np.array(mx.softmax(logits, axis=-1)))
    assert np.allclose(flattened(logits), roots / roots.sum(-1, keepdims=True), rtol=1e-4)


def test_statistics_in_parts_equal_those_at_once():
    logits = random_logits(7)
    whole, parts = VocabularyStatistics(), VocabularyStatistics()
    assert mx.array_equal(whole.update(logits[None]), logits[None])
    for part in (logits[:2], logits[2:3], logits[3:]):
        parts.update(part[None])
    assert np.allclose(whole.sums, parts.sums, rtol=1e-5)
    copy = parts.copy()
    copy.update(logits)
    assert np.allclose(whole.sums, parts.sums, rtol=1e-5)
    restored = VocabularyStatistics.restored(whole.state())
    assert mx.array_equal(restored.sums, whole.sums)
    assert VocabularyStatistics.restored({}).sums is None


@pytest.mark.parametrize(
    "state",
    [
        {"sums": np.zeros(3)},
        {"sums": np.zeros((2, 2), np.float32)},
        {"sums": np.array([-1.0], np.float32)},
        {"tokens": np.array([1])},
    ],
)
def test_damaged_states_are_refused(state):
    with pytest.raises((KeyError, ValueError)):
        VocabularyStatistics.restored(state)


@given(
    st.integers(1, 5000),
    st.floats(0.001, 1),
    st.sets(st.integers(0, 10**6), max_size=400),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_are_the_best_and_always_the_given_ones(size, share, always, seed):
    scores = np.random.default_rng(seed).random(size)
    always = {token % size for token in always}
    rows = choose_rows(scores, share, always)
    assert rows.dtype == np.int32
    assert np.all(np.diff(rows) > 0)
    assert rows[0] >= 0
    assert rows[-1] < size
    assert always <= {*rows.tolist()}
    assert len(rows) == size or len(rows) % 64 == 0
    assert len(rows) >= min(size, rows_to_keep(size, share))
    others = np.setdiff1d(np.arange(size), rows)
    free = [row for row in rows.tolist() if row not in always]
    if len(others) and free:
        assert scores[free].min() >= scores[others].max()


def shortlist_of(rows, outside=0.1):
    shares = np.ones(SIZE, np.float32)
    shares[rows] = 0
    return Shortlist(rows, outside, shares / shares.sum())


def test_tokens_outside_share_the_probability_that_is_backed_off():
    logits = random_logits(5)
    shortlist = shortlist_of(np.arange(0, SIZE, 2, dtype=np.int32))
    p = np.array(mx.softmax(logits, axis=-1))
    inside = p[:, shortlist.rows]
    assert np.allclose(shortlist.missed(logits), 1 - inside.sum(-1), atol=1e-5)
    q = np.zeros_like(p)
    q[:, shortlist.rows] = inside / inside.sum(-1, keepdims=True) * 0.9
    q[:, 1::2] = 0.1 / (SIZE / 2)
    assert np.allclose(mx.softmax(shortlist.back_off(logits), axis=-1), q, rtol=1e-3)
    odds = np.exp(np.array(shortlist.log_odds))
    assert odds[1::2].sum() == pytest.approx(0.1 / 0.9, rel=1e-4)
    assert np.all(odds[::2] < 1e-20)


def shortlister(share=0.25, prior_seed=5, **options):
    prior = np.random.default_rng(prior_seed).random(SIZE).astype(np.float32) / SIZE
    return Shortlister(VocabularyStatistics(), share, prior, **options)


def test_a_shortlist_has_what_the_text_and_the_prior_make_plausible():
    chooser = shortlister(always=lambda text: {1000, *text})
    rows = chooser.choose([3, 5, 1001, 10**6]).rows
    assert {3, 5, 1000, 1001} <= {*rows.tolist()}
    assert len(rows) == SIZE // 4
    peaked = np.zeros((1, 40, SIZE), np.float32)
    expected = np.random.default_rng(1).choice(SIZE, 100, replace=False)
    peaked[..., expected] = 30
    chooser.observe(mx.array(peaked))
    assert {*expected.tolist()} <= {*chooser.choose([]).rows.tolist()}


def test_tokens_stay_in_the_shortlist_as_the_text_grows():
    read = []
    chooser = shortlister(always=lambda text: read.append(text) or text)
    chooser.keep([7])
    text = [*range(100, 120)]
    chooser.choose(text)
    rows = chooser.choose([*text, 200]).rows
    assert {7, *text, 200} <= {*rows.tolist()}
    assert read == [[7], text, [*range(112, 120), 200]]


def test_the_probability_outside_is_measured_on_what_is_read_later():
    chooser = shortlister()
    first = chooser.choose([])
    prior = np.random.default_rng(5).random(SIZE)
    scores_outside = np.delete(prior, first.rows).sum() / prior.sum()
    assert first.outside == pytest.approx(0.2 * scores_outside**2, rel=1e-4)
    logits = random_logits(60, seed=2)
    chooser.observe(logits)
    probabilities = np.array(mx.softmax(logits, axis=-1))
    true = 1 - probabilities[:, first.rows].sum(-1)
    second = chooser.choose([])
    scores = np.array(mx.softmax(logits / 2, axis=-1)).sum(0) + 16 * prior / SIZE
    scores_outside = np.delete(scores, second.rows).sum() / scores.sum()
    expected = (true.sum() + 8 * 0.2 * scores_outside**2) / 68
    assert second.outside == pytest.approx(expected, rel=1e-4)


def test_likelier_tokens_get_larger_shares_and_none_gets_nothing():
    prior = np.linspace(0, 1, SIZE).astype(np.float32)
    for scores in (prior, np.zeros_like(prior)):
        shortlist = Shortlister(VocabularyStatistics(), 0.25, scores).choose([])
        others = np.delete(shortlist.shares, shortlist.rows)
        assert np.all(others > 0) and np.all(np.diff(others) >= 0)
        assert others.sum() == pytest.approx(1, rel=1e-4)
        assert np.all(shortlist.shares[shortlist.rows] == 0)


def test_without_anything_known_all_tokens_are_kept():
    assert Shortlister(VocabularyStatistics(), 0.5, None).choose([1]) is None
    assert shortlister(share=1.0).choose([1]) is None
