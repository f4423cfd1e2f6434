"""The user's settings for slicing."""

from dataclasses import dataclass, field, fields
from typing import Literal

from glass_mlx.models import DOWN_POLICIES, default_down_policy
from glass_mlx.ranking import check_prior_weight
from glass_mlx.statistics import STATISTICS

AUTO = "auto"


def check_density(density: float) -> None:
    """Raise ValueError unless a density is in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"the density must be above 0 and at most 1, not {density}")


def check_max_kl(max_kl: float) -> None:
    """Raise ValueError unless a bound on the KL divergence is positive and finite."""
    if not 0 < max_kl < float("inf"):
        raise ValueError(f"the bound on KL must be positive, not {max_kl}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless MLX and numpy accept a seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be from 0 to 2^64 - 1, not {seed}")


@dataclass(frozen=True)
class GlassConfig:
    """How the FFNs of a model are sliced in one generation.

    docs/experiments.md has the measurements behind the defaults.

    Attributes:
        density: share of the neurons of each FFN to keep, in (0, 1]. Counts are rounded to
            multiples that suit the kernels. "auto" means the lowest density that is expected to
            stay within `max_kl`.
        max_kl: bound on the KL divergence from the dense model, in nats per token, for "auto".
        prior_weight: λ in [0, 1], the weight of the prior's ranks against the local ranks.
        warmup: number of tokens that are generated densely before the first selection, at least 1.
        refresh: number of tokens after which the dense model first reads the text again and the
            selection is renewed; see `renewal.selection_points`. At least 2, or 0 for never.
        statistic: the statistic that ranks neurons locally, a key of `statistics.STATISTICS`.
        prior_statistic: the statistic of the prior that ranks neurons. The prior must have it.
        uniform: whether to keep the same share in every FFN, and to ignore the FFNs that the prior
            marks as better kept dense.
        down_policy: how a quantized down projection is sliced, a key of `models.DOWN_POLICIES`.
            Default: `models.default_down_policy`.

    Raises:
        ValueError: for the first value that is out of range.
    """

    density: float | Literal["auto"] = 0.5
    max_kl: float | None = None
    prior_weight: float = 0.45
    warmup: int = 16
    refresh: int = 32
    statistic: str = "griffin"
    prior_statistic: str = "griffin"
    uniform: bool = False
    down_policy: str = field(default_factory=default_down_policy)

    def __post_init__(self) -> None:
        """Check every value."""
        if self.density != AUTO:
            if isinstance(self.density, str):
                raise ValueError(f"the density must be a number or {AUTO!r}, not {self.density!r}")
            check_density(self.density)
        check_prior_weight(self.prior_weight)
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic {self.statistic!r} is not one of {', '.join(STATISTICS)}")
        if self.warmup < 1:
            raise ValueError(f"the warm-up must be at least 1 token, not {self.warmup}")
        if self.refresh < 0 or self.refresh == 1:
            raise ValueError(
                f"the refresh must be at least 2 tokens, or 0 for never, not {self.refresh}"
            )
        if self.down_policy not in DOWN_POLICIES:
            raise ValueError(
                f"down policy {self.down_policy!r} is not one of {', '.join(DOWN_POLICIES)}"
            )
        if (self.density == AUTO) != (self.max_kl is not None):
            raise ValueError(
                "the density auto and a bound on KL (--max-kl, max_kl) go together; "
                "give both or none"
            )
        if self.max_kl is not None:
            check_max_kl(self.max_kl)


CONFIG_FIELDS = tuple(f.name for f in fields(GlassConfig))
