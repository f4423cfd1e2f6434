"""The density curve of a prior: KL divergence from the dense model by density.

Calibration measures the curve (`calibration.curve`) and stores it in the prior's file. It predicts
the lowest density that stays within a bound.
"""

from typing import Any

from glass_mlx.config import GlassConfig, check_max_kl
from glass_mlx.prior.file import GlobalPrior

import numpy as np

# The settings on which KL depends in addition to the density, and their names in words.
_SETTINGS = {
    "prior_weight": "λ",
    "warmup": "warm-up",
    "refresh": "refresh",
    "statistic": "statistic",
    "prior_statistic": "prior statistic",
    "uniform": "uniform",
}


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


def conditions(config: GlassConfig, weights: str) -> dict[str, Any]:
    """Return the conditions of a measurement, on which its KL depends.

    Args:
        config: the settings.
        weights: the number format of the FFNs' weights; see `Session.weight_format`.
    """
    return {"weights": weights} | {name: getattr(config, name) for name in _SETTINGS}


def unmeasured_conditions(prior: GlobalPrior, config: GlassConfig, weights: str) -> str:
    """Say in which conditions a run differs from the measurement of the prior's density curve.

    Args:
        prior: the prior, with a curve. Curves without a record of their conditions were measured
            with the default settings.
        config: the settings of the run.
        weights: the number format of the FFNs' weights in the run.

    Returns:
        Text such as "float32 weights (here 4-bit) and λ 0.45 (here 0.6)", or "".
    """
    measured = conditions(GlassConfig(), prior.about.get("dtype", "float32"))
    measured |= prior.about["curve"].get("conditions", {})
    here = conditions(config, weights)
    differences = []
    if measured["weights"] != weights:
        differences.append(f"{measured['weights']} weights (here {weights})")
    for name, words in _SETTINGS.items():
        if measured[name] != here[name]:
            differences.append(f"{words} {measured[name]} (here {here[name]})")
    return ", ".join(differences)
