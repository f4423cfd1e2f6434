"""Scoring a sliced model on the dense model's text, as the GLASS paper does.

The dense model continues a prompt. The sliced model is scored on this continuation token by token,
after the dense model has read the prompt. Tokens that the engine computes densely count as exact.
Where the engine reads the text again, the sliced model continues from the dense model's cache.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from glass_mlx.cache_snapshot import masked_as_one_by_one
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.prompt_cache import make_prompt_cache, read_prompt
from glass_mlx.renewal import sliced_stretches
from glass_mlx.selection import Selection, Selector
from glass_mlx.session import Session
from glass_mlx.slicing import mean_compensation
from glass_mlx.statistics import LocalStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Chooses the neurons to keep from what the dense model has read.
Select = Callable[[LocalStatistics], Selection]


@dataclass(frozen=True)
class _Checkpoint:
    """The dense model's state at one point of a continuation."""

    cache: list[Any]
    statistics: LocalStatistics


class DenseReading:
    """A continuation as the dense model reads it: the reference for the scores of sliced models.

    Args:
        model: the dense model, or a session of it.
        text: the continuation, with at least two written tokens.
        points: the numbers of generated tokens after which neurons may be selected; see
            `renewal.all_selection_points`.
        **options: how the prompt is read, as for `read_prompt`; for example `prefill_step_size`.

    Attributes:
        session: the dense model's session.
        tokens: T, the number of scored tokens: all written tokens except the first.
        following: (T,) the ids of these tokens.
        oracle: statistics of the whole continuation, which a selection cannot know.
        dense: (T, vocabulary) the dense model's log-probabilities of the scored tokens.
    """

    def __init__(
        self,
        model: nn.Module | Session,
        text: Continuation,
        points: Sequence[int] = (1,),
        **options: Any,
    ) -> None:
        self.session = session = Session.of(model)
        self._written, self.tokens = text.written, len(text.written) - 1
        self.following = mx.array(text.written[1:])

        # 1) Read the prompt as the engine does, which observes a sample of it in the last FFN.
        prompt_cache = make_prompt_cache(session)
        read_prompt(session, text.prompt, prompt_cache, **options)
        cache, statistics = [*prompt_cache], prompt_cache.statistics
        assert statistics is not None
        self._checkpoints = {0: _Checkpoint(copy.deepcopy(cache), statistics.copy())}

        # 2) Read the text, and keep a checkpoint at every point. After n tokens the last token is
        #    not read yet: the cache has the prompt and n - 1 more tokens.
        stops = sorted({min(n - 1, self.tokens) for n in points} | {0, self.tokens})
        reader = session.observed_on_text(statistics)
        logits: list[mx.array] = []
        for start, stop in pairwise(stops):
            part = mx.array(self._written[start:stop])[None]
            with masked_as_one_by_one(cache):
                logits.append(reader(part, cache=cache)[0].astype(mx.float32))
            mx.eval(logits, [layer.state for layer in cache], statistics.arrays)
            if stop < self.tokens:
                self._checkpoints[stop] = _Checkpoint(copy.deepcopy(cache), statistics.copy())
        self.oracle = statistics.text
        self.dense = _log_probabilities(mx.concatenate(logits))

    def statistics(self, generated: int = 1) -> LocalStatistics:
        """Return the local statistics after some generated tokens, the last of which is unread."""
        return self._checkpoints[generated - 1].statistics

    def negative_log_likelihood(self, logprobs: mx.array, start: int = 0) -> mx.array:
        """Return -log p (n,) of the written tokens, in nats.

        Args:
            logprobs: (n, vocabulary) log-probabilities of scored tokens.
            start: the number of the first of these tokens.
        """
        following = self.following[start : start + len(logprobs), None]
        return -mx.take_along_axis(logprobs, following, axis=-1).squeeze(-1)

    def follow(self, model: nn.Module, start: int = 0, stop: int | None = None) -> mx.array:
        """Return another model's log-probabilities (n, vocabulary) of scored tokens.

        Args:
            model: the model. It continues from the dense model's cache at `start`.
            start: the first scored token, one less than a point.
            stop: the scored token to stop before. Default: the end.
        """
        cache = copy.deepcopy(self._checkpoints[start].cache)
        tokens = mx.array(self._written[start : self.tokens if stop is None else stop])
        with masked_as_one_by_one(cache):
            logits = model(tokens[None], cache=cache)[0]
        return _log_probabilities(logits.astype(mx.float32))


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """Return KL(p || q), (T,) nats per token, of log-probabilities (T, vocabulary)."""
    return (mx.exp(p) * (p - q)).sum(-1)


@dataclass
class Scores:
    """The scores of a sliced model on one continuation of T scored tokens.

    Attributes:
        kl: (T,) KL divergence from the dense model, nats.
        nll: (T,) -log p of the written tokens, nats.
        agrees: (T,) whether the most likely token is the dense model's.
        right: (T,) whether the most likely token is the written one.
        dense: (T,) whether the token is computed densely.
        reread: how many tokens are read again.
        selections: the kept neurons, by the number of generated tokens at their selection.
    """

    kl: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    right: np.ndarray
    dense: np.ndarray
    reread: int = 0
    selections: dict[int, Selection] = field(default_factory=dict)

    @staticmethod
    def exact(reading: DenseReading) -> "Scores":
        """Return the dense model's own scores."""
        return Scores(
            kl=np.zeros(reading.tokens),
            nll=np.array(reading.negative_log_likelihood(reading.dense)),
            agrees=np.ones(reading.tokens, bool),
            right=np.array(mx.argmax(reading.dense, axis=-1) == reading.following),
            dense=np.ones(reading.tokens, bool),
        )


def score(reading: DenseReading, selector: Selector, select: Select | None = None) -> Scores:
    """Score a selector on a continuation, with slices and renewals as in the engine.

    Args:
        reading: the continuation, read with the points of the selector's configuration.
        selector: determines when neurons are selected, and how they are sliced.
        select: chooses the neurons. Default: the selector.
    """
    config, scores = selector.config, Scores.exact(reading)
    sliced = reading.session.sliced_model(config.down_policy)
    for start, stop in sliced_stretches(config, reading.tokens + 1):
        statistics = reading.statistics(start)
        selection = (select or selector.select)(statistics)
        sliced.update(selection, mean_compensation(statistics))
        _score_stretch(scores, reading, sliced.model, slice(start - 1, stop - 1))
        scores.reread += stop - start if stop <= reading.tokens else 0
        scores.selections[start] = sliced.selection
    return scores


def _score_stretch(scores: Scores, reading: DenseReading, model: nn.Module, stretch: slice) -> None:
    """Score a sliced model on some of the tokens, and put the results in their places."""
    logprobs = reading.follow(model, stretch.start, stretch.stop)
    dense_logprobs = reading.dense[stretch]
    top = mx.argmax(logprobs, axis=-1)
    scores.kl[stretch] = divergence(dense_logprobs, logprobs)
    scores.nll[stretch] = reading.negative_log_likelihood(logprobs, stretch.start)
    scores.agrees[stretch] = top == mx.argmax(dense_logprobs, axis=-1)
    scores.right[stretch] = top == reading.following[stretch]
    scores.dense[stretch] = False
