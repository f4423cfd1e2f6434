"""Prompt caches that are rewound, and tokens that are read again."""

from importlib.metadata import version

from glass_mlx.cache_snapshot import CacheSnapshot, largest_exact_step, masked_as_one_by_one
from glass_mlx.models.architectures import tiny_model

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

TOKENS = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31, 4, 6]


def rotating(model, size, keep):
    return [RotatingKVCache(size, keep=keep) for _ in model.layers]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # gemma3's window is 8 tokens
@pytest.mark.parametrize("count", [1, 5, 20])
def test_rewinding_a_cache_undoes_the_last_tokens(kind, count):
    model, tokens = tiny_model(kind), mx.array([TOKENS])
    cache = make_prompt_cache(model)
    entries = [*cache]
    model(tokens, cache=cache)
    snapshot = CacheSnapshot(cache)
    for n in range(count):
        mx.eval(model(mx.array([[n]]), cache=cache))
    snapshot.rewind()
    assert all(a is b for a, b in zip(cache, entries, strict=True))
    rewound = model(tokens[:, :5], cache=cache)

    fresh = make_prompt_cache(model)
    model(tokens, cache=fresh)
    assert mx.allclose(rewound, model(tokens[:, :5], cache=fresh), rtol=1e-4, atol=1e-5)


def test_recurrent_states_are_copied():
    cache = [KVCache(), ArraysCache(1)]
    cache[1][0] = mx.array([1.0])
    snapshot = CacheSnapshot(cache)
    cache[1][0] = cache[1][0] + 1
    snapshot.rewind()
    assert cache[1][0].item() == 1.0


def test_rewinding_takes_back_that_the_cache_was_quantized():
    """mlx-lm replaces the entries in the middle of a text; the text before it is read as floats."""
    model = tiny_model("llama", head_dim=32)
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=cache)
    entries, snapshot = [*cache], CacheSnapshot(cache)
    model(mx.array([[5, 6]]), cache=cache)
    cache[:] = [entry.to_quantized(group_size=32, bits=8) for entry in cache]
    model(mx.array([[7]]), cache=cache)
    snapshot.rewind()
    assert all(a is b for a, b in zip(cache, entries, strict=True))
    assert {entry.offset for entry in cache} == {len(TOKENS)}


# The window is smaller than the text, as long as it, and longer; it is full before, in the middle
# of and after what is read at once.
@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("size", [5, 8, 12, 20, 24])
@pytest.mark.parametrize(("chunks", "singles"), [([12], 0), ([12], 11), ([3, 9], 3), ([2, 1], 0)])
def test_tokens_read_at_once_see_what_they_see_one_by_one(keep, size, chunks, singles):
    model = tiny_model("qwen3", num_hidden_layers=2)
    at_once, one_by_one = (rotating(model, size, keep) for _ in range(2))
    for cache in (at_once, one_by_one):
        start = 0
        for count in chunks:  # as mlx-lm reads a prompt
            model(mx.array([TOKENS[start : start + count]]), cache=cache)
            start += count
        for token in TOKENS[:singles]:
            model(mx.array([[token]]), cache=cache)
    expected = [model(mx.array([[token]]), cache=one_by_one) for token in TOKENS]
    with masked_as_one_by_one(at_once):
        logits = [model(mx.array([part]), cache=at_once) for part in (TOKENS[:7], TOKENS[7:])]
    assert mx.allclose(
        mx.concatenate(logits, axis=1), mx.concatenate(expected, axis=1), rtol=1e-3, atol=1e-4
    )
    last = [model(mx.array([[9]]), cache=cache) for cache in (at_once, one_by_one)]
    assert mx.allclose(*last, rtol=1e-3, atol=1e-4)
    assert all("make_mask" not in vars(entry) for entry in at_once)


@pytest.mark.skipif(
    version("mlx-lm").startswith("0.31."), reason="the architectures are tested from mlx-lm 0.32 on"
)
@pytest.mark.parametrize("kind", ["gemma3_text", "plamo3", "gpt_oss", "baichuan_m1", "llama4"])
def test_models_with_windows_of_their_own_read_at_once_as_one_by_one(kind):
    model = tiny_model(kind)
    at_once, one_by_one = (make_prompt_cache(model) for _ in range(2))
    for cache in (at_once, one_by_one):
        model(mx.array([TOKENS]), cache=cache)
    expected = [model(mx.array([[token]]), cache=one_by_one) for token in TOKENS]
    assert largest_exact_step(model, at_once, None, 0) is None
    with masked_as_one_by_one(at_once):
        logits = model(mx.array([TOKENS]), cache=at_once)
    assert mx.allclose(logits, mx.concatenate(expected, axis=1), rtol=1e-3, atol=1e-4)


def test_caches_that_a_model_has_no_masks_for_are_read_token_by_token():
    llama, gemma = tiny_model("llama"), tiny_model("gemma3_text")

    def step(model, cache):
        return largest_exact_step(model, cache, None, 0)

    assert step(llama, make_prompt_cache(llama)) is None
    assert step(llama, [QuantizedKVCache() for _ in llama.layers]) is None
    assert step(llama, rotating(llama, 8, 4)) is None
    assert step(llama, rotating(llama, 4, 4)) == 1  # nothing but sinks
    assert step(llama, [*rotating(llama, 8, 4)[:3], KVCache()]) == 1
    assert step(llama, [*rotating(llama, 8, 4)[:3], RotatingKVCache(9, keep=4)]) == 1
    assert step(llama, [CacheList(KVCache(), RotatingKVCache(8)) for _ in llama.layers]) == 1
    assert step(gemma, make_prompt_cache(gemma)) is None
    assert step(gemma, rotating(gemma, 16, 4)) == 1


def test_the_first_step_ends_where_the_cache_is_quantized():
    model = tiny_model("llama", head_dim=32)
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=cache)
    assert largest_exact_step(model, cache, None, 20) is None
    assert largest_exact_step(model, cache, 8, 20) == 8
    assert largest_exact_step(model, cache, 8, 12) is None
    quantized = [entry.to_quantized(group_size=32, bits=8) for entry in cache]
    assert largest_exact_step(model, quantized, 8, 20) is None
