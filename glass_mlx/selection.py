"""Which neurons of each FFN are kept."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

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


def budget(width: int, density: float, multiple: int = 1) -> int:
    """Choose how many neurons an FFN keeps.

    Args:
        width: the FFN's number of neurons m.
        density: the share asked for, in (0, 1].
        multiple: what the number is rounded to, unless all neurons are kept.

    Returns:
        k, between min(multiple, m) and m.

    Raises:
        ValueError: if `density` is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"the density must be above 0 and at most 1, not {density}")
    kept = multiple * max(1, round(density * width / multiple))
    return width if density == 1 else min(kept, width)


def densities(
    widths: Mapping[str, int], density: float, whole: Collection[str]
) -> dict[str, float]:
    """Share out a density: some FFNs stay whole, the others have the same share of their neurons.

    Args:
        widths: the number of neurons m of each FFN.
        density: the share of all neurons to keep, in (0, 1].
        whole: the FFNs to keep whole. If that left less than half of `density` for the others, all
            FFNs get `density`.

    Returns:
        The density of each FFN.
    """
    share = sum(widths[path] for path in whole) / sum(widths.values())
    rest = (density - share) / (1 - share) if share < 1 else 0.0
    if rest < density / 2:
        return dict.fromkeys(widths, density)
    return {path: 1.0 if path in whole else rest for path in widths}


def select(
    scores: Mapping[str, np.ndarray],
    density: float,
    multiples: Mapping[str, int],
    whole: Collection[str] = (),
) -> Selection:
    """Keep the neurons with the largest scores.

    Args:
        scores: (m,) importance of each neuron, by FFN.
        density: the share asked for, in (0, 1].
        multiples: what each FFN's number of kept neurons is rounded to, see `budget`.
        whole: FFNs that keep all their neurons, at the others' expense, see `densities`.

    Returns:
        The selection; of equal scores the neuron that stands first is kept.
    """
    widths = {path: len(values) for path, values in scores.items()}
    indices = {}
    for path, share in densities(widths, density, whole).items():
        kept = budget(widths[path], share, multiples[path])
        order = np.argsort(-scores[path], kind="stable")
        indices[path] = np.sort(order[:kept]).astype(np.int32)
    return Selection(indices, widths)


def jaccard(a: Selection, b: Selection) -> dict[str, float]:
    """Size of the intersection over size of the union of two selections, by FFN."""
    return {
        path: len(both := np.intersect1d(kept, b.indices[path]))
        / (len(kept) + len(b.indices[path]) - len(both))
        for path, kept in a.indices.items()
    }
