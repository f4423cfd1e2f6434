"""Scoring a sliced model on the dense model's text, as the GLASS paper does.

The dense model continues a prompt. The sliced model is scored on this continuation token by token,
after the dense model has read the prompt and the warm-up, whose tokens count as exact.
After the warm-up, everything runs on one cache as in the engine: tokens that are not read again
stay as the sliced model left them, also for the dense model's later readings.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from glass_mlx.cache_snapshot import CacheSnapshot, masked_as_one_by_one
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.prompt_cache import make_prompt_cache, read_prompt
from glass_mlx.renewal import stretches
from glass_mlx.selection import Selection, Selector
from glass_mlx.session import Session
from glass_mlx.slicing import mean_compensation
from glass_mlx.statistics import LocalStatistics
from glass_mlx.vocabulary import VocabularyStatistics

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
        points: the numbers of generated tokens after which the state is kept, such as the ends of
            warm-ups.
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
        self._prompt, self._written = text.prompt, text.written
        self.tokens = len(text.written) - 1
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

    def state(self, generated: int = 1) -> tuple[list[Any], LocalStatistics]:
        """Return copies of the cache and the statistics after some generated tokens; see above."""
        checkpoint = self._checkpoints[generated - 1]
        return copy.deepcopy(checkpoint.cache), checkpoint.statistics.copy()

    def read(self, generated: int) -> list[int]:
        """Return the prompt and the first generated tokens."""
        return [*self._prompt, *self._written[:generated]]

    def logprobs(self, model: nn.Module, cache: list[Any], scored: slice) -> mx.array:
        """Return a model's log-probabilities (n, vocabulary) of n scored tokens.

        Args:
            model: the model, which reads the tokens before the scored ones.
            cache: its cache up to there, which changes.
            scored: the scored tokens.
        """
        tokens = mx.array(self._written[scored])
        if tokens.size == 0:
            return self.dense[:0]
        with masked_as_one_by_one(cache):
            logits = model(tokens[None], cache=cache)[0]
        logprobs = _log_probabilities(logits.astype(mx.float32))
        mx.eval(logprobs, [layer.state for layer in cache])
        return logprobs

    def follow(self, model: nn.Module, start: int = 0) -> mx.array:
        """Return another model's log-probabilities (n, vocabulary) of all later tokens.

        Args:
            model: the model. It continues from the dense model's cache at `start`.
            start: the first scored token, one less than a point.
        """
        cache, _ = self.state(start + 1)
        return self.logprobs(model, cache, slice(start, self.tokens))


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
        bytes: (T,) bytes of weights read for the token, over the dense model's. The tokens that are
            read again before a token count as one more token.
        reread: how many tokens are read again.
        selections: the kept neurons, by the number of generated tokens at their selection.
        vocabulary: the kept share of the vocabulary, if it is not 1, by the same numbers.
    """

    kl: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    right: np.ndarray
    dense: np.ndarray
    bytes: np.ndarray
    reread: int = 0
    selections: dict[int, Selection] = field(default_factory=dict)
    vocabulary: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def exact(reading: DenseReading) -> "Scores":
        """Return the dense model's own scores."""
        return Scores(
            kl=np.zeros(reading.tokens),
            nll=np.array(reading.negative_log_likelihood(reading.dense)),
            agrees=np.ones(reading.tokens, bool),
            right=np.array(mx.argmax(reading.dense, axis=-1) == reading.following),
            dense=np.ones(reading.tokens, bool),
            bytes=np.ones(reading.tokens),
        )

    def put(
        self, scored: slice, reading: DenseReading, logprobs: mx.array, dense: bool = False
    ) -> None:
        """Score log-probabilities of some of the tokens.

        Args:
            scored: the n scored tokens.
            reading: the continuation.
            logprobs: (n, vocabulary) a model's log-probabilities.
            dense: whether the dense model computed them.
        """
        if scored.start == scored.stop:
            return
        dense_logprobs, top = reading.dense[scored], mx.argmax(logprobs, axis=-1)
        self.kl[scored] = divergence(dense_logprobs, logprobs)
        self.nll[scored] = reading.negative_log_likelihood(logprobs, scored.start)
        self.agrees[scored] = top == mx.argmax(dense_logprobs, axis=-1)
        self.right[scored] = top == reading.following[scored]
        self.dense[scored] = dense


def score(reading: DenseReading, selector: Selector, select: Select | None = None) -> Scores:
    """Score a selector on a continuation, with slices and renewals as in the engine.

    Args:
        reading: the continuation, read with the end of the selector's warm-up among its points.
        selector: determines when neurons are selected, and how they are sliced.
        select: chooses the neurons. Default: the selector.
    """
    config, session, scores = selector.config, reading.session, Scores.exact(reading)
    if config.warmup > reading.tokens:
        return scores
    cache, statistics = reading.state(config.warmup)
    sliced = session.sliced_model(config.down_policy)
    shortlister = selector.shortlister(statistics.vocabulary)
    if shortlister is not None:
        shortlister.choose(reading.read(1))
        mx.eval(shortlister.observe(reading.dense[: config.warmup - 1]))
    reader = session.observed_on_text(statistics, shortlister)
    for start, read_again_from, stop in stretches(config, reading.tokens + 1):
        # 1) Select and slice.
        selection = (select or selector.select)(statistics)
        shortlist = None if shortlister is None else shortlister.choose(reading.read(start))
        sliced.update(selection, mean_compensation(statistics), shortlist)
        scores.selections[start] = sliced.selection
        if shortlist is not None:
            scores.vocabulary[start] = shortlist.share
        model = sliced.model

        # 2) Decode. The latest token is always unread, so its successor is scored.
        first = slice(start - 1, int(read_again_from) - 1)
        second = slice(first.stop, int(stop) - 1)
        scores.put(first, reading, reading.logprobs(model, cache, first))
        snapshot = CacheSnapshot(cache)
        scores.put(second, reading, reading.logprobs(model, cache, second))
        scores.bytes[first.start : second.stop] = session.bytes_of(model) / session.weight_bytes
        if stop > reading.tokens:
            break

        # 3) Read again. The dense model also computes the next token.
        snapshot.rewind()
        again = slice(second.start, second.stop + 1)
        logprobs = reading.logprobs(reader, cache, again)
        mx.eval(statistics.arrays, [] if shortlister is None else shortlister.arrays)
        next_token = slice(second.stop, second.stop + 1)
        scores.put(next_token, reading, logprobs[-1:], dense=True)
        scores.bytes[next_token] = 2
        scores.reread += second.stop - second.start
    return scores


def score_shortlists(reading: DenseReading, selector: Selector) -> np.ndarray:
    """Score the shortlists of a selector alone, with all neurons.

    The dense model's logits tell exactly what a shortlist leaves out, so nothing else is run.

    Args:
        reading: the continuation.
        selector: determines when shortlists are chosen, and how.

    Returns:
        (T,) KL divergence from the dense model, nats.
    """
    config, kl = selector.config, np.zeros(reading.tokens)
    statistics = VocabularyStatistics()
    shortlister = selector.shortlister(statistics)
    if shortlister is None or config.warmup > reading.tokens:
        return kl
    shortlister.choose(reading.read(1))
    shortlister.observe(reading.dense[: config.warmup - 1])
    for start, read_again_from, stop in stretches(config, reading.tokens + 1):
        shortlist = shortlister.choose(reading.read(start))
        scored = slice(start - 1, int(stop) - 1)
        if shortlist is not None:
            kl[scored] = shortlist.divergence(reading.dense[scored])[1]
        if stop <= reading.tokens:
            shortlister.observe(reading.dense[int(read_again_from) - 1 : int(stop)])
            mx.eval(shortlister.arrays)
    return kl
