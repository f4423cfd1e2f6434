"""What is sliced, how and when: from statistics and a prior to a model with smaller FFNs."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from glass_mlx.models import DOWN_POLICIES, FFN, Rest, default_down_policy, find_ffns, with_modules
from glass_mlx.prior import GlobalPrior
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import Selection, budget, select
from glass_mlx.statistics import MEAN, STATISTICS, NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# docs/experiments.md has what these were chosen by.
DEFAULT_DENSITY = 0.5
DEFAULT_MIX = 0.45
DEFAULT_STATISTIC = "griffin"
DEFAULT_PRIOR_STATISTIC = "griffin"
DEFAULT_WARMUP = 16
DEFAULT_REFRESH = 32

# From so many generated tokens on, they and not the prompt say which neurons matter.
ENOUGH = 8

# The last FFN computes nothing for a prompt but what is watched, and so many tokens of a chunk are
# enough.
FEW = 128

# A mean over so many tokens is taken for half of what it says.
_SHRINKAGE = 16

# After as many renewals the interval between them doubles.
_SPACED_AFTER = 4

# So many threads are enough to copy as fast as a CPU's memory allows.
_THREADS = 4

# A slice is kept if as large a share of what should be in it is in it already.
_SETTLED = 0.95


@dataclass(frozen=True)
class Evidence:
    """What the dense model has seen of one generation.

    Attributes:
        prompt: the statistics of the prompt.
        text: those of the generated tokens that it has read.
    """

    prompt: NeuronStatistics
    text: NeuronStatistics

    @staticmethod
    def of(model: nn.Module, statistics: Iterable[str] = STATISTICS) -> "Evidence":
        """Nothing seen yet, of a model's FFNs, by some statistics."""
        widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
        names = tuple(statistics)
        return Evidence(NeuronStatistics(widths, names), NeuronStatistics(widths, (*names, MEAN)))

    def copy(self) -> "Evidence":
        """Return what has been seen so far, which later updates do not change."""
        return Evidence(self.prompt.copy(), self.text.copy())

    @property
    def generated(self) -> bool:
        """Whether enough was generated to go by that, and no longer by the prompt."""
        return self.text.tokens >= ENOUGH

    @property
    def local(self) -> NeuronStatistics:
        """What the local ranking is made of."""
        return self.text if self.generated else self.prompt

    def stand_ins(self) -> dict[str, Rest]:
        """What dropped neurons are taken to be, by FFN: their mean over the text.

        Means of few tokens are drawn towards zero. Empty while there is little text.
        """
        if not self.generated:
            return {}
        trust = self.text.tokens / (self.text.tokens + _SHRINKAGE)
        # Down is linear: the mean of its outputs is its output for the means.
        outputs, dtype = self.text.mean_outputs(), self.text.dtype
        return {
            path: Rest(
                mx.array(mean * trust).astype(dtype),
                (outputs[path] * trust).astype(dtype) if path in outputs else None,
            )
            for path, mean in self.text.scores(MEAN).items()
        }


@dataclass(frozen=True)
class Slicing:
    """How the FFNs of a model are sliced in one generation.

    Attributes:
        density: share of the neurons to keep, in (0, 1].
        mix: λ in [0, 1], the weight of the prior's ranking against that of the tokens read.
        statistic: what the tokens that were read rank neurons by, a key of `STATISTICS`.
        prior_statistic: what the prior ranks them by.
        prior: the model's prior, or None to select by the tokens alone.
        budgets: whether the FFNs that the prior says so of are kept whole at the others' expense.
        warmup: how many tokens are generated densely before the first selection, at least 1.
        refresh: after how many tokens the selection is renewed, at least 2; 0 for never.
        down_policy: how quantized down projections are sliced, a key of `DOWN_POLICIES`.
    """

    density: float = DEFAULT_DENSITY
    mix: float = DEFAULT_MIX
    statistic: str = DEFAULT_STATISTIC
    prior_statistic: str = DEFAULT_PRIOR_STATISTIC
    prior: GlobalPrior | None = None
    budgets: bool = True
    warmup: int = DEFAULT_WARMUP
    refresh: int = DEFAULT_REFRESH
    down_policy: str = field(default_factory=default_down_policy)

    def check(self) -> None:
        """Raise ValueError for the first value that is out of range."""
        budget(1, self.density)
        fuse(np.ones(1), np.ones(1), self.mix)
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
        if self.prior is not None and self.prior_statistic not in self.prior.scores:
            raise ValueError(
                f"the prior {self.prior.source} has no statistic {self.prior_statistic!r}; it has "
                f"{', '.join(self.prior.scores)}"
            )

    def renewals(self) -> Iterator[int]:
        """The numbers of generated tokens after which the selection is made: warm-up, renewals.

        The interval is `refresh`, and doubles with every fourth renewal, as evidence grows more
        slowly. The first renewals fall on its multiples, whatever the warm-up is.
        """
        yield self.warmup
        at, interval = 0, self.refresh
        while interval and self.density < 1:
            for _ in range(_SPACED_AFTER):
                at += interval
                if at > self.warmup:
                    yield at
            interval *= 2

    def weight(self, evidence: Evidence) -> float:
        """λ as it is used: 1 where a single token was read, 0 without a prior."""
        if self.prior is None:
            return 0.0
        return 1.0 if evidence.local.tokens == 1 else self.mix

    def fused(self, evidence: Evidence) -> dict[str, np.ndarray]:
        """What neurons are chosen by, (m,) by FFN: the ranks by what was read and by the prior."""
        local = {path: ranks(v) for path, v in evidence.local.scores(self.statistic).items()}
        if self.prior is None:
            return local
        mix = self.weight(evidence)
        return {path: fuse(own, self._general[path], mix) for path, own in local.items()}

    @cached_property
    def _general(self) -> dict[str, np.ndarray]:
        """The prior's ranks."""
        return {path: ranks(v) for path, v in self.prior.scores[self.prior_statistic].items()}

    def select(self, ffns: list[FFN], evidence: Evidence) -> Selection:
        """Choose the neurons to keep by what was read and the prior."""
        multiples = {ffn.path: ffn.multiple for ffn in ffns}
        whole = self.prior.whole if self.prior and self.budgets else ()
        return select(self.fused(evidence), self.density, multiples, whole)


class Slicer:
    """Makes the sliced models of one generation, and keeps the slices that can stay.

    Args:
        model: the dense model, which is not touched, unless it is to be released.
        down_policy: a key of `DOWN_POLICIES`, for quantized down projections.
        reload: loads the model once more without evaluating its arrays. If it is given, each
            FFN's dense weights are released as soon as its slice exists; see `FFN.release`.
    """

    def __init__(
        self, model: nn.Module, down_policy: str, reload: Callable[[], nn.Module] | None = None
    ) -> None:
        self._model, self._policy, self._reload = model, down_policy, reload
        self._ffns = find_ffns(model)
        self._slices: dict[str, tuple[np.ndarray, dict[str, nn.Module]]] = {}
        self._filled = False

    def __call__(
        self, selection: Selection, stand_ins: Mapping[str, Rest] | None = None
    ) -> tuple[nn.Module, Selection]:
        """Return a model that computes the selected neurons, and the selection it really has.

        Only what changed since the call before is moved, within the slices, so that the model from
        before is not to be used any more. An FFN keeps its slice, with what stands in for the other
        neurons, if that is nearly the same; but not if these had nothing to stand in for them and
        now have.

        Args:
            selection: the neurons to keep.
            stand_ins: by FFN, what the other neurons are taken to be. Default: zero.
        """
        fresh = {ffn.path: ffn for ffn in find_ffns(self._reload())} if self._reload else {}
        fills = bool(stand_ins) and not self._filled
        self._filled |= fills
        streams = _streams()
        for start in range(0, len(self._ffns), len(streams)):
            group, made = self._ffns[start : start + len(streams)], []
            for ffn, stream in zip(group, streams, strict=False):
                with mx.stream(stream):
                    if self._slice(ffn, selection.indices[ffn.path], fills):
                        made.append(ffn)
            self._evaluate(made)
            for ffn in made:
                if ffn.path in (stand_ins or {}):
                    kept, parts = self._slices[ffn.path]
                    ffn.fill(parts, kept, stand_ins[ffn.path])
            self._evaluate(made)
            for ffn in group if fresh else ():
                if self._slices[ffn.path][1]:
                    ffn.release(fresh[ffn.path])
        slices = {path: parts for path, (_, parts) in self._slices.items()}
        indices = {path: np.sort(kept) for path, (kept, _) in self._slices.items()}
        return with_modules(self._model, slices), Selection(indices, selection.widths)

    def _slice(self, ffn: FFN, wanted: np.ndarray, fills: bool) -> bool:
        """Bring an FFN's slice up to date, lazily; return whether there was anything to do."""
        before, parts = self._slices.get(ffn.path, (None, {}))
        kept = None
        if before is not None and len(before) == len(wanted):
            if not fills and _overlap(wanted, before) >= _SETTLED:
                return False
            kept = ffn.move(parts, before, wanted) if parts else wanted
        if kept is None:
            self._slices.pop(ffn.path, None)
            del parts  # the slice from before can go
            kept, parts = wanted, ffn.sliced(wanted, self._policy)
        self._slices[ffn.path] = kept, parts
        return bool(parts)

    def _evaluate(self, ffns: list[FFN]) -> None:
        made = [self._slices[ffn.path][1].values() for ffn in ffns]
        mx.eval([[part.parameters() for part in parts] for parts in made])


@cache
def _threads() -> list[mx.Stream]:
    # Such streams can be used from every thread of Python's.
    more = min(_THREADS, os.cpu_count() or 1) - 1
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(more)]


def _streams() -> list[mx.Stream]:
    """What slices are made on, FFN by FFN in turn: on a CPU a stream is a single thread."""
    device = mx.default_device()
    return [mx.default_stream(device), *(_threads() if device == mx.cpu else [])]


def _overlap(kept: np.ndarray, before: np.ndarray) -> float:
    return len(np.intersect1d(kept, before, assume_unique=True)) / len(kept)


def slice_model(model: nn.Module, selection: Selection, down_policy: str) -> nn.Module:
    """Return a model that computes only the selected neurons; the given one is not touched."""
    return Slicer(model, down_policy)(selection)[0]
