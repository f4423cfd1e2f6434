"""Tokens that are read at once into rotating caches."""

from importlib.metadata import version

from glass_mlx.cache_masks import masked_as_one_by_one
from glass_mlx.models.architectures import tiny_model

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

TOKENS = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31, 4, 6]


def rotating(model, size, keep):
    return [RotatingKVCache(size, keep=keep) for _ in model.layers]


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
    with masked_as_one_by_one(at_once):
        logits = model(mx.array([TOKENS]), cache=at_once)
    assert mx.allclose(logits, mx.concatenate(expected, axis=1), rtol=1e-3, atol=1e-4)
