"""When a model is sliced anew, and which tokens are dense."""

import math
from itertools import islice

from glass_mlx.config import GlassConfig
from glass_mlx.renewal import is_dense_token, stretches


def starts(config, count=99):
    return [start for start, _ in islice(stretches(config, math.inf), count)]


def test_intervals_between_renewals_grow():
    assert starts(GlassConfig(), 12) == [
        *(16, 32, 64, 96, 128),
        *(192, 256, 320, 384),
        *(512, 640, 768),
    ]
    assert starts(GlassConfig(warmup=40), 3) == [40, 64, 96]
    assert starts(GlassConfig(refresh=0)) == [16]
    assert starts(GlassConfig(density=1.0, vocabulary=1.0)) == [16]
    assert starts(GlassConfig(density=1.0, vocabulary=0.5), 2) == [16, 32]


def test_stretches_cover_all_tokens_after_the_warmup():
    config = GlassConfig(warmup=3, refresh=4)
    # Renewals at 4, 8, 12, 16, then every 8: 24, 32, 40, 48, then every 16.
    expected = [(3, 4), (4, 8), (8, 12), (12, 16), (16, 24), (24, 30)]
    assert [*stretches(config, 30)] == expected
    assert [*stretches(GlassConfig(warmup=1, refresh=0), 30)] == [(1, 30)]
    assert [*stretches(GlassConfig(warmup=16, refresh=4), 24)] == [(16, 24)]
    assert [*stretches(config, 3)] == []
    assert [*stretches(config, 4)] == [(3, 4)]
    assert [*stretches(GlassConfig(refresh=0), math.inf)] == [(16, math.inf)]


def test_dense_tokens_follow_the_warmup_at_equal_distances():
    config = GlassConfig(max_kl=0.1, warmup=3, dense_every=4)
    assert [n for n in range(4, 20) if is_dense_token(config, n)] == [7, 11, 15, 19]
    whole = GlassConfig(density=1.0, vocabulary=1.0)
    for other in (GlassConfig(max_kl=0.1, dense_every=0), whole, GlassConfig(max_kl=0.0)):
        assert not any(is_dense_token(other, n) for n in range(17, 99))
