"""One generation, compared with mlx-lm and with the method step by step."""

import gc
import itertools
import weakref
from types import SimpleNamespace

from glass_mlx import load, stream_generate
from glass_mlx import make_prompt_cache as make_glass_prompt_cache
from glass_mlx.config import GlassConfig
from glass_mlx.decoding import Decoder
from glass_mlx.engine import Generation
from glass_mlx.models.architectures import tiny_model
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import select
from glass_mlx.session import Session
from glass_mlx.streaming import generate
from helpers import (
    made_prior,
    masked_model,
    save_tiny_folder,
    snapshot,
    statistics_of,
)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


@pytest.fixture
def model():
    return tiny_model("llama", seed=49)  # with this seed, few tokens repeat


# Select once, after the prompt.
STATIC = {
    "warmup": 1,
    "refresh": 0,
    "dense_every": 0,
    "prior_weight": 0.5,
    "statistic": "activation",
}


def run(model, tokenizer, prompt=PROMPT, n=12, **options):
    options = {"density": 0.5, "prior": made_prior(model)} | STATIC | options
    return list(stream_generate(model, tokenizer, prompt, max_tokens=n, **options))


def test_all_neurons_give_the_dense_tokens_and_logits_bit_for_bit(model, tokenizer):
    for temp in (0.0, 1.0):
        mx.random.seed(3)
        dense = list(
            mlx_lm.stream_generate(
                model, tokenizer, PROMPT, max_tokens=20, sampler=make_sampler(temp)
            )
        )
        mx.random.seed(3)
        responses = run(model, tokenizer, n=20, density=1.0, sampler=make_sampler(temp))
        assert [r.token for r in responses] == [r.token for r in dense]
        assert [r.text for r in responses] == [r.text for r in dense]
        for a, b in zip(responses, dense, strict=True):
            assert mx.array_equal(a.logprobs, b.logprobs)
        assert [r.finish_reason for r in responses] == [r.finish_reason for r in dense]
        assert [r.generation_tokens for r in responses] == [r.generation_tokens for r in dense]
        assert responses[-1].prompt_tokens == dense[-1].prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("statistic", ["activation", "griffin"])
@pytest.mark.parametrize("chunk", [2048, 3])
def test_decoding_uses_the_fused_selection_of_the_prompt(model, tokenizer, statistic, chunk):
    """Compare with the method step by step: statistics, ranks, fusion, selection, masking."""
    prior = made_prior(model)
    prior.scores["griffin"] = made_prior(model, seed=5).scores["griffin"]
    local = statistics_of(model, [mx.array([PROMPT])], cached=True)[statistic]
    fused = {
        path: fuse(ranks(scores), ranks(prior.scores["griffin"][path]), 0.25)
        for path, scores in local.items()
    }
    expected = select(fused, 0.5, dict.fromkeys(fused, 32))
    masked, cache, tokens = masked_model(model, expected), make_prompt_cache(model), []
    logits = model(mx.array([PROMPT]), cache=cache)[0, -1]
    for _ in range(12):
        tokens.append(logits.argmax().item())
        logits = masked(mx.array([tokens[-1:]]), cache=cache)[0, -1]

    options = {
        "prior": prior,
        "prior_weight": 0.25,
        "statistic": statistic,
        "prefill_step_size": chunk,
    }
    responses = run(model, tokenizer, **options)
    assert [r.token for r in responses] == tokens
    for path, kept in expected.indices.items():
        assert np.array_equal(responses[-1].glass.selection.indices[path], kept)


def test_the_first_token_is_dense_and_reported_as_dense(model, tokenizer):
    first, *_, last = run(model, tokenizer)
    assert first.glass.density_got == 1.0
    assert first.glass.sliced_bytes == first.glass.dense_bytes
    assert last.glass.density == 0.5
    assert last.glass.density_got == 0.5
    ffn_bytes = 4 * 3 * 64 * 128 * 4
    assert last.glass.dense_bytes - last.glass.sliced_bytes == ffn_bytes // 2
    assert last.glass.prior_weight == 0.5
    assert last.glass.select_time > 0
    assert last.glass.slice_time > 0


def test_the_model_is_never_modified(model, tokenizer):
    before = snapshot(model)
    stream = stream_generate(model, tokenizer, PROMPT, prior=made_prior(model), density=0.5)
    for _ in range(3):
        next(stream)
        assert snapshot(model) == before  # also during a generation
    stream.close()
    run(model, tokenizer)

    def fail(*_):
        raise RuntimeError("sampler")

    with pytest.raises(RuntimeError, match="sampler"):
        run(model, tokenizer, sampler=fail)
    assert snapshot(model) == before


def test_a_model_that_keeps_references_to_its_modules_is_refused(model, tokenizer):
    """The model would not run the replaced modules, so slicing would have no effect."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.run = model, model.__call__

        @property
        def layers(self):
            return model.layers

        def __call__(self, tokens, cache=None):
            return self.run(tokens, cache=cache)

    detached = Detached()
    with pytest.raises(ValueError, match="does not run the modules"):
        run(detached, tokenizer)


def test_options_may_be_none_as_in_mlx_lm(model, tokenizer):
    options = ("sampler", "logits_processors", "prompt_cache", "prompt_progress_callback")
    plain = run(model, tokenizer)
    options += ("down_policy",)
    responses = run(model, tokenizer, **dict.fromkeys(options), num_draft_tokens=3)
    assert [r.token for r in responses] == [r.token for r in plain]
    assert responses[-1].glass.prior == "given"


def test_concurrent_generations_do_not_interfere(model, tokenizer):
    prompts, prior = ([1, 2, 3, 4], [250, 9, 77, 31, 5]), made_prior(model)
    expected = [[r.token for r in run(model, tokenizer, p, prior=prior)] for p in prompts]
    streams = [
        stream_generate(model, tokenizer, p, max_tokens=12, density=0.5, prior=prior, **STATIC)
        for p in prompts
    ]
    pairs = list(zip(*streams, strict=True))
    assert [[pair[i].token for pair in pairs] for i in range(2)] == expected


def test_one_token_uses_the_prior_alone(model, tokenizer):
    responses = run(model, tokenizer, prompt=[5], prior_weight=0.0)
    prior = made_prior(model).scores["activation"]
    expected = select(prior, 0.5, dict.fromkeys(prior, 32))
    assert responses[-1].glass.prior_weight == 1.0
    for path, kept in expected.indices.items():
        assert np.array_equal(responses[-1].glass.selection.indices[path], kept)
    with pytest.raises(ValueError, match="one token"):
        run(model, tokenizer, prompt=[5], prior=False)


def test_without_a_prior_only_the_prompt_counts(model, tokenizer):
    no_prior = run(model, tokenizer, prior=False)[-1].glass
    zero_weight = run(model, tokenizer, prior_weight=0.0)[-1].glass
    assert (no_prior.prior, no_prior.prior_weight) == ("none", 0.0)
    for path, kept in zero_weight.selection.indices.items():
        assert np.array_equal(no_prior.selection.indices[path], kept)


RENEWAL = {"warmup": 3, "refresh": 4, "dense_every": 3}
# Cache quantization starts in the middle of a sliced stretch, between two renewals.
QUANTIZED_CACHE = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(PROMPT) + 6}


@pytest.mark.parametrize("options", [{}, RENEWAL])
def test_logits_processors_see_the_prompt_and_all_generated_tokens(model, tokenizer, options):
    seen = {}

    def record(tokens, logits):
        seen[len(tokens)] = tokens.tolist()
        return logits

    responses = run(model, tokenizer, n=20, logits_processors=[record], **options)
    tokens = [r.token for r in responses]
    visible_prompt = seen[min(seen)]  # mlx-lm shows only part of a chunked prompt
    assert visible_prompt[-1] == PROMPT[-1]
    for i in range(1, 20):
        assert seen[min(seen) + i] == visible_prompt + tokens[:i]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [{}, RENEWAL, RENEWAL | QUANTIZED_CACHE | {"quantized_kv_start": 0}, RENEWAL | QUANTIZED_CACHE],
)
def test_the_cache_ends_at_the_same_offset_as_in_mlx_lm(tokenizer, kind, options):
    if kind == "gemma3_text" and "kv_bits" in options:
        pytest.skip("mlx-lm does not quantize rotating caches")
    model = tiny_model(kind, head_dim=32)
    for n in (2, 3, 4, 5, 8, 9, 20):
        cache = make_prompt_cache(model)
        responses = run(model, tokenizer, n=n, prompt_cache=cache, **options)
        assert len(responses) == n
        assert responses[-1].finish_reason == "length"
        assert {layer.offset for layer in cache} == {len(PROMPT) + n}


@pytest.mark.parametrize("end", range(14))
def test_the_end_of_sequence_token_is_cached_as_in_mlx_lm(model, tokenizer, end):
    tokens = [r.token for r in run(model, tokenizer, n=14, **RENEWAL)]
    if tokens[end] in tokens[:end]:
        pytest.skip("the token also occurs earlier")
    tokenizer.eos_token_ids = {tokens[end]}
    cache = make_prompt_cache(model)
    responses = run(model, tokenizer, n=30, prompt_cache=cache, **RENEWAL)
    assert [r.token for r in responses] == tokens[: end + 1]
    assert responses[-1].finish_reason == "stop"
    assert cache[0].offset == len(PROMPT) + end + 1


def rotating_cache(size, keep):
    return lambda model: [RotatingKVCache(size, keep=keep) for _ in model.layers]


def mixed_cache(model):
    return [KVCache() if n % 2 else RotatingKVCache(9, keep=4) for n in range(len(model.layers))]


# Architecture, a function that makes the cache, and options of the generation.
CACHES = {
    "plain": ("llama", make_prompt_cache, {}),
    **{
        f"window {size}, keep {keep}": ("qwen3", rotating_cache(size, keep), {})
        for size in (6, 12, 24, 64)
        for keep in (0, 4)
    },
    "sinks alone": ("llama", rotating_cache(4, 4), {}),
    "prompt in chunks": ("qwen3", rotating_cache(8, 4), {"prefill_step_size": 3}),
    "own windows": ("gemma3_text", make_prompt_cache, {}),
    "a window with a sink in place of its own": ("gemma3_text", rotating_cache(16, 4), {}),
    "different caches by layer": ("llama", mixed_cache, {}),
    "quantized at once": ("llama", make_prompt_cache, QUANTIZED_CACHE | {"quantized_kv_start": 0}),
    "quantized in a stretch": ("llama", make_prompt_cache, QUANTIZED_CACHE),
    "quantized after a stretch": (
        "llama",
        make_prompt_cache,
        QUANTIZED_CACHE | {"quantized_kv_start": len(PROMPT) + 8},
    ),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(
    "schedule", [RENEWAL, {"warmup": 1, "refresh": 7, "dense_every": 2}], ids=str
)
def test_with_all_neurons_renewals_change_nothing_whatever_the_cache(tokenizer, name, schedule):
    kind, make_cache, options = CACHES[name]
    model = tiny_model(kind, seed=49, head_dim=32)
    options = options | {"prompt": PROMPT, "max_tokens": 40}
    cache = make_cache(model)
    dense = list(mlx_lm.stream_generate(model, tokenizer, prompt_cache=cache, **options))
    ours = make_cache(model)
    slicing = {"prior": made_prior(model), "density": 0.9999, "prompt_cache": ours} | schedule
    responses = list(stream_generate(model, tokenizer, **options, **slicing))
    assert responses[-1].glass.selections >= 5
    assert responses[-1].glass.dense_tokens >= 12
    assert [r.token for r in responses] == [r.token for r in dense]
    for a, b in zip(responses, dense, strict=True):
        assert mx.allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-3)
    assert [type(entry) for entry in ours] == [type(entry) for entry in cache]
    assert [entry.offset for entry in ours] == [entry.offset for entry in cache]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generations_in_half_precision_equal_mlx_lm_s(model, tokenizer, dtype, bits, temperature):
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)

    def generate(function, **options):
        mx.random.seed(5)
        options |= {"max_tokens": 30, "sampler": make_sampler(temperature)}
        return list(function(model, tokenizer, PROMPT, **options))

    dense = generate(mlx_lm.stream_generate)
    slicing = {"prior": made_prior(model)} | RENEWAL
    exact = generate(stream_generate, density=1.0, **slicing)
    assert [r.token for r in exact] == [r.token for r in dense]
    for a, b in zip(exact, dense, strict=True):
        assert a.logprobs.dtype == b.logprobs.dtype
        assert mx.array_equal(a.logprobs, b.logprobs)
    # This density rounds to all neurons.
    renewed = generate(stream_generate, density=0.9999, **slicing)
    assert renewed[-1].glass.selections >= 5
    assert [r.token for r in renewed] == [r.token for r in dense]
    for a, b in zip(renewed, dense, strict=True):
        assert mx.allclose(a.logprobs, b.logprobs, atol=0.1)
    sliced = generate(stream_generate, density=0.5, **slicing)
    assert sliced[-1].logprobs.dtype == dense[-1].logprobs.dtype
    assert mx.isfinite(sliced[-1].logprobs).all()


def test_in_prefill_the_last_ffn_is_observed_on_a_sample(model, tokenizer):
    """Nothing else is computed there, so observing all tokens would cost time."""
    prompt = [n % 251 for n in range(300)]
    for step, tokens in ((2048, 100 + 1), (200, 100 + 99 + 1), (128, 300)):
        cache = make_glass_prompt_cache(model)
        run(model, tokenizer, prompt, n=1, prompt_cache=cache, prefill_step_size=step)
        state = cache.statistics.prompt.state()
        counts = [int(state[f"model.layers.{n}.mlp.tokens"].sum()) for n in range(4)]
        assert counts == [300, 300, 300, tokens]


def test_a_cache_may_be_a_tuple_as_in_mlx_lm(model, tokenizer):
    cache = tuple(make_prompt_cache(model))
    expected = run(model, tokenizer, n=20, **RENEWAL)
    responses = run(model, tokenizer, n=20, prompt_cache=cache, **RENEWAL)
    assert [r.token for r in responses] == [r.token for r in expected]
    assert cache[0].offset == len(PROMPT) + 20


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("stops", [False, True])
def test_as_many_random_numbers_are_drawn_as_in_mlx_lm(model, tokenizer, n, stops):
    """So that a program that goes on sampling gets the same numbers."""
    sampler, seen = make_sampler(1.0), []

    def processor(tokens, logits):
        seen.append(len(tokens))
        return logits

    def draw(function, **options):
        mx.random.seed(3)
        seen.clear()
        options |= {"sampler": sampler, "logits_processors": [processor]}
        stream = function(model, tokenizer, PROMPT, max_tokens=30 if stops else n, **options)
        for _ in range(n):
            next(stream)
        stream.close()
        return mx.random.uniform().item(), len(seen)

    ours = draw(stream_generate, prior=False, density=0.9999, **RENEWAL)
    assert ours == draw(mlx_lm.stream_generate)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 9])
def test_a_generation_that_nobody_closes_ends_at_its_limit(model, n):
    """The limit lies in the warm-up, in a stretch, at a renewal and after it."""
    session, cache = Session(model), make_prompt_cache(model)
    selector = session.selector(GlassConfig(density=0.5, **RENEWAL), made_prior(model))
    decoder, statistics = Decoder(model, cache, mx.array(PROMPT), n), session.empty_statistics()
    steps = list(Generation(session, selector, decoder, statistics).steps())
    assert [step.token for step in steps] == decoder.tokens[len(PROMPT) :]
    assert len(steps) == n
    assert {layer.offset for layer in cache} == {len(PROMPT) + n}
    assert statistics.prompt.tokens == len(PROMPT)


def test_reports_count_dense_tokens_and_selections(model, tokenizer):
    reports = [r.glass for r in run(model, tokenizer, n=20, **RENEWAL)]
    # The 3 warm-up tokens are dense, and then every third token.
    assert [i for i, report in enumerate(reports) if report.dense] == [0, 1, 2, 5, 8, 11, 14, 17]
    last = reports[-1]
    # After 3, 4, 8, 12 and 16 tokens.
    assert (last.dense_tokens, last.selections) == (8, 5)
    assert reports[2].selection is None
    assert reports[3].selection is not None


def test_repetition_penalty_matches_mlx_lm(model, tokenizer):
    processors = make_logits_processors(repetition_penalty=1.5)
    dense = [
        r.token
        for r in mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=12, logits_processors=processors
        )
    ]
    processors = make_logits_processors(repetition_penalty=1.5)
    responses = run(model, tokenizer, density=1.0, logits_processors=processors)
    assert [r.token for r in responses] == dense


def test_generation_stops_at_eos(model, tokenizer):
    tokens = [r.token for r in run(model, tokenizer)]
    stop = next(i for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
    tokenizer.eos_token_ids = [tokens[stop]]
    responses = run(model, tokenizer)
    assert [r.token for r in responses] == tokens[: stop + 1]
    assert responses[-1].finish_reason == "stop"
    assert "".join(r.text for r in responses) == tokenizer.decode(tokens[:stop])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_generation_stops_at_max_tokens(model, tokenizer, n):
    responses = run(model, tokenizer, n=n)
    assert len(responses) == n
    assert responses[-1].finish_reason == "length"


def test_negative_max_tokens_means_no_limit(model, tokenizer):
    stream = stream_generate(
        model, tokenizer, PROMPT, max_tokens=-1, prior=made_prior(model), density=0.5
    )
    assert [next(stream).finish_reason for _ in range(300)] == [None] * 300


def test_cache_options_are_passed_on(tokenizer):
    model = tiny_model("llama", head_dim=32)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}
    dense = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12, **options)
    responses = run(model, tokenizer, density=1.0, **options)
    assert [r.token for r in responses] == [r.token for r in dense]


def test_caches_that_a_model_makes_itself_have_a_maximum_size_too(tokenizer):
    """mlx-lm ignores `max_kv_size` for such models."""
    model = tiny_model("llama")
    assert hasattr(model, "make_cache")
    cache = [RotatingKVCache(8, keep=4) for _ in model.layers]
    dense = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12, prompt_cache=cache)
    responses = run(model, tokenizer, density=1.0, max_kv_size=8)
    assert [r.token for r in responses] == [r.token for r in dense]
    unbounded = run(model, tokenizer, density=1.0)
    assert not mx.allclose(responses[-1].logprobs, unbounded[-1].logprobs)
    for size in (1, 2, 3):
        assert len(run(model, tokenizer, density=0.5, max_kv_size=size)) == 12


def test_generation_continues_from_a_prompt_cache(model, tokenizer):
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT[:6]]), cache=cache)
    continued = run(model, tokenizer, prompt=PROMPT[6:], density=1.0, prompt_cache=cache)
    at_once = run(model, tokenizer, density=1.0)
    assert [r.token for r in continued] == [r.token for r in at_once]


@pytest.mark.parametrize("ending", ["length", "stop"])
def test_an_incomplete_character_at_the_end_is_shown_as_in_mlx_lm(ending):
    """A streaming detokenizer holds bytes back until they are complete, or the text ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain)
    fast.eos_token = alphabet[7]
    first_byte = plain.token_to_id("Ã")  # 0xC3, the first of two bytes of é
    model = tiny_model("llama")
    bias = mx.zeros(256).at[first_byte].add(100)
    stop = mx.zeros(256).at[7].add(200)

    def text(function, detokenizer, **options):
        calls = itertools.count()

        def processor(tokens, logits):
            return logits + bias + (stop if ending == "stop" and next(calls) == 3 else 0)

        wrapper = TokenizerWrapper(fast, detokenizer, eos_token_ids=[7])
        options |= {"max_tokens": 5, "logits_processors": [processor]}
        responses = list(function(model, wrapper, PROMPT, **options))
        assert responses[-1].finish_reason == ending
        return "".join(r.text for r in responses)

    for detokenizer in (NaiveStreamingDetokenizer, BPEStreamingDetokenizer):
        expected = text(mlx_lm.stream_generate, detokenizer)
        assert "\ufffd" in expected
        assert text(stream_generate, detokenizer, prior=False) == expected


def test_progress_is_reported(model, tokenizer):
    calls = []
    run(
        model,
        tokenizer,
        prefill_step_size=4,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 10), (4, 10), (8, 10), (9, 10), (10, 10)]


def test_generate_returns_the_text_and_prints_statistics(model, tokenizer, capsys):
    text = generate(
        model,
        tokenizer,
        PROMPT,
        verbose=True,
        max_tokens=16,
        prior=made_prior(model),
        density=0.5,
        prior_weight=0.5,
        warmup=2,
        refresh=4,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] == "=" * 10
    assert lines[1] == text
    assert lines[3].startswith("Prompt: 10 tokens, ")
    assert lines[4].startswith("Generation: 16 tokens, ")
    assert lines[6].startswith(
        "GLASS: density 0.500, vocabulary 1.000, probability outside 0.0000, λ 0.50, prior given, "
    )
    assert lines[7].startswith("GLASS: 5 tokens dense, 4 selections: select ")
    assert "4 selections" in lines[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 2}, "density"),
        ({"prior_weight": -1}, "between 0 and 1"),
        ({"statistic": "mean"}, "statistic 'mean'"),
        ({"prior_statistic": "impact"}, "has no statistic"),
        ({"down_policy": "float"}, "down policy"),
        ({"prompt": []}, "prompt is empty"),
        ({"n": 0}, "must be at least 1, or -1 for no limit"),
        ({"draft_model": SimpleNamespace()}, "draft model"),
        ({"prior": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_bad_values_are_refused_before_any_computation(model, tokenizer, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(model, tokenizer, **options)


def test_the_prior_can_rank_by_another_statistic(model, tokenizer):
    prior = made_prior(model)
    other = {path: 1 - values for path, values in prior.scores["activation"].items()}
    prior.scores["impact"] = other

    def last_report(**options):
        return run(model, tokenizer, n=2, prior=prior, prior_weight=1.0, **options)[-1].glass

    by_impact = last_report(prior_statistic="impact")
    assert (by_impact.statistic, by_impact.prior_statistic) == ("activation", "impact")
    for path, indices in by_impact.selection.indices.items():
        assert set(indices) == set(np.argsort(other[path])[-64:])
        assert not set(indices) & set(last_report().selection.indices[path])
    with pytest.raises(
        ValueError, match="has no statistic 'x'; it has activation, griffin, impact"
    ):
        last_report(prior_statistic="x")


@pytest.mark.parametrize("quantization", [{}, {"group_size": 32, "bits": 4}])
@pytest.mark.parametrize("refresh", [0, 4])
def test_released_weights_are_freed_and_reloaded(tmp_path, tokenizer, quantization, refresh):
    folder = save_tiny_folder(tmp_path / "tiny", **quantization)
    options = {"warmup": 3, "refresh": refresh}
    model, _ = load(str(folder))
    dense = model(mx.array([PROMPT]))
    expected = run(model, tokenizer, **options)
    # Weak references, not identities: a new array may reuse a freed array's address.
    references = {
        path: weakref.ref(a) for path, a in tree_flatten(model.parameters()) if "mlp" in path
    }
    reloads = []

    def reload():
        reloads.append(load(str(folder), lazy=True)[0])
        return reloads[-1]

    responses = run(model, tokenizer, reload=reload, **options)
    assert [r.token for r in responses] == [r.token for r in expected]
    paths = {path for path, _ in tree_flatten(model.parameters()) if "mlp" in path}
    assert paths == references.keys()
    assert not any(array() is not None for array in references.values())
    assert len(reloads) == responses[-1].glass.selections
    assert mx.array_equal(model(mx.array([PROMPT])), dense)


def test_releasing_dense_weights_samples_the_same_tokens(tmp_path, tokenizer):
    folder = save_tiny_folder(tmp_path / "tiny")

    def sample(**options):
        model, _ = load(str(folder))
        mx.random.seed(7)
        options |= {"warmup": 3, "refresh": 4, "sampler": make_sampler(1.0)}
        return [r.token for r in run(model, tokenizer, n=30, **options)]

    assert sample(reload=lambda: load(str(folder), lazy=True)[0]) == sample()


def test_releasing_dense_weights_lowers_held_memory(tmp_path, tokenizer):
    folder = save_tiny_folder(tmp_path / "tiny")
    ffn_bytes = 4 * 3 * 64 * 128 * 4

    def held_bytes(**options):
        model, _ = load(str(folder))
        gc.collect()
        return run(model, tokenizer, **options)[-1].glass.held_bytes

    default = held_bytes()
    released = held_bytes(reload=lambda: load(str(folder), lazy=True)[0])
    assert default - released == pytest.approx(ffn_bytes, rel=0.05)
