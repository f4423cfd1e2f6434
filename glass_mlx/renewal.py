"""The schedule of a generation: stretches that are decoded on slices, and readings in between."""

from collections.abc import Iterator
from typing import NamedTuple

from glass_mlx.config import GlassConfig

# After this many renewals the interval between them doubles, because each additional token changes
# the statistics less.
_RENEWALS_PER_INTERVAL = 4


class Stretch(NamedTuple):
    """A stretch of a generation between two selections, in numbers of generated tokens.

    Attributes:
        start: where neurons are selected and decoding on slices begins.
        read_again_from: the tokens from here to the stop are read again by the dense model.
        stop: where decoding on these slices ends.
    """

    start: int
    read_again_from: float
    stop: float


def stretches(config: GlassConfig, tokens: float) -> Iterator[Stretch]:
    """Yield the stretches of a generation that are decoded on slices.

    The first stretch starts at the end of the warm-up. Renewals follow at multiples of `refresh`,
    regardless of the warm-up, and the interval doubles after every fourth renewal. Between two
    stretches, the dense model reads the last tokens again and computes one more token. After the
    last stretch, nothing is read again.

    Args:
        config: the configuration, with its warm-up and refresh.
        tokens: the number of tokens to generate, or infinity.
    """
    start, renewals = config.warmup, _renewals(config)
    while start < tokens:
        stop = next((point for point in renewals if point > start), None)
        if stop is None or stop >= tokens:
            yield Stretch(start, tokens, tokens)
            return
        yield Stretch(start, max(start, stop - config.reread), stop)
        start = stop + 1


def _renewals(config: GlassConfig) -> Iterator[int]:
    """Yield the numbers of generated tokens after which the selection is renewed."""
    point, interval = 0, config.refresh
    while interval and not config.is_dense:
        for _ in range(_RENEWALS_PER_INTERVAL):
            point += interval
            yield point
        interval *= 2
