"""MLX's global random state, kept and restored, so that the same numbers are drawn again."""

from collections.abc import Iterable
from typing import cast

import mlx.core as mx


def random_key() -> mx.array:
    """Return the key (2,) from which the next random numbers come."""
    (key,) = cast(Iterable[mx.array], mx.random.state)
    return key


def set_random_key(key: mx.array) -> None:
    """Let the next random numbers come from a key (2,) of `random_key`."""
    high, low = (int(part) for part in cast(list[int], key.tolist()))
    mx.random.seed(high << 32 | low)
