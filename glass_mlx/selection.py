"""How many neurons and tokens are kept, and which: from local statistics and the prior."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from glass_mlx.budget import Budget
from glass_mlx.config import GlassConfig, check_density
from glass_mlx.draft_shortlist import DraftShortlister, HeadCost
from glass_mlx.models import membership
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.ranking import expert_prior_weights, fuse, largest, ranks
from glass_mlx.statistics import LocalStatistics
from glass_mlx.vocabulary import Shortlister, VocabularyStatistics

import numpy as np


def all_neurons(shape: tuple[int, ...]) -> np.ndarray:
    """Return the int32 indices of all neurons of an FFN, of the shape (m,) or (experts, m)."""
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


@dataclass(frozen=True)
class Selection:
    """The kept neurons of every FFN.

    Attributes:
        indices: sorted neuron indices, (k,) int32, by the FFN's path in the model; (experts, k)
            for a stack, whose experts all keep the same number of neurons.
        widths: the number of neurons m of each FFN, for a stack those of one expert.
    """

    indices: dict[str, np.ndarray]
    widths: dict[str, int]

    @staticmethod
    def everything(shapes: Mapping[str, tuple[int, ...]]) -> "Selection":
        """Return the selection of all neurons of FFNs of some shapes, (m,) or (experts, m)."""
        indices = {path: all_neurons(shape) for path, shape in shapes.items()}
        return Selection(indices, {path: shape[-1] for path, shape in shapes.items()})

    @property
    def density(self) -> float:
        """The share of all neurons that is kept."""
        kept = {path: indices.size for path, indices in self.indices.items()}
        total = {
            path: self.widths[path] * math.prod(indices.shape[:-1])
            for path, indices in self.indices.items()
        }
        return sum(kept.values()) / sum(total.values())

    def read_density(self, read_shares: Mapping[str, float]) -> float:
        """Return the share that is kept of the neurons that a token reads.

        Args:
            read_shares: the share of its experts that a token reads, by the path of each stack.
        """
        kept, total = 0.0, 0.0
        for path, indices in self.indices.items():
            read = math.prod(indices.shape[:-1]) * read_shares.get(path, 1.0)
            kept, total = kept + read * indices.shape[-1], total + read * self.widths[path]
        return kept / total


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
    sizes: Mapping[str, float], density: float, kept_dense: Collection[str]
) -> dict[str, float]:
    """Distribute a density over FFNs: some stay dense, and the others share the rest equally.

    Args:
        sizes: the number of neurons of each FFN that a token reads.
        density: the share of all these neurons to keep, in (0, 1].
        kept_dense: the FFNs that keep all their neurons. If this would leave less than half of
            `density` for the others, all FFNs get `density`.

    Returns:
        The density of each FFN.
    """
    share = sum(sizes[path] for path in kept_dense) / sum(sizes.values())
    rest = (density - share) / (1 - share) if share < 1 else 0.0
    if rest < density / 2:
        return dict.fromkeys(sizes, density)
    return {path: 1.0 if path in kept_dense else rest for path in sizes}


def select(
    scores: Mapping[str, np.ndarray],
    density: float,
    multiples: Mapping[str, int],
    kept_dense: Collection[str] = (),
    read_shares: Mapping[str, float] | None = None,
) -> Selection:
    """Keep the neurons with the largest scores.

    Args:
        scores: (..., m) importance of each neuron, by FFN.
        density: the share to keep, in (0, 1].
        multiples: the multiple that each FFN's number of kept neurons is rounded to; see
            `neurons_to_keep`.
        kept_dense: FFNs that keep all their neurons at the others' expense; see `densities`.
        read_shares: the share of its experts that a token reads, by stack. Default: all.

    Returns:
        The selection. Among equal scores the first neuron is kept.
    """
    shapes = {path: values.shape for path, values in scores.items()}
    counts = counts_to_keep(shapes, density, multiples, kept_dense, read_shares)
    return select_counts(scores, counts)


def counts_to_keep(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    multiples: Mapping[str, int],
    kept_dense: Collection[str] = (),
    read_shares: Mapping[str, float] | None = None,
    whole_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, int]:
    """Return the number of neurons that each FFN keeps, or each expert of a stack.

    Args:
        shapes: (..., m) the shape of arrays over each FFN's neurons, by path.
        density: the share to keep, in (0, 1]; see `select`, also for the other arguments.
        whole_shapes: the same for the whole model, some of whose neurons may be in other processes.
            Default: `shapes`.
    """
    read, whole = read_shares or {}, whole_shapes or shapes
    sizes = {path: math.prod(shape) * read.get(path, 1.0) for path, shape in whole.items()}
    shares = densities(sizes, density, kept_dense)
    return {
        path: neurons_to_keep(shape[-1], shares[path], multiples[path])
        for path, shape in shapes.items()
    }


def select_counts(scores: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> Selection:
    """Keep the neurons with the largest scores.

    Args:
        scores: (..., m) importance of each neuron, by FFN.
        counts: the number of neurons to keep in each FFN, or in each expert of a stack.

    Returns:
        The selection. Among equal scores the first neuron is kept.
    """
    indices = {path: largest(values, counts[path]) for path, values in scores.items()}
    return Selection(indices, {path: values.shape[-1] for path, values in scores.items()})


def jaccard(a: Selection, b: Selection) -> dict[str, float]:
    """Return the Jaccard index of two selections by FFN: intersection over union."""
    return {
        path: float(np.logical_and(*kept).sum() / np.logical_or(*kept).sum())
        for path, width in a.widths.items()
        for kept in [[membership(s.indices[path], width) for s in (a, b)]]
    }


class Selector:
    """The choice of the neurons and tokens to keep, from local statistics and a prior.

    Args:
        config: how neurons are ranked and how many are kept.
        multiples: the multiple that each FFN's number of kept neurons is rounded to, by path.
        vocabulary_size: the number of rows of the head, or 0 if it cannot be sliced.
        prior: the model's prior, or None to select from the local statistics alone.
        budget: how a bound on KL is spent. It is needed if the configuration has no shares.
        always: returns the tokens that every shortlist of a text keeps. Default: the text's own.
        read_shares: the share of its experts that a token reads, by the path of each stack.
        whole_shapes: the shapes of the whole model's FFNs; see `counts_to_keep`.

    Attributes:
        config: the configuration, with a density unless the text is the dense model's own.
        prior: the model's prior, or None.
        budget: how a bound on KL is spent, or None.
        multiples: the multiple that each FFN's number of kept neurons is rounded to, by path.
        read_shares: see above.
        is_exact: whether the text is the dense model's own, so that nothing is chosen here but the
            tokens of drafts.

    Raises:
        ValueError: if the prior lacks the statistic that the configuration names.
    """

    def __init__(
        self,
        config: GlassConfig,
        multiples: Mapping[str, int],
        vocabulary_size: int,
        prior: GlobalPrior | None,
        budget: Budget | None = None,
        always: Callable[[Sequence[int]], Collection[int]] = frozenset,
        read_shares: Mapping[str, float] | None = None,
        whole_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        if prior is not None and config.prior_statistic not in prior.scores:
            raise ValueError(
                f"the prior {prior.source} has no statistic {config.prior_statistic!r}; it has "
                f"{', '.join(prior.scores)}"
            )
        self.is_exact = config.is_exact
        if config.has_budget and budget is None and not self.is_exact:
            raise ValueError("without a measured curve, give a density")
        self.budget = budget if config.has_budget else None
        if self.is_exact:
            self.budget = Budget(0.0, 1.0)
        density = config.shares.density if self.budget is None else self.budget.density
        if self.is_exact:
            self.config = replace(config, max_kl=0.0, density=None)
        elif config.has_drafts or vocabulary_size:
            self.config = replace(config, max_kl=None, density=density)
        else:
            self.config = replace(config, density=density, vocabulary=1.0)
        self.prior = prior
        self.multiples, self._always = multiples, always
        self.read_shares, self._whole_shapes = read_shares or {}, whole_shapes
        self._kept_dense = prior.kept_dense if prior and not config.uniform else ()

    def shortlister(self, statistics: VocabularyStatistics) -> Shortlister | None:
        """Return what chooses the shortlists of a generation without drafts; None for none."""
        share = self.config.shares.vocabulary
        if share == 1:
            return None
        prior = None if self.prior is None else self.prior.vocabulary
        return Shortlister(statistics, share, prior, self._always)

    def draft_shortlister(
        self, statistics: VocabularyStatistics, size: int, head: HeadCost
    ) -> DraftShortlister:
        """Return what chooses the shortlists of drafts.

        Args:
            statistics: the local statistics, to which predictions are added.
            size: the number of tokens.
            head: what the whole head costs.
        """
        prior = None if self.prior is None else self.prior.vocabulary
        return DraftShortlister(statistics, prior, self._always, size, head)

    def prior_weight(self, local: LocalStatistics) -> float:
        """Return the λ in use: 1 if at most one token was read, and 0 without a prior.

        Experts have their own; see `ranking.expert_prior_weights`.
        """
        if self.prior is None:
            return 0.0
        return 1.0 if local.basis.tokens <= 1 else self.config.prior_weight

    def fuse(self, local: LocalStatistics) -> dict[str, np.ndarray]:
        """Return the fused scores (..., m) of each FFN's neurons."""
        scores = local.scores(self.config.statistic)
        local_ranks = {path: ranks(values) for path, values in scores.items()}
        if self.prior is None:
            return local_ranks
        prior_ranks = self.prior.ranks(self.config.prior_statistic)
        return {
            path: fuse(r, prior_ranks[path], self._prior_weight_of(path, local))
            for path, r in local_ranks.items()
        }

    def _prior_weight_of(self, path: str, local: LocalStatistics) -> float | np.ndarray:
        """Return the λ of an FFN, or that of each expert of a stack, (experts, 1)."""
        tokens = local.routed(path)
        if tokens is None or self.prior is None:
            return self.prior_weight(local)
        prior_tokens = self.prior.routed.get(path)
        return expert_prior_weights(self.config.prior_weight, tokens, prior_tokens)[:, None]

    def select(self, local: LocalStatistics) -> Selection:
        """Choose the neurons to keep."""
        scores = self.fuse(local)
        return select_counts(scores, self.counts({p: s.shape for p, s in scores.items()}))

    def counts(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the number of neurons that FFNs of some shapes keep; see `counts_to_keep`."""
        return counts_to_keep(
            shapes,
            self.config.shares.density,
            self.multiples,
            self._kept_dense,
            self.read_shares,
            self._whole_shapes,
        )
