"""Summaries of fidelity over prompts."""

from glass_mlx.fidelity.report import Outcome, summarize

import numpy as np
import pytest


def outcome(kl, nll):
    return Outcome(kl, nll, 0.5, [], 1, 0.5, 0.25, 0.6, 0.8, [0.5])


def test_intervals_are_over_prompts_and_differences_are_paired():
    rng = np.random.default_rng(0)
    base = [outcome([float(k)] * 10, [float(k)] * 10) for k in rng.uniform(1, 5, 40)]
    better = [outcome([k * 0.9 for k in o.kl], o.nll) for o in base]
    row = summarize(better, base, seed=0)
    # Every prompt improves by a tenth, so the change is certain although the mean is not.
    assert row["kl_change"] == pytest.approx(-0.1)
    assert np.allclose(row["kl_change_95"], -0.1)
    low, high = row["kl_95"]
    spread = 1.96 * np.std([o.kl[0] for o in better]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * spread, rel=0.15)


def test_texts_that_are_never_sliced_do_not_count_towards_agreement():
    dense = Outcome([0.0], [1.0], 1, [], 2, None, None, None, 1.0, [])
    row = summarize([outcome([1.0], [1.0]), dense], [outcome([0.0], [1.0])] * 2, seed=0)
    assert (row["density_got"], row["jaccard"], row["jaccard_by_layer"]) == (0.5, 0.5, [0.5])
    assert (row["vocabulary_got"], row["bytes_share"]) == (0.25, 0.6)
    assert row["run_share"] == pytest.approx(0.9)
    assert "kl_change" not in row  # no change from a KL of zero


def test_all_tokens_have_equal_weight():
    row = summarize([outcome([1.0], [2.0]), outcome([4.0] * 3, [6.0] * 3)], None, seed=0)
    assert row["kl"] == pytest.approx(13 / 4)
    assert row["perplexity"] == pytest.approx(np.exp(5.0))
    assert row["tokens"] == 6
    assert row["dense_share"] == pytest.approx(2 / 6)
