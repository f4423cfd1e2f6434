"""What an answer reports of its slicing."""

from glass_mlx.server.usage import _digits

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("kept", "width", "digits"),
    [
        ([0, 1, 2, 3], 4, "zzzz"),
        ([1], 4, "0z00"),
        ([*range(64)], 128, "z" * 32 + "0" * 32),
        ([*range(0, 128, 2)], 128, "i" * 64),
        ([*range(100)], 100, "z" * 64),
        ([[0, 1], [2, 3]], 4, "zz0000zz"),
    ],
)
def test_shares_of_bins_are_digits(kept, width, digits):
    assert _digits(np.array(kept, np.int32), width) == digits
