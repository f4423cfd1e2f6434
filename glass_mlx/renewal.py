"""The schedule of selections: one after the warm-up, and one at every renewal."""

from collections.abc import Iterable, Iterator

from glass_mlx.config import GlassConfig

# After this many renewals the interval between them doubles, because each additional token changes
# the statistics less.
_RENEWALS_PER_INTERVAL = 4


def selection_points(config: GlassConfig) -> Iterator[int]:
    """Yield the numbers of generated tokens after which neurons are selected.

    The first point is the end of the warm-up. Renewals follow at multiples of `refresh`, regardless
    of the warm-up, and the interval doubles after every fourth renewal.
    """
    yield config.warmup
    point, interval = 0, config.refresh
    while interval and config.density != 1:
        for _ in range(_RENEWALS_PER_INTERVAL):
            point += interval
            if point > config.warmup:
                yield point
        interval *= 2


def sliced_stretches(config: GlassConfig, tokens: int) -> list[tuple[int, int]]:
    """List the stretches of a generation that are decoded on slices.

    Between two stretches, when the text is read again, one token is computed densely.

    Args:
        config: the configuration, with its warm-up and refresh.
        tokens: the number of generated tokens.

    Returns:
        For each selection, the numbers of generated tokens at which its stretch starts and stops.
    """
    points, stretches = selection_points(config), []
    start = next(points)
    while start < tokens:
        stop = min(next(points, tokens), tokens)
        stretches.append((start, stop))
        start = stop + 1
    return stretches


def all_selection_points(configs: Iterable[GlassConfig], tokens: int) -> list[int]:
    """List the numbers of generated tokens after which at least one configuration selects."""
    return sorted({start for config in configs for start, _ in sliced_stretches(config, tokens)})
