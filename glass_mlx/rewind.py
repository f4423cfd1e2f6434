"""Going back in a prompt cache, to read tokens again with another model."""

import copy
from typing import Any

from mlx_lm.models.cache import KVCache, QuantizedKVCache


class Mark:
    """A place in a prompt cache that can be gone back to.

    Plain key-value caches are trimmed. Of all others a copy is kept here, since they may lose what
    they held before (rotating windows, recurrent states).

    Args:
        cache: the cache, a layer an entry. Going back replaces its entries.
    """

    def __init__(self, cache: list[Any]) -> None:
        self._cache = cache
        self._copies = {
            n: copy.deepcopy(layer)
            for n, layer in enumerate(cache)
            if type(layer) not in (KVCache, QuantizedKVCache)
        }

    def rewind(self, tokens: int) -> None:
        """Go back, from `tokens` tokens further on; to be called once."""
        for n, layer in enumerate(self._cache):
            if n in self._copies:
                self._cache[n] = self._copies[n]
            else:
                layer.trim(tokens)
