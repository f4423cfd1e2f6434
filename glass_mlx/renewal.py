"""When neurons are selected: once after the warm-up, and again with every renewal."""

from collections.abc import Iterable, Iterator

from glass_mlx.config import GlassConfig

# After this many renewals the interval between them doubles, because every further token adds less
# to the statistics.
_RENEWALS_PER_INTERVAL = 4


def selection_points(config: GlassConfig) -> Iterator[int]:
    """Yield the numbers of generated tokens after which neurons are selected.

    The first is the end of the warm-up. Renewals follow at multiples of `refresh`, whatever the
    warm-up is, and the interval doubles after every fourth renewal.
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

    Between two stretches one token is computed densely, when the text is read again.

    Args:
        config: the warm-up and the refresh.
        tokens: the number of tokens of the generation.

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
    """List the numbers of generated tokens after which any of some configurations selects."""
    return sorted({start for config in configs for start, _ in sliced_stretches(config, tokens)})
