"""When neurons are selected and the selection renewed."""

from itertools import islice

from glass_mlx.config import GlassConfig
from glass_mlx.renewal import selection_points


def test_intervals_between_renewals_grow():
    assert list(islice(selection_points(GlassConfig()), 12)) == [
        *(16, 32, 64, 96, 128),
        *(192, 256, 320, 384),
        *(512, 640, 768),
    ]
    assert list(islice(selection_points(GlassConfig(warmup=40)), 3)) == [40, 64, 96]
    assert list(selection_points(GlassConfig(refresh=0))) == [16]
    assert list(selection_points(GlassConfig(density=1.0))) == [16]
