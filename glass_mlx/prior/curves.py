"""KL divergence from the dense model by the density of the FFNs, measured for one model.

Calibration measures it (`calibration.curves`). A prior's `about["curves"]` lists the records of
measurements, each with the conditions that it holds for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from glass_mlx.config import GlassConfig

# The settings on which KL depends in addition to the shares.
_SETTINGS = (
    "prior_weight",
    "warmup",
    "dense_every",
    "refresh",
    "statistic",
    "prior_statistic",
    "uniform",
)


@dataclass(frozen=True)
class Curve:
    """KL by the share of neurons that is kept. At a share of 1 it is 0.

    Attributes:
        shares: the measured shares, increasing, in (0, 1).
        kl: the mean KL in nats per token for each of them.
        standard_error: the standard error of each mean over texts; 0 where it is not known.
    """

    shares: tuple[float, ...]
    kl: tuple[float, ...]
    standard_error: tuple[float, ...]

    @staticmethod
    def parse(record: Mapping[str, Any]) -> "Curve":
        """Return the curve of a record.

        Raises:
            ValueError: if it has none.
        """
        curve = record.get("density")
        if not isinstance(curve, dict) or not isinstance(record.get("conditions"), dict):
            raise ValueError("it has no curve of the density, or no conditions")
        shares, kl = curve.get("shares"), curve.get("kl")
        if (
            not isinstance(shares, list)
            or not isinstance(kl, list)
            or not isinstance(error := curve.get("standard_error", [0.0] * len(kl)), list)
            or not len(shares) == len(kl) == len(error) > 0
            or not all(isinstance(v, int | float) and v >= 0 for v in (*shares, *kl, *error))
            or not all(a < b for a, b in pairwise([0, *shares, 1]))
        ):
            raise ValueError("the curve is malformed")
        return Curve(tuple(map(float, shares)), tuple(map(float, kl)), tuple(map(float, error)))

    def kl_at(self, share: float) -> float:
        """Return an upper estimate of KL at a share: the mean plus a standard error.

        A mean over few texts is as often too low as too high, so a bound on it would be exceeded
        for every other model. Between two measured shares, the logarithm of KL is linear in the
        logarithm of the share that is dropped. Above the largest measured share it stays the same
        up to 1, because quantizing a slice again costs something however little is dropped. Below
        the smallest measured share it is not known: infinite.
        """
        if share >= 1:
            return 0.0
        if share < self.shares[0]:
            return math.inf
        for (low, low_kl), (high, high_kl) in pairwise(self._points):
            if share <= high:
                part = math.log((1 - share) / (1 - high)) / math.log((1 - low) / (1 - high))
                return float(high_kl * (low_kl / high_kl) ** part)
        return self._points[-1][1]

    def share_for(self, max_kl: float) -> float:
        """Return the smallest share whose KL is within a bound, to one part in 10^4."""
        low, high = self.shares[0], 1.0
        if self.kl_at(low) <= max_kl:
            return low
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if self.kl_at(middle) <= max_kl else (middle, high)
        return high

    @cached_property
    def _points(self) -> list[tuple[float, float]]:
        """Shares and KL, without the noise by which a larger share has more of it, and above 0."""
        upper = [kl + error for kl, error in zip(self.kl, self.standard_error, strict=True)]
        falling = accumulate((max(kl, 1e-9) for kl in reversed(upper)), max)
        return [*zip(reversed(self.shares), falling, strict=True)][::-1]


def conditions(config: GlassConfig, weights: str) -> dict[str, Any]:
    """Return the conditions of a measurement, on which its KL depends.

    Args:
        config: the settings.
        weights: the number format of the weights, and how they are sliced.
    """
    return {"weights": weights} | {name: getattr(config, name) for name in _SETTINGS}
