"""How many neurons each FFN keeps, and which: from local statistics and the prior."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from glass_mlx.config import GlassConfig, check_density
from glass_mlx.prior.density_curve import expected_density, unmeasured_conditions
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.ranking import fuse, ranks
from glass_mlx.statistics import LocalStatistics

import numpy as np


@dataclass(frozen=True)
class Selection:
    """The kept neurons of every FFN.

    Attributes:
        indices: sorted neuron indices, (k,) int32, by the FFN's path in the model.
        widths: the number of neurons m of each FFN.
    """

    indices: dict[str, np.ndarray]
    widths: dict[str, int]

    @property
    def density(self) -> float:
        """The share of all neurons that is kept."""
        return sum(map(len, self.indices.values())) / sum(self.widths.values())


def neurons_to_keep(width: int, density: float, multiple: int = 1) -> int:
    """Return the number of neurons that an FFN keeps.

    Args:
        width: the FFN's number of neurons m.
        density: the share to keep, in (0, 1].
        multiple: the multiple that the number is rounded to, unless all neurons are kept.

    Returns:
        k, between min(multiple, m) and m.

    Raises:
        ValueError: if `density` is outside (0, 1].
    """
    check_density(density)
    kept = multiple * max(1, round(density * width / multiple))
    return width if density == 1 else min(kept, width)


def densities(
    widths: Mapping[str, int], density: float, kept_dense: Collection[str]
) -> dict[str, float]:
    """Distribute a density over FFNs: some stay dense, and the others share the rest equally.

    Args:
        widths: the number of neurons m of each FFN.
        density: the share of all neurons to keep, in (0, 1].
        kept_dense: the FFNs that keep all their neurons. If this would leave less than half of
            `density` for the others, all FFNs get `density`.

    Returns:
        The density of each FFN.
    """
    share = sum(widths[path] for path in kept_dense) / sum(widths.values())
    rest = (density - share) / (1 - share) if share < 1 else 0.0
    if rest < density / 2:
        return dict.fromkeys(widths, density)
    return {path: 1.0 if path in kept_dense else rest for path in widths}


def select(
    scores: Mapping[str, np.ndarray],
    density: float,
    multiples: Mapping[str, int],
    kept_dense: Collection[str] = (),
) -> Selection:
    """Keep the neurons with the largest scores.

    Args:
        scores: (m,) importance of each neuron, by FFN.
        density: the share to keep, in (0, 1].
        multiples: the multiple that each FFN's number of kept neurons is rounded to; see
            `neurons_to_keep`.
        kept_dense: FFNs that keep all their neurons at the others' expense; see `densities`.

    Returns:
        The selection. Among equal scores the first neuron is kept.
    """
    widths = {path: len(values) for path, values in scores.items()}
    indices = {}
    for path, share in densities(widths, density, kept_dense).items():
        kept = neurons_to_keep(widths[path], share, multiples[path])
        order = np.argsort(-scores[path], kind="stable")
        indices[path] = np.sort(order[:kept]).astype(np.int32)
    return Selection(indices, widths)


def jaccard(a: Selection, b: Selection) -> dict[str, float]:
    """Return the Jaccard index of two selections by FFN: intersection over union."""
    return {
        path: len(shared := np.intersect1d(kept, b.indices[path]))
        / (len(kept) + len(b.indices[path]) - len(shared))
        for path, kept in a.indices.items()
    }


class Selector:
    """The choice of the neurons to keep, from local statistics and a prior.

    Args:
        config: how neurons are ranked and how many are kept.
        multiples: the multiple that each FFN's number of kept neurons is rounded to, by path.
        prior: the model's prior, or None to select from the local statistics alone.
        weights: the number format of the FFNs' weights, for `unmeasured`.

    Attributes:
        config: the configuration, with a number in place of the density "auto".
        density: the share of neurons to keep.
        prior: the model's prior, or None.
        max_kl: the bound that the density "auto" is expected to stay within, or None.
        unmeasured: the conditions under which this was not measured; see `unmeasured_conditions`.

    Raises:
        ValueError: if the prior lacks the statistic that the configuration names, or the density
            curve that the density "auto" needs.
    """

    def __init__(
        self,
        config: GlassConfig,
        multiples: Mapping[str, int],
        prior: GlobalPrior | None,
        weights: str,
    ) -> None:
        if prior is not None and config.prior_statistic not in prior.scores:
            raise ValueError(
                f"the prior {prior.source} has no statistic {config.prior_statistic!r}; it has "
                f"{', '.join(prior.scores)}"
            )
        self.max_kl, self.unmeasured = config.max_kl, ""
        if isinstance(config.density, str):
            assert config.max_kl is not None
            self.density = expected_density(prior, config.max_kl)
            assert prior is not None
            self.unmeasured = unmeasured_conditions(prior, config, weights)
        else:
            self.density = config.density
        self.config, self.prior = replace(config, density=self.density, max_kl=None), prior
        self._multiples = multiples
        self._kept_dense = prior.kept_dense if prior and not config.uniform else ()

    def prior_weight(self, local: LocalStatistics) -> float:
        """Return the λ in use: 1 if at most one token was read, and 0 without a prior."""
        if self.prior is None:
            return 0.0
        return 1.0 if local.basis.tokens <= 1 else self.config.prior_weight

    def fuse(self, local: LocalStatistics) -> dict[str, np.ndarray]:
        """Return the fused scores (m,) of each FFN's neurons."""
        scores = local.basis.scores(self.config.statistic)
        local_ranks = {path: ranks(values) for path, values in scores.items()}
        if self.prior is None:
            return local_ranks
        prior_ranks = self.prior.ranks(self.config.prior_statistic)
        weight = self.prior_weight(local)
        return {path: fuse(r, prior_ranks[path], weight) for path, r in local_ranks.items()}

    def select(self, local: LocalStatistics) -> Selection:
        """Choose the neurons to keep."""
        return select(self.fuse(local), self.density, self._multiples, self._kept_dense)
