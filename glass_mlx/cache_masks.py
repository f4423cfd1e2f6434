"""Read many tokens at once into a prompt cache exactly as if they came one by one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, RotatingKVCache


def cache_parts(cache: Iterable[Any]) -> Iterator[Any]:
    """Yield the entries of a cache, and the parts of composed entries in their place."""
    for entry in cache:
        if isinstance(entry, CacheList):
            yield from cache_parts(entry.caches)
        else:
            yield entry


@contextmanager
def masked_as_one_by_one(cache: list[Any]) -> Iterator[None]:
    """Let every token see what it would see if the tokens were read one by one.

    mlx-lm's masks for many tokens at once move the window of a rotating cache over its sinks, and
    some models use a window that is larger than the cache.
    """
    rotating = [part for part in cache_parts(cache) if type(part) is RotatingKVCache]
    for part in rotating:
        vars(part)["make_mask"] = partial(_one_by_one_mask, part)
    try:
        yield
    finally:
        for part in rotating:
            del vars(part)["make_mask"]


def _one_by_one_mask(
    cache: RotatingKVCache, n: int, window_size: int | None = None, return_array: bool = False
) -> mx.array | str | None:
    """Return the mask for the next tokens of a rotating cache; see `RotatingKVCache.make_mask`.

    The cache holds the sinks, the latest tokens and the new tokens, in this order. One by one, each
    token of a full cache sees the sinks and the latest `max_size - keep` tokens up to itself.

    Args:
        cache: the cache.
        n: the number of new tokens.
        window_size: the model's own window.
        return_array: whether the model needs an array.
    """
    size, keep, offset = cache.max_size, cache.keep, cache.offset
    window = min(window_size or size, size)
    if n == 1 or offset + n <= window:
        return RotatingKVCache.make_mask(cache, n, window_size, return_array)
    held = min(offset, size - 1)
    keys = np.arange(held + n) + offset - held
    if held < offset:
        keys[:keep] = np.arange(keep)
    query = np.arange(offset, offset + n)[:, None]
    if window < size:
        seen = keys > query - window
    else:
        seen = (query < size) | (keys < keep) | (keys > query - (size - keep))
    return mx.array((keys <= query) & seen)
