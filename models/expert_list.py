"""Routed experts in a list: as many FFNs, each of which computes one token at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .down import MeanCompensation
from .ffn import FFN
from .modules import with_modules


@dataclass(eq=False)
class ExpertList(FFN):
    """Routed experts in a list, with the same interface as a stack.

    Attributes:
        ffns: the experts' FFNs. What is said of the class `FFN` holds for the first of them.
        modules: the experts' modules.
        per_token: the number of experts for each token.
    """

    ffns: list[FFN] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    per_token: int = 0

    @staticmethod
    def of(path: str, ffns: list[FFN], modules: list[nn.Module], per_token: int) -> "ExpertList":
        """Return the site of a list at a path in the model; see the attributes."""
        first = ffns[0]
        return ExpertList(
            path, first.expand, first.contract, first.layout, ffns, modules, per_token
        )

    @property
    def experts(self) -> int | None:
        """The number of experts."""
        return len(self.ffns)

    @property
    def members(self) -> list[FFN]:
        """The FFNs of the experts."""
        return self.ffns

    @property
    def block_path(self) -> str:
        """The path of the module that computes the experts of its tokens."""
        return self.path.rpartition(".")[0]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The projections of all experts by their paths in the list."""
        return {
            f"{n}.{name}": layer
            for n, ffn in enumerate(self.ffns)
            for name, layer in ffn.layers.items()
        }

    def neuron_bytes(self, policy: str) -> int:
        """Return the bytes of weights of all neurons; see `FFN.neuron_bytes`."""
        return sum(ffn.neuron_bytes(policy) for ffn in self.ffns)

    def copied_bytes(self, policy: str) -> int:
        """Return the bytes of the transposed copies; see `FFN.copied_bytes`."""
        return sum(ffn.copied_bytes(policy) for ffn in self.ffns)

    def sliced(self, indices: np.ndarray, policy: str) -> dict[str, nn.Module]:
        """Return modules that compute only some neurons, to replace the experts; see `FFN.sliced`.

        Args:
            indices: (experts, k) neurons to keep, strictly increasing.
            policy: see `FFN.sliced`.
        """
        if indices.shape == self.shape:
            return {}
        members = zip(self.modules, self.ffns, indices, strict=True)
        return {
            str(n): with_modules(module, {"": ffn.sliced(kept, policy)})
            for n, (module, ffn, kept) in enumerate(members)
        }

    def move(
        self, parts: Mapping[str, nn.Module], before: np.ndarray, indices: np.ndarray
    ) -> np.ndarray:
        """Replace some neurons of a slice in place; see `FFN.move`."""
        return np.stack(
            [
                ffn.move(self._projections(parts, n), before[n], indices[n])
                for n, ffn in enumerate(self.ffns)
            ]
        )

    def compensate(
        self,
        parts: Mapping[str, nn.Module],
        kept: np.ndarray,
        means: MeanCompensation,
        changed: np.ndarray | None = None,
    ) -> None:
        """Replace the dropped neurons by constants; see `FFN.compensate`."""
        for n in range(len(self.ffns)) if changed is None else changed:
            own = MeanCompensation(means.inputs[int(n)], None, means.dtype)
            self.ffns[n].compensate(self._projections(parts, n), kept[n], own)

    def drop_copies(self) -> None:
        """Free the transposed copies; see `FFN.drop_copies`."""
        for ffn in self.ffns:
            ffn.drop_copies()

    def release(self, fresh: FFN) -> None:
        """Free the dense weights; see `FFN.release`."""
        for ffn, other in zip(self.ffns, fresh.members, strict=True):
            ffn.release(other)

    def _projections(self, parts: Mapping[str, nn.Module], number: int) -> dict[str, nn.Module]:
        """Return an expert's sliced projections by name."""
        return {name: parts[str(number)][name] for name in self.ffns[number].layers}


class ExpertCalls:
    """The hidden vectors of the experts in a list, in the order of the calls.

    A block computes its tokens one after the other, and each with as many experts, so the number of
    a call tells the token.

    Args:
        per_token: the number of experts for each token.
    """

    def __init__(self, per_token: int) -> None:
        self._per_token, self._count = per_token, 0
        self._experts: list[int] = []
        self._hidden: list[mx.array] = []

    def begin(self, x: mx.array) -> None:
        """Begin a call of the block with tokens (..., hidden)."""
        self._count = math.prod(x.shape[:-1])
        self._experts, self._hidden = [], []

    def add(self, expert: int, hidden: mx.array) -> None:
        """Add the hidden vector (m,) of an expert."""
        self._experts.append(expert)
        self._hidden.append(hidden)

    def end(self) -> tuple[mx.array, mx.array, mx.array, int]:
        """Return the hidden vectors (R, m), their experts and tokens (R,), and the tokens' count.

        Raises:
            ValueError: if the block did not call the experts as expected.
        """
        if len(self._experts) != self._count * self._per_token:
            raise ValueError("this model does not call its experts token by token")
        tokens = mx.arange(len(self._experts)) // self._per_token
        return mx.stack(self._hidden), mx.array(self._experts), tokens, self._count


def experts_per_token(block: nn.Module, name: str, experts: list[FFN], x: mx.array) -> int | None:
    """Find how many experts in a list a block calls for each token, by calling it.

    Args:
        block: a module with a list of experts.
        name: the name of the list.
        experts: the FFNs of the experts.
        x: (1, T, hidden) tokens.

    Returns:
        The number, or None unless the block calls the experts token by token, on a token's experts
        alone and with as many for each token.
    """
    calls: list[tuple[int, int]] = []
    recorders = {f"{name}.{n}": _Recorder(n, ffn, calls) for n, ffn in enumerate(experts)}
    changed = with_modules(block, {name: {str(n): r for n, r in enumerate(recorders.values())}})
    changed._training = False
    by_token = []
    try:
        for token in range(x.shape[1]):
            calls.clear()
            changed(x[:, token : token + 1])
            by_token.append([*calls])
        calls.clear()
        changed(x)
    except Exception:  # a module that is not a mixture can fail in any way
        return None
    is_expected = calls == [call for token in by_token for call in token]
    counts = {len(token) for token in by_token}
    if not is_expected or len(counts) != 1 or any(dimensions != 1 for _, dimensions in calls):
        return None
    return counts.pop() or None


class _Recorder(nn.Module):
    """An expert that records its calls and computes zeros."""

    def __init__(self, number: int, ffn: FFN, calls: list[tuple[int, int]]) -> None:
        super().__init__()
        self._number, self._ffn, self._calls = number, ffn, calls

    def __call__(self, x: mx.array) -> mx.array:
        self._calls.append((self._number, x.ndim))
        return mx.zeros((*x.shape[:-1], self._ffn.outputs))
