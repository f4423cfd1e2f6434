from glass_mlx.models.architectures import tiny_model
from glass_mlx.rewind import Mark

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # gemma3's windows are of 8 tokens
@pytest.mark.parametrize("fed", [1, 5, 20])
def test_going_back_is_as_if_the_tokens_had_not_been_read(kind, fed):
    model, tokens = tiny_model(kind), mx.array([[1, 7, 3, 200, 9, 54, 21, 8, 8, 31, 4, 6]])
    cache = make_prompt_cache(model)
    model(tokens, cache=cache)
    mark = Mark(cache)
    for n in range(fed):
        mx.eval(model(mx.array([[n]]), cache=cache))
    mark.rewind(fed)
    again = model(tokens[:, :5], cache=cache)

    fresh = make_prompt_cache(model)
    model(tokens, cache=fresh)
    assert mx.allclose(again, model(tokens[:, :5], cache=fresh), rtol=1e-4, atol=1e-5)


def test_recurrent_states_are_copied():
    cache = [KVCache(), ArraysCache(1)]
    cache[1][0] = mx.array([1.0])
    mark = Mark(cache)
    cache[1][0] = cache[1][0] + 1
    mark.rewind(0)
    assert cache[1][0].item() == 1.0
