"""Selection from local statistics and a prior."""

from dataclasses import replace

from glass_mlx.budget import Budget
from glass_mlx.config import GlassConfig
from glass_mlx.models.architectures import tiny_model
from glass_mlx.ranking import ranks
from glass_mlx.selection import Selector
from glass_mlx.session import Session
from glass_mlx.vocabulary import VocabularyStatistics
from helpers import local_statistics, made_prior

import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", intermediate_size=1280)


def test_enough_generated_tokens_replace_the_prompt(model):
    short_text, long_text = local_statistics(model, 20, 7), local_statistics(model, 20, 8)
    assert short_text.basis is short_text.prompt
    assert long_text.basis is long_text.text
    selector = Session(model).selector(GlassConfig(density=0.5), made_prior(model))
    text_only = local_statistics(model, 0, 8)
    for path, scores in long_text.text.scores("griffin").items():
        text_only.text.sums[path] = long_text.text.sums[path]
        assert np.array_equal(scores, text_only.text.scores("griffin")[path])
    selection, expected = selector.select(long_text), selector.select(text_only)
    assert all(
        np.array_equal(kept, expected.indices[path]) for path, kept in selection.indices.items()
    )


def test_the_prior_weight_is_1_for_one_token_and_0_without_a_prior(model):
    session, config = Session(model), GlassConfig(density=0.5, prior_weight=0.3)
    selector = session.selector(config, made_prior(model))
    assert selector.prior_weight(local_statistics(model, 0, 0)) == 1
    assert selector.prior_weight(local_statistics(model, 1, 0)) == 1
    assert selector.prior_weight(local_statistics(model, 2, 0)) == 0.3
    assert session.selector(config, None).prior_weight(local_statistics(model, 2, 9)) == 0


def test_fused_scores_are_local_ranks_without_a_prior(model):
    session, statistics = Session(model), local_statistics(model, 20, 0)
    local = {path: ranks(v) for path, v in statistics.prompt.scores("griffin").items()}
    prior = made_prior(model)
    alone = session.selector(GlassConfig(density=0.5), None).fuse(statistics)
    fused = session.selector(GlassConfig(density=0.5, prior_weight=0.25), prior).fuse(statistics)
    for path, expected in local.items():
        assert np.array_equal(alone[path], expected)
        both = 0.75 * expected + 0.25 * ranks(prior.scores["griffin"][path])
        assert np.allclose(fused[path], both)


def test_ffns_that_the_prior_lists_are_kept_dense(model):
    session, prior = Session(model), made_prior(model)
    first = session.ffns[0].path
    prior = replace(prior, about=prior.about | {"whole": [first]})
    config = GlassConfig(density=0.75)
    selection = session.selector(config, prior).select(local_statistics(model, 9, 9))
    assert len(selection.indices[first]) == 1280
    assert selection.density == pytest.approx(0.75, abs=0.02)
    uniform = session.selector(replace(config, uniform=True), prior)
    selection = uniform.select(local_statistics(model, 9, 9))
    assert len(selection.indices[first]) == 960


def test_a_bound_that_no_slice_stays_within_is_taken_for_0(model):
    session, config = Session(model), GlassConfig(max_kl=0.01)
    kept = session.selector(config, made_prior(model), Budget(0.01, 1.0))
    exact = session.selector(GlassConfig(), made_prior(model))
    assert kept.is_exact
    assert kept.config == exact.config
    sliced = session.selector(config, made_prior(model), Budget(0.01, 0.9))
    assert not sliced.is_exact
    assert (sliced.config.density, sliced.config.vocabulary) == (0.9, None)
    assert sliced.budget == Budget(0.01, 0.9)


def test_a_head_that_cannot_be_sliced_computes_every_token(model):
    config = GlassConfig(vocabulary=0.25)
    assert Session(model).selector(config, None).config.vocabulary == 0.25
    selector = Selector(config, {}, 0, None)
    assert selector.config.vocabulary == 1
    assert selector.shortlister(VocabularyStatistics()) is None
