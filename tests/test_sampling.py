"""The sampler, compared with mlx-lm's."""

from glass_mlx.sampling import make_sampler

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

FILTERS = [
    {},
    {"top_p": 0.8},
    {"min_p": 0.1, "min_tokens_to_keep": 2},
    {"top_k": 5},
    {"xtc_probability": 0.5, "xtc_threshold": 0.1, "xtc_special_tokens": [3]},
    {"top_p": 0.95, "min_p": 0.02, "top_k": 12},
]
DRAWS = 20_000


def random_logprobs(size=24, seed=0):
    logits = mx.array(2 * np.random.default_rng(seed).normal(size=(1, size)).astype(np.float32))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def frequencies(sampler, logprobs):
    """Return how often each token is drawn."""
    mx.random.seed(1)
    rows = mx.repeat(logprobs, DRAWS, axis=0)
    return np.bincount(np.array(sampler(rows)), minlength=logprobs.shape[-1]) / DRAWS


@pytest.mark.parametrize("options", [o for o in FILTERS if "xtc_probability" not in o])
@pytest.mark.parametrize("temp", [0.6, 1.0, 1.5])
def test_it_draws_from_the_distribution_of_mlx_lm_s(temp, options):
    logprobs = random_logprobs()
    ours, theirs = (
        frequencies(make(temp, **options), logprobs)
        for make in (make_sampler, sample_utils.make_sampler)
    )
    assert np.array_equal(ours > 0, theirs > 0) or not options
    assert np.abs(ours - theirs).max() < 0.015


def test_tokens_are_excluded_as_in_mlx_lm():
    logprobs, options = random_logprobs(), FILTERS[4]
    drawn = []
    for make in (make_sampler, sample_utils.make_sampler):
        sampler = make(1.0, **options)
        mx.random.seed(1)
        tokens = [sampler(logprobs).item() for _ in range(3000)]
        drawn.append(np.bincount(tokens, minlength=logprobs.shape[-1]) / len(tokens))
    assert np.abs(drawn[0] - drawn[1]).max() < 0.04


def test_without_a_temperature_the_most_likely_token_is_drawn():
    logprobs = random_logprobs()
    assert make_sampler(0.0, top_p=0.9)(logprobs).item() == mx.argmax(logprobs).item()


@pytest.mark.parametrize("options", FILTERS)
def test_a_token_is_the_same_if_others_are_missing(options):
    sampler, same = make_sampler(1.0, **options), 0
    generator = np.random.default_rng(2)
    for seed in range(200):
        logprobs = random_logprobs(400, seed)
        is_kept = np.ones(400, bool)
        is_kept[generator.choice(400, 40, replace=False)] = False
        kept = mx.where(mx.array(is_kept), logprobs, -mx.inf)
        mx.random.seed(seed)
        token = sampler(logprobs).item()
        mx.random.seed(seed)
        draft = sampler(kept - mx.logsumexp(kept, axis=-1, keepdims=True)).item()
        same += draft == token if is_kept[token] else 1
    assert same == 200 if not options else same > 180  # filters keep other tokens, then


def test_half_precision_is_not_too_coarse():
    logprobs = random_logprobs().astype(mx.bfloat16)
    ours = frequencies(make_sampler(1.0), logprobs)
    assert np.abs(ours - np.exp(np.array(logprobs.astype(mx.float32))[0])).max() < 0.015
