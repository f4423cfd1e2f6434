"""Which neurons of each FFN are kept."""

from collections.abc import Mapping
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


def select(
    scores: Mapping[str, np.ndarray], density: float, multiples: Mapping[str, int]
) -> Selection:
    """Keep the neurons with the largest scores, the same share in every FFN.

    Args:
        scores: (m,) importance of each neuron, by FFN.
        density: the share asked for, in (0, 1].
        multiples: what each FFN's number of kept neurons is rounded to, see `budget`.

    Returns:
        The selection; of equal scores the neuron that stands first is kept.
    """
    indices = {
        path: np.sort(
            np.argsort(-values, kind="stable")[: budget(len(values), density, multiples[path])]
        ).astype(np.int32)
        for path, values in scores.items()
    }
    return Selection(indices, {path: len(values) for path, values in scores.items()})


def jaccard(a: Selection, b: Selection) -> dict[str, float]:
    """Size of the intersection over size of the union of two selections, by FFN."""
    return {
        path: len(both := np.intersect1d(kept, b.indices[path]))
        / (len(kept) + len(b.indices[path]) - len(both))
        for path, kept in a.indices.items()
    }
