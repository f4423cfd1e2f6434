"""Speculative decoding, compared with the same generation without drafts and with mlx-lm."""

import copy
import itertools

import glass_mlx
from glass_mlx import stream_generate
from glass_mlx.config import GlassConfig
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prompt_cache import PromptCache
from glass_mlx.renewal import is_dense_pass, is_dense_token
from glass_mlx.session import Session
from helpers import FAST, SometimesRight, made_prior

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]

# Renewals after 3, 8, 16, 24, 32 and 48 tokens; without `dense_every` none of them is dense.
RENEWED = {"density": 0.5, "warmup": 3, "refresh": 8, "prior_weight": 0.5}


@pytest.fixture
def model():
    return tiny_model("llama", seed=49)


def never_right(model):
    return SometimesRight(model, lambda place: False)


def sometimes_right(model):
    return SometimesRight(model)


DRAFTERS = [lambda model: model, sometimes_right, never_right]


def run(model, tokenizer, prompt=PROMPT, n=60, **options):
    options = {"prior": made_prior(model)} | options
    return list(stream_generate(model, tokenizer, prompt, max_tokens=n, **options))


def tokens_of(responses):
    return [response.token for response in responses]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("make_draft", DRAFTERS)
def test_all_neurons_give_the_tokens_of_mlx_lm_with_and_without_a_draft(
    model, tokenizer, make_draft, count
):
    draft = make_draft(model)
    dense = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=40))
    theirs = list(
        mlx_lm.stream_generate(
            model,
            tokenizer,
            PROMPT,
            max_tokens=40,
            draft_model=draft,
            num_draft_tokens=count,
        )
    )
    ours = run(model, tokenizer, n=40, density=1.0, draft_model=draft, num_draft_tokens=count)
    assert tokens_of(ours) == tokens_of(dense) == tokens_of(theirs)
    assert "".join(r.text for r in ours) == "".join(r.text for r in theirs)
    assert ours[-1].finish_reason == "length"
    for a, b in zip(ours, dense, strict=True):
        assert mx.allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("make_draft", DRAFTERS)
def test_slices_give_the_same_tokens_as_without_drafts(model, tokenizer, make_draft, count):
    """Without dense tokens, drafts change neither what is read nor when slices are renewed."""
    options = RENEWED | {"dense_every": 0}
    plain = run(model, tokenizer, **options)
    responses = run(
        model, tokenizer, draft_model=make_draft(model), num_draft_tokens=count, **options
    )
    assert tokens_of(responses) == tokens_of(plain)
    for a, b in zip(responses, plain, strict=True):
        assert a.glass.dense == b.glass.dense
        assert a.glass.selections == b.glass.selections
        if b.glass.selection is not None:
            for path, kept in b.glass.selection.indices.items():
                assert np.array_equal(a.glass.selection.indices[path], kept)


@pytest.mark.parametrize("architecture", [*FAST[:-1], "dbrx"])  # the last cannot be trimmed
def test_drafts_that_are_never_right_change_nothing(tokenizer, architecture):
    """Each pass then computes one token, so the same tokens are dense, and count the same."""
    windows = {"sliding_window": 64} if architecture.startswith("gemma") else {}
    model = tiny_model(architecture, seed=49, **windows)
    options = RENEWED | {"dense_every": 4, "vocabulary": 0.5, "n": 24}
    plain = run(model, tokenizer, **options)
    responses = run(model, tokenizer, draft_model=never_right(model), **options)
    assert not any(r.from_draft for r in responses)
    assert tokens_of(responses) == tokens_of(plain)
    assert [r.glass.dense for r in responses] == [r.glass.dense for r in plain]
    a, b = responses[-1].glass, plain[-1].glass
    assert (a.dense_tokens, a.selections) == (b.dense_tokens, b.selections)
    assert a.outside == pytest.approx(b.outside, rel=1e-4)
    assert np.array_equal(a.shortlist.rows, b.shortlist.rows)


@pytest.mark.parametrize("vocabulary", [1.0, 0.5])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("make_draft", DRAFTERS[:2])
def test_a_pass_is_dense_or_sliced_and_only_the_tokens_of_the_text_count(
    model, tokenizer, make_draft, count, vocabulary, monkeypatch
):
    """Compare with a generation without drafts in which the same tokens are dense."""
    options = RENEWED | {"dense_every": 4, "vocabulary": vocabulary}
    caches = [glass_mlx.make_prompt_cache(model) for _ in range(2)]
    draft = make_draft(model)
    caches[0] += make_prompt_cache(draft)
    responses = run(
        model,
        tokenizer,
        draft_model=draft,
        num_draft_tokens=count,
        prompt_cache=caches[0],
        **options,
    )
    dense = {n for n, r in enumerate(responses, 1) if r.glass.dense}
    config = GlassConfig(**options)
    if is_dense_pass(config, 60, len(dense) - config.warmup):
        dense.add(61)  # the last token is read, too, and gives a token that nobody wants
    monkeypatch.setattr("glass_mlx.engine.is_dense_token", lambda config, number: number in dense)
    plain = run(model, tokenizer, prompt_cache=caches[1], **options)
    assert tokens_of(responses) == tokens_of(plain)
    assert any(r.from_draft and r.glass.dense for r in responses[3:])
    assert any(r.from_draft and not r.glass.dense for r in responses)
    a, b = (cache.statistics for cache in caches)
    assert a.text.tokens == b.text.tokens == len(dense) - 1
    if vocabulary < 1:  # the probabilities of each token add 1
        assert a.vocabulary.sums.sum().item() == pytest.approx(len(dense) - 1, rel=1e-4)
        assert mx.allclose(a.vocabulary.sums, b.vocabulary.sums, rtol=1e-3)
    else:
        assert a.vocabulary.sums is b.vocabulary.sums is None
    for path, scores in b.text.scores("griffin").items():
        np.testing.assert_allclose(a.text.scores("griffin")[path], scores, rtol=1e-3, atol=1e-6)
    for path, outputs in b.text.mean_outputs().items():
        assert mx.allclose(a.text.mean_outputs()[path], outputs, rtol=1e-3, atol=1e-6)


def test_the_dense_model_keeps_its_share_of_tokens():
    config = GlassConfig(density=0.5, warmup=5, dense_every=4)
    for sizes in ([1], [3], [4], [1, 2, 6], [9, 1]):
        generated, dense = 5, 0
        for size in itertools.cycle(sizes):
            if is_dense_pass(config, generated, dense):
                dense += size
            generated += size
            if generated > 4000:
                break
        assert dense / (generated - 5) == pytest.approx(0.25, abs=0.01)
    dense = 0
    for number in range(6, 60):
        is_dense = is_dense_pass(config, number - 1, dense)
        assert is_dense == is_dense_token(config, number)
        dense += is_dense
    assert not is_dense_pass(GlassConfig(density=0.5, dense_every=0), 100, 0)
    assert not is_dense_pass(GlassConfig(density=1.0, vocabulary=1.0), 100, 0)


def test_a_perfect_draft_gives_all_tokens_but_one_of_each_pass(model, tokenizer):
    options = {"density": 1.0, "vocabulary": 1.0, "draft_model": model, "num_draft_tokens": 4}
    responses = run(model, tokenizer, n=31, **options)
    # The prompt gives the first token, and the warm-up ends after 16.
    passes = [responses[1:6], responses[6:11], responses[11:16], responses[16:21]]
    for tokens in passes:
        assert [r.from_draft for r in tokens] == [True] * 4 + [False]
    assert not responses[0].from_draft


def test_warm_up_and_renewals_come_at_the_same_tokens(model, tokenizer):
    options = RENEWED | {"dense_every": 4, "num_draft_tokens": 5}
    responses = run(model, tokenizer, draft_model=model, **options)
    changes = [
        n
        for n, (a, b) in enumerate(itertools.pairwise(responses), 1)
        if a.glass.selections != b.glass.selections
    ]
    assert changes == [3, 8, 16, 24, 32, 48]


@pytest.mark.parametrize("make_draft", DRAFTERS)
@pytest.mark.parametrize("n", [1, 2, 4, 30])
@pytest.mark.parametrize("is_closed", [False, True])
def test_both_caches_hold_the_text_whenever_a_generation_ends(
    model, tokenizer, make_draft, n, is_closed
):
    draft = make_draft(model)
    cache = glass_mlx.make_prompt_cache(model)
    cache += make_prompt_cache(draft)
    stream = stream_generate(
        model,
        tokenizer,
        PROMPT,
        max_tokens=100 if is_closed else n,
        prior=made_prior(model),
        prompt_cache=cache,
        draft_model=draft,
        num_draft_tokens=3,
        **RENEWED,
    )
    text = PROMPT + [response.token for response in itertools.islice(stream, n)]
    stream.close()
    assert isinstance(cache, PromptCache)
    assert cache.tokens == text
    assert {entry.offset for entry in cache} == {len(text)}
    # What the caches hold is what reading the text would give, but for slices.
    fresh = make_prompt_cache(draft)
    draft(mx.array([text]), cache=fresh)
    for entry, expected in zip(cache[len(model.layers) :], fresh, strict=True):
        for a, b in zip(entry.state, expected.state, strict=True):
            if isinstance(a, mx.array):
                assert mx.allclose(a[..., : len(text), :], b[..., : len(text), :], atol=1e-4)


def test_a_conversation_goes_on_with_drafts_and_can_be_trimmed(model, tokenizer):
    def talk(draft, dense_every=0):
        cache, texts = glass_mlx.make_prompt_cache(model), []
        options = RENEWED | {"dense_every": dense_every, "prompt_cache": cache}
        if draft is not None:
            cache += make_prompt_cache(draft)
            options |= {"draft_model": draft, "num_draft_tokens": 3}
        for turn, prompt in enumerate((PROMPT, [5, 6, 7], [9, 9, 4])):
            texts.append(tokens_of(run(model, tokenizer, prompt, n=12, **options)))
            if turn == 1:
                glass_mlx.trim_prompt_cache(cache, 4)
        return texts, cache.tokens

    assert talk(model) == talk(sometimes_right(model)) == talk(None)
    assert talk(never_right(model), dense_every=4) == talk(None, dense_every=4)


def test_a_copy_of_a_cache_goes_its_own_way(model, tokenizer):
    cache = glass_mlx.make_prompt_cache(model)
    cache += make_prompt_cache(model)
    options = RENEWED | {"draft_model": model}
    run(model, tokenizer, n=8, prompt_cache=cache, **options)
    texts = [
        tokens_of(run(model, tokenizer, [5, 6], prompt_cache=copy.deepcopy(cache), **options))
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(cache.tokens) == len(PROMPT) + 8


def test_processors_see_the_text_so_far_at_every_place(model, tokenizer):
    """A token may not be said twice within a few tokens, also where it was drafted."""
    for penalties in ({"repetition_penalty": 1.5}, {"logit_bias": {7: 3.0, 9: -100.0}}):
        processors = make_logits_processors(**penalties)
        options = {"density": 1.0, "logits_processors": processors, "n": 40}
        plain = run(model, tokenizer, **options)
        for make_draft in DRAFTERS:
            responses = run(
                model, tokenizer, draft_model=make_draft(model), num_draft_tokens=3, **options
            )
            assert tokens_of(responses) == tokens_of(plain)
    seen = []

    def record(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    responses = run(
        model,
        tokenizer,
        n=20,
        density=1.0,
        draft_model=model,
        num_draft_tokens=3,
        logits_processors=[record],
    )
    text = PROMPT + tokens_of(responses)
    assert all(tokens == text[: len(tokens)] for tokens in seen[:-4])


@pytest.mark.slow
def test_sampling_takes_the_tokens_from_the_target(model, tokenizer):
    """At a temperature, the tokens after the first one follow the target's distribution."""
    counts = {True: np.zeros(256), False: np.zeros(256)}
    bias = make_logits_processors(logit_bias=dict.fromkeys((5, 6, 7), 6.0))
    for seed in range(150):
        for has_draft in counts:
            mx.random.seed(seed)
            draft = {"draft_model": sometimes_right(model)} if has_draft else {}
            responses = run(
                model,
                tokenizer,
                n=6,
                density=1.0,
                sampler=make_sampler(1.0),
                logits_processors=bias,
                **draft,
            )
            for response in responses[1:]:
                counts[has_draft][response.token] += 1
    a, b = (counts[key][[5, 6, 7]] / counts[key].sum() for key in counts)
    assert np.abs(a - b).max() < 0.08


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    texts = []
    for _ in range(2):
        mx.random.seed(1)
        options = RENEWED | {"sampler": make_sampler(1.0), "draft_model": model}
        texts.append(tokens_of(run(model, tokenizer, n=20, **options)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("own", "other"), [(256, 200), (256, 320), (200, 256)])
def test_padded_vocabularies_may_differ(tokenizer, own, other):
    """Models of one family pad their vocabularies differently; ids beyond do no harm."""
    model, draft = (tiny_model("llama", vocab_size=size) for size in (own, other))
    prompt = [token % own for token in PROMPT]
    options = {"density": 1.0, "prompt": prompt, "n": 30}
    responses = run(model, tokenizer, draft_model=draft, num_draft_tokens=3, **options)
    assert tokens_of(responses) == tokens_of(run(model, tokenizer, **options))


def test_a_quantized_cache_is_quantized_for_both_models(tokenizer):
    model = tiny_model("llama", seed=49, head_dim=32)
    cache = glass_mlx.make_prompt_cache(model)
    cache += make_prompt_cache(model)
    options = RENEWED | {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 16, "n": 30}
    responses = run(model, tokenizer, prompt_cache=cache, draft_model=model, **options)
    assert {type(entry) for entry in cache} == {QuantizedKVCache}
    assert len(cache.tokens) == len(PROMPT) + len(responses)
    assert {entry.offset for entry in cache} == {len(cache.tokens)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_model": "llama"}, "the draft model must be a model, not str"),
        ({"num_draft_tokens": -1}, "number of draft tokens must be at least 0, not -1"),
        ({"input_embeddings": mx.zeros((3, 64))}, "cannot read input embeddings"),
        ({"max_kv_size": 64}, "keeps only the latest 64 tokens of longer texts"),
        ({"max_kv_size": 64, "n": -1}, "keeps only the latest 64 tokens of longer texts"),
        ({"prompt_cache": [KVCache() for _ in range(4)]}, "no entries for the draft model"),
        ({"prompt_cache": [KVCache() for _ in range(7)]}, "7 layers|3 layers"),
        ({"prompt_cache": [KVCache()]}, "it has 1 layers"),
    ],
)
def test_what_cannot_be_is_refused_before_any_computation(model, tokenizer, options, message):
    options = {"draft_model": model} | options
    n = options.pop("n", 60)
    with pytest.raises(ValueError, match=message):
        stream_generate(
            model, tokenizer, PROMPT, max_tokens=n, prior=made_prior(model), density=0.5, **options
        )


@pytest.mark.parametrize("role", ["model", "draft model"])
def test_caches_that_cannot_be_trimmed_are_refused(tokenizer, role):
    hybrid, model = tiny_model("falcon_h1"), tiny_model("llama")
    target, draft = (hybrid, model) if role == "model" else (model, hybrid)
    with pytest.raises(ValueError, match=f"cannot be taken out of this {role}'s cache"):
        stream_generate(
            target, tokenizer, PROMPT, prior=made_prior(target), density=0.5, draft_model=draft
        )


def test_a_window_that_the_text_fits_into_is_no_hindrance(model, tokenizer):
    options = RENEWED | {"dense_every": 0, "n": 20}
    responses = run(model, tokenizer, draft_model=model, max_kv_size=64, **options)
    assert tokens_of(responses) == tokens_of(run(model, tokenizer, **options))
    cache = [RotatingKVCache(31) for _ in range(8)]
    run(model, tokenizer, draft_model=model, prompt_cache=cache, **options)
    assert {entry.offset for entry in cache} == {30}
    too_small = [RotatingKVCache(30) for _ in range(8)]
    with pytest.raises(ValueError, match="keeps only the latest 30 tokens"):
        run(model, tokenizer, draft_model=model, prompt_cache=too_small, **options)
    with pytest.raises(ValueError, match="keeps only the latest 31 tokens"):
        run(model, tokenizer, draft_model=model, prompt_cache=cache, **options)


def test_an_error_of_the_sampler_is_not_hidden(model, tokenizer):
    calls = []

    def fail(logprobs):
        calls.append(len(logprobs))
        if len(calls) == 8:
            raise RuntimeError("sampler")
        return mx.argmax(logprobs, axis=-1)

    with pytest.raises(RuntimeError, match="sampler"):
        run(model, tokenizer, sampler=fail, draft_model=model, **RENEWED)


def test_released_weights_go_with_drafts(model, tokenizer):
    options = RENEWED | {"dense_every": 0, "refresh": 0, "n": 30}
    plain = run(model, tokenizer, **options)
    released = tiny_model("llama", seed=49)
    responses = run(
        released,
        tokenizer,
        draft_model=model,
        reload=lambda: tiny_model("llama", seed=49),
        **options,
    )
    assert tokens_of(responses) == tokens_of(plain)


def test_a_session_is_a_target(model, tokenizer):
    responses = run(model, tokenizer, draft_model=model, **RENEWED)
    session = Session(model)
    stream = stream_generate(
        session,
        tokenizer,
        PROMPT,
        max_tokens=60,
        prior=made_prior(model),
        draft_model=model,
        **RENEWED,
    )
    assert tokens_of(stream) == tokens_of(responses)
