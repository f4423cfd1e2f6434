from dataclasses import replace

from glass_mlx.config import GlassConfig
from glass_mlx.models.architectures import tiny_model
from glass_mlx.session import Session
from helpers import local_statistics, made_prior

import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", intermediate_size=1280)


def test_the_text_takes_over_from_the_prompt_when_there_is_enough(model):
    few, enough = local_statistics(model, 20, 7), local_statistics(model, 20, 8)
    assert few.basis is few.prompt
    assert enough.basis is enough.text
    selector = Session(model).selector(GlassConfig(density=0.5), made_prior(model))
    alone = local_statistics(model, 0, 8)
    for path, scores in enough.text.scores("griffin").items():
        alone.text.sums[path] = enough.text.sums[path]
        assert np.array_equal(scores, alone.text.scores("griffin")[path])
    ours, theirs = selector.select(enough), selector.select(alone)
    assert all(np.array_equal(kept, theirs.indices[path]) for path, kept in ours.indices.items())


def test_one_token_takes_the_prior_and_no_prior_the_text(model):
    session, config = Session(model), GlassConfig(prior_weight=0.3)
    selector = session.selector(config, made_prior(model))
    assert selector.prior_weight(local_statistics(model, 1, 0)) == 1
    assert selector.prior_weight(local_statistics(model, 2, 0)) == 0.3
    assert session.selector(config, None).prior_weight(local_statistics(model, 2, 9)) == 0


def test_ffns_that_the_prior_says_so_of_are_kept_whole(model):
    session, prior = Session(model), made_prior(model)
    first = session.ffns[0].path
    prior = replace(prior, about=prior.about | {"whole": [first]})
    config = GlassConfig(density=0.75)
    kept = session.selector(config, prior).select(local_statistics(model, 9, 9))
    assert len(kept.indices[first]) == 1280
    assert kept.density == pytest.approx(0.75, abs=0.02)
    uniform = session.selector(replace(config, uniform=True), prior)
    kept = uniform.select(local_statistics(model, 9, 9))
    assert len(kept.indices[first]) == 960
