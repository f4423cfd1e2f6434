"""A model that computes only selected neurons and logits, with constants for all others."""

import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from glass_mlx.models import (
    FFN,
    BackedOffModel,
    DraftingModel,
    Head,
    MeanCompensation,
    Routing,
    SlicedHead,
    find_ffns,
    membership,
    named_arrays,
    with_head,
    with_modules,
    with_taps,
)
from glass_mlx.random_state import random_key, set_random_key
from glass_mlx.selection import Selection, all_neurons
from glass_mlx.statistics import MEAN, LocalStatistics
from glass_mlx.vocabulary import Shortlist

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# A slice that already has this share of its new neurons is kept.
_MIN_OVERLAP = 0.95

# A mean over this many tokens is shrunk to half of its value, because it is not reliable yet.
_SHRINKAGE_TOKENS = 16

# This many threads copy as fast as a CPU's memory allows.
_MAX_THREADS = 4


def mean_compensation(local: LocalStatistics) -> dict[str, MeanCompensation]:
    """Return the constants that replace dropped neurons, by FFN: their mean over the text.

    Means over few tokens are shrunk towards zero, those of an expert by its own tokens. The result
    is empty until there are enough generated tokens (see `LocalStatistics.has_enough_text`).
    """
    text = local.text
    if not local.has_enough_text:
        return {}
    trust = _trust(text.tokens)
    # Down is linear: the mean of its outputs is its output for the mean inputs. In half precision
    # each output is rounded, which is too coarse for the small difference that compensation is.
    outputs = text.mean_outputs() if text.dtype == mx.float32 else {}
    compensation = {}
    for path, mean in text.scores(MEAN).items():
        routed = text.routed(path)
        if routed is not None:
            mean = mean * _trust(routed)[:, None].astype(np.float32)
            compensation[path] = MeanCompensation(mx.array(mean), None, text.dtype)
            continue
        output = outputs[path] * trust if path in outputs else None
        compensation[path] = MeanCompensation(mx.array(mean * trust), output, text.dtype)
    return compensation


def _trust(tokens: Any) -> Any:
    """Return the factor by which a mean over some tokens is shrunk."""
    return tokens / (tokens + _SHRINKAGE_TOKENS)


class SlicedModel:
    """A model with sliced FFNs and a sliced head. Updates change its slices in place.

    There is one set of slices, so that a renewal moves only what changed. Get `model` again after
    every update, and make a second `SlicedModel` for a second selection.

    Args:
        dense: the dense model, which does not change unless it is released.
        ffns: its FFNs.
        down_policy: a key of `models.DOWN_POLICIES`, for quantized down projections.
        reload: loads the model once more without evaluating its arrays. If it is given, each
            FFN's dense weights are released as soon as its slice exists; see `FFN.release`.
        head: its head, to slice it by a shortlist.
        unsliced: FFNs that are not sliced whatever is selected, for want of memory.

    Attributes:
        slices: for each FFN, its kept neurons in the slice's order, and its sliced projections.
    """

    def __init__(
        self,
        dense: nn.Module,
        ffns: list[FFN],
        down_policy: str,
        reload: Callable[[], nn.Module] | None = None,
        head: Head | None = None,
        unsliced: Collection[str] = (),
    ) -> None:
        self._dense, self._ffns, self._head, self._unsliced = dense, ffns, head, unsliced
        for ffn in ffns:
            if ffn.path in unsliced:
                ffn.drop_copies()  # of slices for which there was room
        self._policy, self._reload = down_policy, reload
        self.slices: dict[str, tuple[np.ndarray, dict[str, nn.Module]]] = {}
        self._is_compensated = False
        self._sliced_head: SlicedHead | None = None
        self._shortlist: Shortlist | None = None

    @property
    def with_whole_head(self) -> nn.Module:
        """The model with sliced FFNs, after the latest update, and the whole head."""
        return with_modules(self._dense, {path: parts for path, (_, parts) in self.slices.items()})

    @property
    def model(self) -> nn.Module:
        """The sliced model after the latest update, with the logits of all tokens."""
        model = self.with_whole_head
        if self._head is None or self._sliced_head is None:
            return model
        assert self._shortlist is not None
        model = with_head(model, self._head, self._sliced_head)
        return BackedOffModel(model, self._sliced_head.rows, self._shortlist.log_odds)

    def drafting_model(
        self, model: nn.Module, observe: Callable[[mx.array], None]
    ) -> DraftingModel:
        """Return a model that drafts with the sliced head.

        Args:
            model: the model with the whole head.
            observe: sees the vectors of which the head computes logits, until it is sliced anew.
        """
        assert self._head is not None
        assert self._sliced_head is not None
        self._sliced_head.show(observe)
        model = with_head(model, self._head, self._sliced_head)
        return DraftingModel(model, self._sliced_head.rows, self._head.size)

    @property
    def unread_head_bytes(self) -> int:
        """The bytes of the head that the sliced one does not read."""
        if self._head is None or self._sliced_head is None:
            return 0
        return self._head.bytes - sum(a.nbytes for _, a in named_arrays(self._sliced_head))

    @property
    def down_policy(self) -> str:
        """How quantized down projections are sliced: the policy, or those of all the layers."""
        policies = dict.fromkeys(ffn.down_policy(self._policy) for ffn in self._ffns)
        return ", ".join(sorted(policies))

    @property
    def selection(self) -> Selection:
        """The neurons in the slices."""
        indices = {path: np.sort(kept, axis=-1) for path, (kept, _) in self.slices.items()}
        return Selection(indices, {ffn.path: ffn.width for ffn in self._ffns})

    def update(
        self,
        selection: Selection,
        compensation: Mapping[str, MeanCompensation] | None = None,
    ) -> None:
        """Bring the slices of FFNs up to date with a selection.

        An FFN or expert whose slice already has nearly all of the selected neurons keeps that slice
        and its compensation. The first update that has compensation gives it to every FFN.

        Args:
            selection: the neurons to keep.
            compensation: the constants that replace the other neurons, by FFN. Default: zero.
        """
        compensation = compensation or {}
        fresh = {} if self._reload is None else _reloaded_ffns(self._reload)
        first_compensation = bool(compensation) and not self._is_compensated
        self._is_compensated |= first_compensation
        streams = _streams()
        for start in range(0, len(self._ffns), len(streams)):
            group = self._ffns[start : start + len(streams)]
            changes: list[tuple[FFN, np.ndarray | None]] = []
            for ffn, stream in zip(group, streams, strict=False):
                indices = selection.indices[ffn.path]
                if ffn.path in self._unsliced:
                    indices = all_neurons(ffn.shape)
                with mx.stream(stream):
                    changed = self._slice(ffn, indices, first_compensation)
                    if changed.any() and self.slices[ffn.path][1]:
                        experts = None if ffn.experts is None else np.flatnonzero(changed)
                        changes.append((ffn, experts))
            self._evaluate(changes)
            for ffn, experts in changes:
                if ffn.path in compensation:
                    kept, parts = self.slices[ffn.path]
                    ffn.compensate(parts, kept, compensation[ffn.path], experts)
            self._evaluate(changes)
            for ffn in group if fresh else ():
                if self.slices[ffn.path][1]:
                    ffn.release(fresh[ffn.path])

    def slice_head(self, shortlist: Shortlist | None) -> None:
        """Bring the slice of the head up to date. Without a shortlist, the head is whole."""
        self._shortlist = shortlist
        if shortlist is None or self._head is None:
            self._sliced_head = None
            return
        if self._sliced_head is not None and len(self._sliced_head.rows) == len(shortlist.rows):
            self._sliced_head.move(shortlist.rows)
            self._sliced_head.show(None)
        else:
            self._sliced_head = None  # frees the previous slice before the new one is made
            self._sliced_head = self._head.sliced(shortlist.rows)
        mx.eval(self._sliced_head.parameters())

    def _slice(self, ffn: FFN, indices: np.ndarray, always: bool) -> np.ndarray:
        """Bring the slice of an FFN up to date, lazily.

        Args:
            ffn: the FFN.
            indices: (..., k) the neurons to keep.
            always: whether the slice counts as changed in any case.

        Returns:
            Whether it changed, for each expert of a stack.
        """
        before, parts = self.slices.get(ffn.path, (None, {}))
        if before is None or before.shape != indices.shape:
            self.slices.pop(ffn.path, None)
            del parts  # frees the previous slice before the new one is made
            self.slices[ffn.path] = indices, ffn.sliced(indices, self._policy)
            return np.ones(indices.shape[:-1], bool)
        changed = _overlap(indices, before, ffn.width) < (np.inf if always else _MIN_OVERLAP)
        wanted = np.where(changed[..., None], indices, np.sort(before, axis=-1))
        kept = ffn.move(parts, before, wanted) if parts else indices
        self.slices[ffn.path] = kept, parts
        return changed

    def _evaluate(self, changes: list[tuple[FFN, np.ndarray | None]]) -> None:
        slices = [self.slices[ffn.path][1].values() for ffn, _ in changes]
        mx.eval([[part.parameters() for part in parts] for parts in slices])


def _reloaded_ffns(reload: Callable[[], nn.Module]) -> dict[str, FFN]:
    """Load the model once more and return its FFNs by path.

    Building a model draws random weights. The global random state is restored, so that the
    generation samples the same tokens as without a reload.
    """
    key = random_key()
    ffns = {ffn.path: ffn for ffn in find_ffns(reload())}
    set_random_key(key)
    return ffns


def slice_model(
    model: nn.Module, selection: Selection, down_policy: str, ffns: list[FFN] | None = None
) -> nn.Module:
    """Return a model that computes only the selected neurons. The given model does not change.

    Args:
        model: the dense model.
        selection: the neurons to keep.
        down_policy: a key of `models.DOWN_POLICIES`, for quantized down projections.
        ffns: the model's FFNs. Default: found by `models.find_ffns`.
    """
    sliced = SlicedModel(model, find_ffns(model) if ffns is None else ffns, down_policy)
    sliced.update(selection)
    return sliced.model


def masked_model(
    model: nn.Module,
    ffns: list[FFN],
    selection: Selection,
    compensation: Mapping[str, MeanCompensation],
) -> nn.Module:
    """Return a model that computes what slices of some FFNs would, but needs no memory for slices.

    It computes all neurons, and replaces those that are not selected by constants. The given model
    does not change.

    Args:
        model: the model.
        ffns: the FFNs. Experts in a list cannot be masked, and stay whole.
        selection: the neurons to keep.
        compensation: the constants that replace the other neurons, by FFN. Default: zero.
    """
    kept, constants = {}, {}
    for ffn in ffns:
        kept[ffn.path] = mx.array(membership(selection.indices[ffn.path], ffn.width))
        means = compensation.get(ffn.path)
        constants[ffn.path] = mx.zeros(ffn.shape) if means is None else means.inputs

    def mask(path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        rows = ... if routing is None else routing.experts
        return mx.where(kept[path][rows], hidden, constants[path][rows].astype(hidden.dtype))

    return with_taps(model, mask, ffns=ffns)


@cache
def _extra_cpu_streams() -> list[mx.ThreadLocalStream]:
    count = min(_MAX_THREADS, os.cpu_count() or 1) - 1
    # Thread-local streams can be used from every Python thread.
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(count)]


def _streams() -> list[mx.Stream | mx.ThreadLocalStream]:
    """Return the streams to slice FFNs on in parallel. On a CPU, each stream is one thread."""
    device = mx.default_device()
    return [mx.default_stream(device), *(_extra_cpu_streams() if device == mx.cpu else [])]


def _overlap(kept: np.ndarray, before: np.ndarray, width: int) -> np.ndarray:
    """Return the share of kept neurons (..., k) that were kept before, (...)."""
    was_kept = np.take_along_axis(membership(before, width), kept, axis=-1)
    return np.asarray(was_kept.mean(-1))
