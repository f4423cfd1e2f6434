"""Drafts with a part of the head, checked with all of it, compared with mlx-lm's own generation."""

import copy
from functools import partial

import glass_mlx
from glass_mlx import GlassConfig, stream_generate
from glass_mlx import checked_decoding as checked_decoding_module
from glass_mlx import draft_shortlist as draft_shortlist_module
from glass_mlx.calibration import first_use
from glass_mlx.calibration.first_use import make_selector
from glass_mlx.draft_shortlist import DRAFT_COUNTS, DraftShortlister, HeadCost, cost_of_drafts
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.models.architectures import tiny_model
from glass_mlx.random_state import random_key
from glass_mlx.session import Session
from glass_mlx.vocabulary import VocabularyStatistics
from helpers import FAST, made_prior

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


@pytest.fixture(autouse=True)
def drafts_always(monkeypatch):
    """Draft although tiny models predict too badly for drafts to pay, so that many are wrong."""
    monkeypatch.setattr(draft_shortlist_module, "_MAX_COST", np.inf)


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.eos_token_ids = []
    return tokenizer


@pytest.fixture
def model():
    return tiny_model("llama", seed=49)


def both(model, tokenizer, n=60, prompt=PROMPT, prior=None, **options):
    """Return the responses of mlx-lm and ours, with the same random numbers."""
    cache = options.pop("prompt_cache", None)
    runs = []
    for generate, more in (
        (mlx_lm.stream_generate, {}),
        (stream_generate, {"prior": made_prior(model) if prior is None else prior}),
    ):
        if cache is not None:
            more["prompt_cache"] = copy.deepcopy(cache)
        mx.random.seed(3)
        runs.append(list(generate(model, tokenizer, prompt, max_tokens=n, **options, **more)))
        runs.append(random_key().tolist())
    theirs, their_key, ours, our_key = runs
    assert our_key == their_key  # later random numbers are the same, too
    return theirs, ours


def check_same(theirs, ours):
    assert [r.token for r in ours] == [r.token for r in theirs]
    assert "".join(r.text for r in ours) == "".join(r.text for r in theirs)
    assert not any(r.from_draft for r in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert mx.allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("architecture", FAST)
def test_the_text_is_the_dense_models_own(tokenizer, architecture, temp):
    windows = {"sliding_window": 24} if architecture.startswith("gemma") else {}
    model = tiny_model(architecture, seed=49, **windows)
    theirs, ours = both(model, tokenizer, sampler=make_sampler(temp, top_p=0.95))
    check_same(theirs, ours)
    assert ours[-1].finish_reason == "length"
    assert any(not r.glass.dense for r in ours)
    assert ours[-1].glass.density_got == 1
    assert 0 < ours[-1].glass.vocabulary_got < 1
    assert ours[-1].glass.max_kl == 0


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_half_precision_is_rounded_as_in_mlx_lm(tokenizer, temp):
    model = tiny_model("llama", seed=49)
    model.set_dtype(mx.bfloat16)
    theirs, ours = both(model, tokenizer, sampler=make_sampler(temp))
    assert [r.token for r in ours] == [r.token for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert mx.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 7, 23])
def test_every_length(model, tokenizer, n):
    check_same(*both(model, tokenizer, n))


def test_the_next_block_begins_while_the_caller_has_the_tokens_of_this_one(
    model, tokenizer, monkeypatch
):
    monkeypatch.setattr(checked_decoding_module, "MAX_MISSING", np.inf)
    cache = make_prompt_cache(model)
    config = GlassConfig(warmup=4, refresh=64)
    steps = stream_generate(
        model, tokenizer, PROMPT, max_tokens=60, prompt_cache=cache, config=config
    )
    ahead = []
    for n, _ in enumerate(steps, 1):
        ahead.append(cache[0].offset - len(PROMPT) - n)
    # As in mlx-lm's loop, the model has always read the latest token, and others of its block.
    assert min(ahead[5:-1]) == 0
    assert max(ahead[5:-1]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processors": make_logits_processors({5: 4.0}, 1.5, 20)},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20},
        {"prompt_cache": [RotatingKVCache(24, keep=4) for _ in range(4)]},
        {"prior": False},
        {"prefill_step_size": 3},
    ],
    ids=["processors", "quantized", "rotating", "without a prior", "prefill"],
)
def test_options_of_mlx_lm(tokenizer, options):
    model = tiny_model("llama", seed=49, head_dim=32)
    prior = options.get("prior")
    options = {name: value for name, value in options.items() if name != "prior"}
    theirs, ours = both(model, tokenizer, prior=prior, sampler=make_sampler(0.8), **options)
    check_same(theirs, ours)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", FAST[-1]])
@pytest.mark.parametrize("stop", [3, 6, 7, 11, 30])
def test_a_generation_that_is_stopped_leaves_the_cache_of_the_text(tokenizer, architecture, stop):
    model = tiny_model(architecture, seed=49)
    caches = [make_prompt_cache(model) for _ in range(2)]
    ends = []
    for generate, cache, more in (
        (mlx_lm.stream_generate, caches[0], {}),
        (stream_generate, caches[1], {"prior": made_prior(model)}),
    ):
        mx.random.seed(3)
        sampler = make_sampler(0.8)
        run = generate(
            model, tokenizer, PROMPT, max_tokens=60, prompt_cache=cache, sampler=sampler, **more
        )
        tokens = [response.token for response, _ in zip(run, range(stop), strict=False)]
        run.close()
        ends.append((tokens, random_key().tolist()))
    assert ends[0] == ends[1]
    offsets = [[getattr(entry, "offset", None) for entry in cache] for cache in caches]
    assert offsets[0] == offsets[1]
    logits = [model(mx.array([[5]]), cache=cache) for cache in caches]
    assert mx.allclose(*logits, atol=1e-4)


def with_and_without_drafts(model, tokenizer, n=60, caches=(None, None), **options):
    """Return the responses of a sliced model with the whole head, and those with drafts."""
    options = {"density": 0.5, "warmup": 6, "refresh": 8, "prior": made_prior(model)} | options
    runs = []
    for vocabulary, cache in zip((1.0, None), caches, strict=True):
        mx.random.seed(3)
        more = {} if cache is None else {"prompt_cache": cache}
        run = stream_generate(model, tokenizer, PROMPT, n, vocabulary=vocabulary, **options, **more)
        runs.append((list(run), random_key().tolist()))
    (whole, key), (drafted, other_key) = runs
    assert key == other_key
    return whole, drafted


SLICED = [
    {},
    {"sampler": make_sampler(0.8)},
    {"dense_every": 0},
    {"warmup": 1},
    {"refresh": 0},
    {"logits_processors": make_logits_processors({5: 4.0}, 1.5, 20)},
]


@pytest.mark.parametrize("options", SLICED)
@pytest.mark.parametrize("architecture", FAST)
def test_sliced_models_write_the_same_with_drafts(tokenizer, architecture, options):
    windows = {"sliding_window": 24} if architecture.startswith("gemma") else {}
    model = tiny_model(architecture, seed=49, **windows)
    whole, drafted = with_and_without_drafts(model, tokenizer, **options)
    check_same(whole, drafted)
    assert [r.glass.dense for r in drafted] == [r.glass.dense for r in whole]
    assert drafted[-1].glass.drafts >= drafted[-1].glass.checked_tokens > 20
    # The dense model's tokens are observed, and drafts that were wrong are not.
    expected = whole[-1].glass.selection.indices
    for path, kept in drafted[-1].glass.selection.indices.items():
        assert np.array_equal(kept, expected[path])


@pytest.mark.parametrize("n", [88, 89, 90])
def test_statistics_and_caches_have_each_token_once(model, tokenizer, n):
    caches = [glass_mlx.make_prompt_cache(model) for _ in range(2)]
    with_and_without_drafts(model, tokenizer, n, caches, sampler=make_sampler(1.0))
    # The last token is read by the model whose turn it is, and not by the dense one.
    for theirs, ours in zip(*caches, strict=True):
        assert mx.allclose(theirs.state[0], ours.state[0], rtol=1e-3, atol=1e-4)
    whole, drafted = (cache.statistics.text for cache in caches)
    assert drafted.tokens == whole.tokens
    for path, scores in whole.scores("griffin").items():
        assert np.allclose(drafted.scores("griffin")[path], scores, rtol=1e-4)
    assert caches[0].tokens == caches[1].tokens


def test_conversations_continue(model, tokenizer):
    cache = glass_mlx.make_prompt_cache(model)
    prior, text = made_prior(model), []
    for prompt in (PROMPT, [4, 5, 6]):
        text += prompt
        responses = stream_generate(
            model, tokenizer, prompt, max_tokens=25, prompt_cache=cache, prior=prior
        )
        text += [response.token for response in responses]
        assert cache.tokens == text
    expected = mlx_lm.stream_generate(model, tokenizer, text[:-25], max_tokens=25)
    assert [response.token for response in expected] == text[-25:]


def test_no_prior_is_measured(model, tokenizer, monkeypatch):
    monkeypatch.setattr(first_use, "find_or_measure_prior", None)
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=9))
    assert responses[-1].glass.prior == "none"


def test_dense_weights_cannot_be_released(model, tokenizer):
    with pytest.raises(ValueError, match="no dense weights can be released"):
        stream_generate(model, tokenizer, PROMPT, reload=lambda: model)


def test_bytes_are_those_of_passes_and_checks(model, tokenizer):
    session, prior = Session(model), made_prior(model)
    responses = list(stream_generate(session, tokenizer, PROMPT, max_tokens=120, prior=prior))
    report = responses[-1].glass
    assert report.dense_tokens == 4
    # Scoring replays the blocks of this text.
    text = Continuation(PROMPT, [response.token for response in responses])
    selector = make_selector(session, tokenizer, prior, GlassConfig())
    reading = DenseReading(session, text, [4])
    scores = score(reading, selector)
    assert not scores.kl.any()
    assert not scores.dense[4:].any()
    read = (1 + scores.bytes.sum()) * session.weight_bytes
    assert report.read_bytes == pytest.approx(read, rel=0.02)
    assert report.read_bytes > 120 * report.sliced_bytes


def test_drafts_that_do_not_pay_are_not_made(model, tokenizer, monkeypatch):
    monkeypatch.setattr(draft_shortlist_module, "_MAX_COST", 0.0)
    theirs, ours = both(model, tokenizer)
    check_same(theirs, ours)
    assert all(response.glass.dense for response in ours)
    assert ours[-1].glass.read_bytes == 60 * ours[-1].glass.dense_bytes


def head_cost(share, row):
    return HeadCost(share, {count: 1 + row * (count - 1) for count in DRAFT_COUNTS})


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("wrong", [0.001, 0.1, 0.5])
def test_the_cost_of_drafts_is_what_blocks_read(count, wrong):
    share, head, row = 0.25, 0.4, 0.1
    generator = np.random.default_rng(0)
    firsts = np.argmax(np.c_[generator.random((100_000, count)) < wrong, np.ones(100_000)], axis=1)
    taken = np.minimum(firsts + 1, count)
    check = head * (1 + row * (count - 1))
    read = count * (1 - head + share * head) + check
    cost = cost_of_drafts(share, count, wrong, head_cost(head, row))
    assert cost == pytest.approx(read / taken.mean(), rel=0.02)


def peaked_logits(size=4096, likely=40, tokens=64, seed=0):
    """Return the logits of predictions that nearly always are among a few likely tokens."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(tokens, size))
    logits[:, -likely:] += 14 + 2 * generator.normal(size=(tokens, likely))
    return mx.array(logits.astype(np.float32))


def test_the_shortlist_has_what_predictions_need(monkeypatch):
    monkeypatch.setattr(draft_shortlist_module, "_MAX_COST", 0.98)
    head = head_cost(0.5, 0.1)
    make = partial(
        DraftShortlister, VocabularyStatistics(), None, lambda text: {7, 4000}, 4096, head
    )
    assert {*range(62)} <= {*make().choose([]).rows.tolist()}  # nothing is known but the ids
    shortlister = make()
    shortlister.observe(peaked_logits(tokens=256))
    shortlist = shortlister.choose([7, 4000])
    assert shortlist.share == 1 / 64
    assert {*range(4056, 4096), 7, 4000} <= {*shortlist.rows.tolist()}
    shortlister.observe(peaked_logits(seed=1))
    others = mx.array(np.setdiff1d(np.arange(4096), shortlist.rows))
    outside = mx.softmax(peaked_logits(seed=1), axis=-1)[:, others].sum()
    assert float(shortlister._missed[0]) == pytest.approx(float(outside), rel=1e-3)
    assert shortlister.choose([]).share == 1 / 64
    assert shortlister.count == 8

    shortlister.observe(mx.zeros((1000, 4096)))  # now every token is as likely as any other
    shortlister.wrong += 984
    assert shortlister.choose([]) is None
    assert shortlister.count == 0


def test_drafts_that_are_wrong_more_often_than_tokens_are_missing_get_longer_shortlists():
    head = head_cost(0.5, 0.1)
    shares = []
    for wrong in (0, 12):
        shortlister = DraftShortlister(VocabularyStatistics(), None, frozenset, 4096, head)
        shortlister.observe(peaked_logits(tokens=256))
        shortlister.choose([])
        shortlister.observe(peaked_logits(likely=41, seed=1))
        shortlister.wrong += wrong
        shares.append((shortlister.choose([]).share, shortlister.count))
    assert shares[0] < shares[1] or shares[0][1] > shares[1][1]
