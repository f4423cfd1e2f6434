"""How active each neuron of each FFN was: running sums over tokens, chunk by chunk."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

# Below this a token's hidden vector counts as zero and adds nothing.
_TINY = 1e-30


def _activation_sum(hidden: mx.array, weight: mx.array) -> mx.array:
    return weight[None] @ mx.abs(hidden)


def _griffin_sum(hidden: mx.array, weight: mx.array) -> mx.array:
    return mx.square(weight)[None] @ mx.square(hidden)


# What a chunk adds, and what the sums become in the end, given the number of tokens.
STATISTICS = {
    "activation": (_activation_sum, lambda total, tokens: total / tokens),
    "griffin": (_griffin_sum, lambda total, tokens: np.sqrt(total)),
}


class NeuronStatistics:
    """Streaming per-neuron statistics of a set of FFNs.

    With h_t in R^m the hidden vector of token t:

    - "activation" (A-GLASS, arXiv 2508.14302): mean_t |h_tj| / ||h_t||_2
    - "griffin" (GRIFFIN, arXiv 2404.01365): sqrt(sum_t (h_tj / ||h_t||_2)^2)

    Sums are float32 and lazy: evaluate `sums` after every chunk, or let the forward pass depend
    on what `update` returns.

    Args:
        widths: the number of neurons m of each FFN, by its path in the model.
        names: which statistics to keep, keys of `STATISTICS`.

    Raises:
        ValueError: for an unknown statistic.
    """

    def __init__(self, widths: Mapping[str, int], names: tuple[str, ...] = ("activation",)) -> None:
        for name in names:
            if name not in STATISTICS:
                raise ValueError(f"statistic {name!r} is not one of {', '.join(STATISTICS)}")
        self.names = names
        self.sums = {
            path: {name: mx.zeros((m,), mx.float32) for name in names} for path, m in widths.items()
        }
        self._tokens: dict[str, float | mx.array] = dict.fromkeys(widths, 0)

    def update(self, path: str, hidden: mx.array, mask: mx.array | None = None) -> list[mx.array]:
        """Add the tokens of a chunk.

        Args:
            path: the FFN.
            hidden: (..., m) hidden vectors of its tokens.
            mask: (...), 1 for tokens that count and 0 for those that do not. Default: all count.

        Returns:
            The FFN's running sums, each (m,).
        """
        hidden = hidden.reshape(-1, hidden.shape[-1]).astype(mx.float32)
        norm = mx.linalg.norm(hidden, axis=-1)
        weight = mx.where(norm > _TINY, 1 / mx.maximum(norm, _TINY), 0)
        if mask is None:
            self._tokens[path] = self._tokens[path] + hidden.shape[0]
        else:
            mask = mask.reshape(-1).astype(mx.float32)
            weight = weight * mask
            self._tokens[path] = self._tokens[path] + mask.sum()
        sums = self.sums[path]
        for name in self.names:
            sums[name] = sums[name] + STATISTICS[name][0](hidden, weight)[0]
        return list(sums.values())

    @property
    def tokens(self) -> int:
        """The number of tokens seen, by the FFN that saw most."""
        return max(int(count) for count in self._tokens.values())

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Return one statistic of every FFN, (m,) float32, larger for a more active neuron."""
        finish = STATISTICS[name][1]
        return {
            path: finish(np.array(sums[name]), max(float(self._tokens[path]), 1))
            for path, sums in self.sums.items()
        }

    def state(self) -> dict[str, np.ndarray]:
        """The running sums and counts, as named arrays that `restore` takes back."""
        sums = {
            f"{path}.{name}": np.array(total)
            for path, totals in self.sums.items()
            for name, total in totals.items()
        }
        counts = {f"{path}.tokens": np.float64(float(n)) for path, n in self._tokens.items()}
        return sums | {key: np.atleast_1d(count) for key, count in counts.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state` of the same FFNs and statistics."""
        for path, totals in self.sums.items():
            self._tokens[path] = float(state[f"{path}.tokens"][0])
            for name in totals:
                totals[name] = mx.array(state[f"{path}.{name}"])
