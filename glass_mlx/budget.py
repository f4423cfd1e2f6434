"""A bound on KL divergence, spent on neurons."""

from dataclasses import dataclass

from glass_mlx.prior.curves import Curve


@dataclass(frozen=True)
class Budget:
    """A bound on KL, and the density that it allows.

    Attributes:
        max_kl: the bound, in nats per token.
        density: the share of neurons that is kept.
    """

    max_kl: float
    density: float

    @staticmethod
    def spend(max_kl: float, curve: Curve) -> "Budget":
        """Find the smallest density within a bound, not below the smallest measured one.

        Args:
            max_kl: the bound, in nats per token.
            curve: KL by density.
        """
        return Budget(max_kl, curve.share_for(max_kl))
