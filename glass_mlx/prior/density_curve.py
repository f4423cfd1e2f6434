"""The density curve of a prior: KL divergence from the dense model by density.

Calibration measures the curve (`calibration.curve`) and stores it in the prior's file. It predicts
the lowest density that stays within a bound.
"""

from glass_mlx.config import check_max_kl
from glass_mlx.prior.file import GlobalPrior

import numpy as np


def expected_density(prior: GlobalPrior | None, max_kl: float) -> float:
    """Return the lowest density that is expected to stay within a KL divergence.

    Args:
        prior: the model's prior, with a curve.
        max_kl: the bound, in nats per token.

    Returns:
        A density, at least the lowest measured one. Between the measured densities, and from the
        highest of them to density 1, where KL is 0, the curve is linear.

    Raises:
        ValueError: if the bound is not positive, or there is no curve.
    """
    check_max_kl(max_kl)
    curve = None if prior is None else prior.about.get("curve")
    if curve is None:
        raise ValueError(
            "the density auto needs a prior with a density curve, which this prior lacks; build "
            "the prior again, or give a density"
        )
    densities = np.array([*curve["densities"], 1.0])
    # If a higher density has a higher KL, that is noise: the expectation never rises.
    kl = np.maximum.accumulate(np.array([*curve["kl"], 0.0])[::-1])[::-1]
    within = int(np.argmax(kl <= max_kl))
    if within == 0:
        return float(densities[0])
    low, high = within - 1, within
    share = (kl[low] - max_kl) / (kl[low] - kl[high])
    return float(densities[low] + share * (densities[high] - densities[low]))
