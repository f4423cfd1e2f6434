"""Rewind a prompt cache, and read many tokens at once exactly as if they came one by one."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

_PLAIN = (KVCache, QuantizedKVCache)


class CacheSnapshot:
    """A state of a prompt cache that the cache can be rewound to.

    Plain key-value caches are trimmed. All others are copied here, because they may lose earlier
    contents (rotating windows, recurrent states).

    Args:
        cache: the cache, one entry per layer. Rewinding keeps the entries and changes their
            contents, so that all who hold an entry see the same.
    """

    def __init__(self, cache: list[Any]) -> None:
        self._cache, self._entries = cache, [*cache]
        self._copies = [None if type(e) in _PLAIN else copy.deepcopy(e) for e in cache]
        self._offsets = [getattr(entry, "offset", 0) for entry in cache]

    def rewind(self) -> None:
        """Remove everything that was read since the snapshot. Call this only once."""
        parts = zip(self._entries, self._copies, self._offsets, strict=True)
        for n, (entry, saved, offset) in enumerate(parts):
            if saved is None:
                entry.trim(entry.offset - offset)
            else:
                vars(entry).clear()
                vars(entry).update(vars(saved))
            if self._cache[n] is not entry:  # mlx-lm replaced it by a quantized copy
                self._cache[n] = entry


def largest_exact_step(
    model: nn.Module, cache: list[Any], kv_bits: int | None, quantized_kv_start: int
) -> int | None:
    """Return how many tokens can be read at once with the result of reading them one by one.

    The tokens must be read within `masked_as_one_by_one`.

    Args:
        model: the model that the cache is for.
        cache: the cache, one entry per layer.
        kv_bits: the bits that mlx-lm quantizes the cache to, or None.
        quantized_kv_start: the number of tokens at which mlx-lm quantizes the cache.

    Returns:
        The number of tokens to read in each step, or None for any number.
    """
    if not _fits_masks_of(model, cache):
        return 1
    offsets = [entry.offset for entry in cache if type(entry) is KVCache]
    if kv_bits is not None and offsets and offsets[0] < quantized_kv_start:
        return int(quantized_kv_start - offsets[0])  # the first step ends where floats end
    return None


def _fits_masks_of(model: nn.Module, cache: list[Any]) -> bool:
    """Return whether a model makes the right masks for a cache when it reads many tokens.

    A model makes one mask for all layers of a kind, which fits the kinds of cache that the model
    makes itself. Other kinds fit a model without kinds of its own, if all layers have the same.
    """
    kinds, own_kinds = _kinds(cache), _kinds(make_prompt_cache(model))
    if any(keep >= size > 0 for _, size, keep in kinds):
        return False  # every new token overwrites the latest one, or none
    return kinds == own_kinds or (len({*kinds}) == 1 and {*own_kinds} == {(KVCache, 0, 0)})


def _kinds(cache: Iterable[Any]) -> list[tuple[type, int, int]]:
    """Return the type, the window and the number of sinks of every part of a cache."""
    return [
        (
            KVCache if type(part) is QuantizedKVCache else type(part),
            getattr(part, "max_size", 0),
            getattr(part, "keep", 0),
        )
        for part in cache_parts(cache)
    ]


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
