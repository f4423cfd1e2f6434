"""The user's settings for slicing."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from glass_mlx.models import DOWN_POLICIES, default_down_policy
from glass_mlx.ranking import check_prior_weight
from glass_mlx.statistics import STATISTICS

# The KL divergence from the dense model that is accepted by default, in nats per token: none.
DEFAULT_MAX_KL = 0.0

# By default, the selection is first renewed after this many tokens.
DEFAULT_REFRESH = 32

# Drafts begin after this many tokens, in the warm-up. Where the text is the dense model's own, that
# is the whole warm-up, and renewals move only rows of the head, so there are more of them.
DRAFT_WARMUP, EXACT_REFRESH = 4, 16


class Shares(NamedTuple):
    """How much of a model is kept.

    Attributes:
        density: the share of the neurons of all FFNs, in (0, 1].
        vocabulary: the share of the rows of the output head, in (0, 1].
    """

    density: float = 1.0
    vocabulary: float = 1.0


class Setting(NamedTuple):
    """How much of a model is kept: a bound on KL, or shares; see `GlassConfig`."""

    max_kl: float | None = None
    density: float | None = None
    vocabulary: float | None = None

    @property
    def flags(self) -> str:
        """The flags of commands that stand for the setting, such as `--max-kl 0.1`."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())


def check_density(density: float) -> None:
    """Raise ValueError unless a density is in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"the density must be above 0 and at most 1, not {density}")


def check_vocabulary(share: float) -> None:
    """Raise ValueError unless a share of the vocabulary is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of the vocabulary must be above 0 and at most 1, not {share}")


def check_max_kl(max_kl: float) -> None:
    """Raise ValueError unless a bound on the KL divergence is at least 0 and finite."""
    if not 0 <= max_kl < float("inf"):
        raise ValueError(f"the bound on KL must be at least 0 and finite, not {max_kl}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless MLX and numpy accept a seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be from 0 to 2^64 - 1, not {seed}")


@dataclass(frozen=True)
class GlassConfig:
    """How a model is sliced in one generation.

    By default, the text is the dense model's own: all neurons are kept, and tokens that are drafted
    with a part of the output head are checked with all of it. With a bound on the KL divergence
    from the dense model, FFNs are sliced, too, to the smallest density that the bound allows. If
    `density` or `vocabulary` is given, there is no bound. Without a `vocabulary` drafts are
    checked, so that the head costs nothing of the text.

    docs/experiments.md has the measurements behind the defaults.

    Attributes:
        max_kl: bound on the expected KL divergence from the dense model, in nats per token; 0 for
            the dense model's own text. Default: `DEFAULT_MAX_KL`.
        density: share of the neurons of each FFN to keep, in (0, 1]. Counts are rounded to
            multiples that suit the kernels.
        vocabulary: share of the rows of the output head that compute each token, in (0, 1], without
            drafts and checks. Without a density, it is 1.
        prior_weight: λ in [0, 1], the weight of the prior's ranks against the local ranks.
        warmup: number of tokens that are generated densely before the first selection, at least 1.
            With a bound of 0, `DRAFT_WARMUP` if that is smaller.
        dense_every: after the warm-up, every token of this number is computed by the dense model,
            which observes it. At least 2, or 0 for none.
        refresh: number of tokens after which the selection is first renewed; see
            `renewal.stretches`. At least 2, or 0 for never. Default: `DEFAULT_REFRESH`, and more
            for mixtures of experts, see `Session.refresh`; `EXACT_REFRESH` with a bound of 0.
        statistic: the statistic that ranks neurons locally, a key of `statistics.STATISTICS`.
        prior_statistic: the statistic of the prior that ranks neurons. The prior must have it.
        uniform: whether to keep the same share in every FFN, and to ignore the FFNs that the prior
            marks as better kept dense.
        down_policy: how a quantized down projection is sliced, a key of `models.DOWN_POLICIES`.
            Default: `models.default_down_policy`.

    Raises:
        ValueError: for the first value that is out of range.
    """

    max_kl: float | None = None
    density: float | None = None
    vocabulary: float | None = None
    prior_weight: float = 0.45
    warmup: int = 16
    dense_every: int = 4
    refresh: int | None = None
    statistic: str = "griffin"
    prior_statistic: str = "griffin"
    uniform: bool = False
    down_policy: str = field(default_factory=default_down_policy)

    def __post_init__(self) -> None:
        """Check every value."""
        if self.density is not None:
            check_density(self.density)
        if self.vocabulary is not None:
            check_vocabulary(self.vocabulary)
        check_prior_weight(self.prior_weight)
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic {self.statistic!r} is not one of {', '.join(STATISTICS)}")
        if self.warmup < 1:
            raise ValueError(f"the warm-up must be at least 1 token, not {self.warmup}")
        for name, value in (("refresh", self.refresh), ("dense_every", self.dense_every)):
            if value is not None and (value < 0 or value == 1):
                raise ValueError(f"{name} must be at least 2 tokens, or 0 for never, not {value}")
        if self.down_policy not in DOWN_POLICIES:
            raise ValueError(
                f"down policy {self.down_policy!r} is not one of {', '.join(DOWN_POLICIES)}"
            )
        if self.max_kl is not None:
            check_max_kl(self.max_kl)
            if not self.has_budget:
                raise ValueError(
                    "a bound on KL (--max-kl, max_kl) decides the density, and goes with checked "
                    "drafts; give either the bound, or density and vocabulary"
                )

    @property
    def has_budget(self) -> bool:
        """Whether a bound on KL decides how much is kept."""
        return self.density is None and self.vocabulary is None

    @property
    def bound(self) -> float | None:
        """The bound on KL in nats per token, or None if shares are given."""
        if not self.has_budget:
            return None
        return DEFAULT_MAX_KL if self.max_kl is None else self.max_kl

    @property
    def is_exact(self) -> bool:
        """Whether the text is the dense model's own, with drafts that are checked."""
        return self.bound == 0 or (self.density == 1 and self.has_drafts)

    @property
    def has_drafts(self) -> bool:
        """Whether tokens are drafted with a part of the head, and checked with all of it."""
        return self.vocabulary is None

    @property
    def shares(self) -> Shares:
        """The shares to keep. Without a value they are 1."""
        return Shares(self.density or 1.0, self.vocabulary or 1.0)

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept, for every token."""
        return not self.has_budget and not self.has_drafts and self.shares == (1, 1)


CONFIG_FIELDS = tuple(f.name for f in fields(GlassConfig))
