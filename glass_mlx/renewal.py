"""The schedule of a generation: when the model is sliced anew, and which tokens are dense."""

from collections.abc import Iterator

from glass_mlx.config import DEFAULT_REFRESH, GlassConfig

# After this many renewals the interval between them doubles, because each additional token changes
# the statistics less.
_RENEWALS_PER_INTERVAL = 4


def stretches(config: GlassConfig, tokens: float) -> Iterator[tuple[int, float]]:
    """Yield the stretches of a generation from one selection to the next.

    The first stretch starts at the end of the warm-up. Renewals follow at multiples of `refresh`,
    regardless of the warm-up, and the interval doubles after every fourth renewal.

    Args:
        config: the configuration, with its warm-up and refresh.
        tokens: the number of tokens to generate, or infinity.

    Yields:
        The numbers of generated tokens at which a stretch starts and stops.
    """
    start, renewals = config.warmup, _renewals(config)
    while start < tokens:
        stop = next((point for point in renewals if point > start), tokens)
        yield start, min(stop, tokens)
        if stop >= tokens:
            return
        start = int(stop)


def _renewals(config: GlassConfig) -> Iterator[int]:
    """Yield the numbers of generated tokens after which the selection is renewed."""
    point, interval = 0, DEFAULT_REFRESH if config.refresh is None else config.refresh
    while interval and not config.is_dense:
        for _ in range(_RENEWALS_PER_INTERVAL):
            point += interval
            yield point
        interval *= 2


def is_dense_token(config: GlassConfig, number: int) -> bool:
    """Return whether the dense model computes a generated token after the warm-up.

    Where the text is the dense model's own, no token is computed for the sake of observation.

    Args:
        config: the configuration, with its warm-up and `dense_every`.
        number: the number of the token, counted from 1.
    """
    after_warmup = number - config.warmup
    if config.dense_every == 0 or config.is_dense or config.is_exact:
        return False
    return after_warmup % config.dense_every == 0


def is_dense_pass(config: GlassConfig, generated: int, dense: int) -> bool:
    """Return whether the dense model computes the next pass of speculative decoding.

    A pass computes one token or several, all with one model. The dense model keeps its share of
    tokens: it computes a pass when its next token is due, and then as many fewer as came with it.
    In passes of one token these are the tokens of `is_dense_token`.

    Args:
        config: the configuration, with its warm-up and `dense_every`.
        generated: the number of tokens so far, at least the warm-up's.
        dense: how many of those after the warm-up the dense model computed.
    """
    if config.dense_every == 0 or config.is_dense:
        return False
    return (generated + 1 - config.warmup) // config.dense_every > dense
