"""A bound on KL divergence, spent on what saves the most bytes."""

from dataclasses import dataclass

from glass_mlx.config import Shares
from glass_mlx.prior.curves import Curves

import numpy as np

# The shares of the vocabulary that are tried are multiples of this.
_STEP = 1 / 64


@dataclass(frozen=True)
class Budget:
    """A bound on KL, and how it is spent.

    Attributes:
        max_kl: the bound, in nats per token.
        shares: how much of the model is kept.
        density_kl: what the dropped neurons are expected to cost, in nats per token.
        vocabulary_kl: what the tokens outside the shortlist may cost, in nats per token.
    """

    max_kl: float
    shares: Shares
    density_kl: float
    vocabulary_kl: float


def spend(max_kl: float, curves: Curves, neuron_bytes: float, head_bytes: float) -> Budget:
    """Find the shares that read the fewest bytes within a bound on KL.

    Args:
        max_kl: the bound, in nats per token.
        curves: KL by share. No share is below the smallest measured one.
        neuron_bytes: the bytes of weights that a density of 0 would save.
        head_bytes: the bytes of the output head.
    """
    candidates = []
    for vocabulary in np.arange(1, 0, -_STEP):
        cost = 0.0
        if vocabulary < 1:
            if curves.vocabulary is None:
                break
            cost = curves.vocabulary.kl_at(float(vocabulary))
        if cost > max_kl:
            break
        density = curves.density.share_for(max_kl - cost)
        read = density * neuron_bytes + vocabulary * head_bytes
        candidates.append((read, Shares(density, float(vocabulary))))
    _, shares = min(candidates, key=lambda candidate: candidate[0])
    density_kl = curves.density.kl_at(shares.density)
    return Budget(max_kl, shares, density_kl, max_kl - density_kl)
