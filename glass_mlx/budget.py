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
    for vocabulary in [1.0] if curves.vocabulary is None else np.arange(1, 0, -_STEP).tolist():
        cost = 0.0 if curves.vocabulary is None else curves.vocabulary.kl_at(vocabulary)
        if cost > max_kl:
            break
        candidates.append(Shares(curves.density.share_for(max_kl - cost), vocabulary))
    shares = min(candidates, key=lambda s: s.density * neuron_bytes + s.vocabulary * head_bytes)
    density_kl = curves.density.kl_at(shares.density)
    return Budget(max_kl, shares, density_kl, max_kl - density_kl)
