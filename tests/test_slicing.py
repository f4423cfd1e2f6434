from dataclasses import replace
from itertools import islice

from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.selection import Selection
from glass_mlx.slicing import Evidence, Slicer, Slicing
from glass_mlx.statistics import MEAN
from invariants import random_selection
from test_prior import made_prior

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", intermediate_size=1280)


def seen(model, prompt, generated, seed=0):
    """Evidence of random hidden vectors."""
    evidence, rng = Evidence.of(model), np.random.default_rng(seed)
    for part, tokens in ((evidence.prompt, prompt), (evidence.text, generated)):
        for ffn in find_ffns(model):
            if tokens:
                part.update(ffn.path, mx.array(rng.normal(size=(1, tokens, ffn.width))))
    return evidence


def test_renewals_are_spaced_out():
    assert list(islice(Slicing().renewals(), 12)) == [
        *(16, 32, 64, 96, 128),
        *(192, 256, 320, 384),
        *(512, 640, 768),
    ]
    assert list(islice(Slicing(warmup=40).renewals(), 3)) == [40, 64, 96]
    assert list(Slicing(refresh=0).renewals()) == [16]
    assert list(Slicing(density=1.0).renewals()) == [16]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": 0}, "warm-up must be at least 1"),
        ({"refresh": 1}, "at least 2 tokens, or 0"),
        ({"refresh": -3}, "at least 2 tokens, or 0"),
        ({"mix": 1.5}, "between 0 and 1"),
        ({"statistic": MEAN}, "statistic 'mean'"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Slicing(**wrong).check()


def test_the_text_takes_over_from_the_prompt_when_there_is_enough(model):
    few, enough = seen(model, 20, 7), seen(model, 20, 8)
    assert few.local is few.prompt
    assert enough.local is enough.text
    slicing, ffns = Slicing(prior=made_prior(model), density=0.5), find_ffns(model)
    alone = seen(model, 0, 8)
    for path, scores in enough.text.scores("griffin").items():
        alone.text.sums[path] = enough.text.sums[path]
        assert np.array_equal(scores, alone.text.scores("griffin")[path])
    ours, theirs = slicing.select(ffns, enough), slicing.select(ffns, alone)
    assert all(np.array_equal(kept, theirs.indices[path]) for path, kept in ours.indices.items())


def test_stand_ins_are_means_drawn_towards_zero(model):
    assert seen(model, 20, 7).stand_ins() == {}
    evidence = Evidence.of(model)
    path = find_ffns(model)[0].path
    hidden = np.random.default_rng(0).normal(2, 1, (1, 16, 1280)).astype(np.float32)
    for part in (hidden[:, :10], hidden[:, 10:]):
        evidence.text.update(path, mx.array(part))
    assert evidence.text.tokens == 16
    assert np.allclose(evidence.stand_ins()[path], hidden[0].mean(0) / 2, atol=1e-5)


def test_one_token_takes_the_prior_and_no_prior_the_text(model):
    slicing = Slicing(prior=made_prior(model), mix=0.3)
    assert slicing.weight(seen(model, 1, 0)) == 1
    assert slicing.weight(seen(model, 2, 0)) == 0.3
    assert Slicing(mix=0.3).weight(seen(model, 2, 9)) == 0


def test_ffns_that_the_prior_says_so_of_are_kept_whole(model):
    ffns, prior = find_ffns(model), made_prior(model)
    first = ffns[0].path
    prior = replace(prior, about=prior.about | {"whole": [first]})
    slicing = Slicing(prior=prior, density=0.75)
    kept = slicing.select(ffns, seen(model, 9, 9))
    assert len(kept.indices[first]) == 1280
    assert kept.density == pytest.approx(0.75, abs=0.02)
    kept = replace(slicing, budgets=False).select(ffns, seen(model, 9, 9))
    assert len(kept.indices[first]) == 960


def test_slices_that_would_hardly_change_are_kept(model):
    slicer, first = Slicer(model, "requantize"), random_selection(model)
    one, kept = slicer(first)
    assert all(kept.indices[path] is first.indices[path] for path in first.indices)
    paths = [*first.indices]

    def moved(path, count):
        own = first.indices[path]
        others = np.setdiff1d(np.arange(first.widths[path]), own)
        return np.sort([*own[count:], *others[:count]]).astype(np.int32)

    second = dict(first.indices)
    second[paths[0]] = moved(paths[0], 20)  # of 640: 97 % stay
    second[paths[1]] = moved(paths[1], 40)  # 94 %
    two, kept = slicer(Selection(second, first.widths))
    assert np.array_equal(kept.indices[paths[0]], first.indices[paths[0]])
    assert np.array_equal(kept.indices[paths[1]], second[paths[1]])
    a, b = (dict(model.named_modules()) for model in (one, two))
    assert a[f"{paths[0]}.gate_proj"] is b[f"{paths[0]}.gate_proj"]
    assert a[f"{paths[1]}.gate_proj"] is not b[f"{paths[1]}.gate_proj"]
    rows = dict(model.named_modules())[f"{paths[1]}.gate_proj"].weight[mx.array(second[paths[1]])]
    assert mx.array_equal(b[f"{paths[1]}.gate_proj"].weight, rows)
