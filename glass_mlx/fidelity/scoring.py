"""Scoring a sliced model on the dense model's text, as the GLASS paper does.

The dense model continues a prompt. The sliced model is scored on this continuation token by token,
after the dense model has read the prompt and the warm-up, whose tokens count as exact.
After the warm-up, everything runs on one cache as in the engine: later dense tokens see what the
sliced model left there.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from glass_mlx.block_decoding import can_take_back
from glass_mlx.cache_masks import masked_as_one_by_one
from glass_mlx.config import DRAFT_WARMUP, GlassConfig
from glass_mlx.draft_shortlist import MAX_DRAFTS, MAX_MISSING, DraftShortlister
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.models import FFN, Routing, with_call, with_replacements, with_taps
from glass_mlx.prompt_cache import PromptCache, make_prompt_cache, read_prompt
from glass_mlx.renewal import is_dense_token, stretches
from glass_mlx.selection import Selection, Selector
from glass_mlx.session import Session
from glass_mlx.slicing import masked_model, mean_compensation
from glass_mlx.statistics import LocalStatistics
from glass_mlx.vocabulary import Shortlister, VocabularyStatistics, log_probabilities

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
        prompt_cache: a prompt cache into which the prompt was read. It does not change, so several
            continuations can share it. Default: the prompt is read.
        reference: (T, vocabulary) log-probabilities of another model for the scored tokens, which
            scores are measured against. Default: the dense model's own.
        **options: how the prompt is read, as for `read_prompt`; for example `prefill_step_size`.

    Attributes:
        session: the dense model's session.
        tokens: T, the number of scored tokens: all written tokens except the first.
        following: (T,) the ids of these tokens.
        oracle: statistics of the whole continuation, which a selection cannot know.
        dense: (T, vocabulary) the dense model's log-probabilities of the scored tokens.
        reference: (T, vocabulary) the log-probabilities that scores are measured against.
    """

    def __init__(
        self,
        model: nn.Module | Session,
        text: Continuation,
        points: Sequence[int] = (1,),
        prompt_cache: PromptCache | None = None,
        reference: mx.array | None = None,
        **options: Any,
    ) -> None:
        self.session = session = Session.of(model)
        self._prompt, self._written = text.prompt, text.written
        self.tokens = len(text.written) - 1
        self.following = mx.array(text.written[1:])

        session.ranks.settle()

        # 1) Read the prompt as the engine does, which observes a sample of it in the last FFN.
        if prompt_cache is None:
            prompt_cache = make_prompt_cache(session)
            read_prompt(session, text.prompt, prompt_cache, **options)
        else:
            prompt_cache = copy.deepcopy(prompt_cache)
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
        self.dense = log_probabilities(mx.concatenate(logits))
        self.reference = self.dense if reference is None else reference

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

    def logits(self, model: nn.Module, cache: list[Any], scored: slice) -> mx.array:
        """Return a model's logits (n, vocabulary) of n scored tokens.

        Args:
            model: the model, which reads the tokens before the scored ones.
            cache: its cache up to there, which changes.
            scored: the scored tokens.
        """
        tokens = mx.array(self._written[scored])
        with masked_as_one_by_one(cache):
            logits = model(tokens[None], cache=cache)[0]
        mx.eval(logits, [layer.state for layer in cache])
        return logits

    def follow(self, model: nn.Module, start: int = 0) -> mx.array:
        """Return another model's log-probabilities (n, vocabulary) of all later tokens.

        Args:
            model: the model. It continues from the dense model's cache at `start`.
            start: the first scored token, one less than a point.
        """
        cache, _ = self.state(start + 1)
        return log_probabilities(self.logits(model, cache, slice(start, self.tokens)))


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
        bytes: (T,) bytes of weights read for the token, over the dense model's.
        selections: the kept neurons, by the number of generated tokens at their selection.
        vocabulary: the kept share of the vocabulary, if it is not 1, by the number of generated
            tokens when it was chosen.
    """

    kl: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    right: np.ndarray
    dense: np.ndarray
    bytes: np.ndarray
    selections: dict[int, Selection] = field(default_factory=dict)
    vocabulary: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def exact(reading: DenseReading) -> "Scores":
        """Return the dense model's own scores. Its KL is 0, unless the reference is another one."""
        top, kl, agrees = mx.argmax(reading.dense, axis=-1), np.zeros(reading.tokens), None
        if reading.reference is not reading.dense:
            kl = np.array(divergence(reading.reference, reading.dense))
            agrees = np.array(top == mx.argmax(reading.reference, axis=-1))
        return Scores(
            kl=kl,
            nll=np.array(reading.negative_log_likelihood(reading.dense)),
            agrees=np.ones(reading.tokens, bool) if agrees is None else agrees,
            right=np.array(top == reading.following),
            dense=np.ones(reading.tokens, bool),
            bytes=np.ones(reading.tokens),
        )

    def put(
        self, scored: slice, reading: DenseReading, logprobs: mx.array, dense: np.ndarray
    ) -> None:
        """Score log-probabilities of some of the tokens.

        Args:
            scored: the n scored tokens.
            reading: the continuation.
            logprobs: (n, vocabulary) a model's log-probabilities.
            dense: (n,) whether the dense model computed them.
        """
        reference, top = reading.reference[scored], mx.argmax(logprobs, axis=-1)
        self.kl[scored] = divergence(reference, logprobs)
        self.nll[scored] = reading.negative_log_likelihood(logprobs, scored.start)
        self.agrees[scored] = top == mx.argmax(reference, axis=-1)
        self.right[scored] = top == reading.following[scored]
        self.dense[scored] = dense


def score(
    reading: DenseReading,
    selector: Selector,
    select: Select | None = None,
    *,
    masks: bool = False,
) -> Scores:
    """Score a selector on a continuation, with slices and renewals as in the engine.

    Args:
        reading: the continuation, read with the end of the selector's warm-up among its points.
        selector: determines when neurons are selected, and how they are sliced.
        select: chooses the neurons. Default: the selector.
        masks: whether to mask the neurons of FFNs for whose slices memory has no room, to score
            what all slices cost. The bytes are not those of the slices then. Default: such FFNs
            stay whole, as in the engine.

    Raises:
        NoRoomError: if there is no room for any slice, nor are masks made.
    """
    config, session, scores = selector.config, reading.session, Scores.exact(reading)
    if config.warmup > reading.tokens:
        return scores
    cache, statistics = reading.state(config.warmup)
    drafter, shortlister = None, selector.shortlister(statistics.vocabulary)
    if config.has_drafts and (cost := session.head_cost) is not None:
        vocabulary, size = VocabularyStatistics(), session.vocabulary_size
        drafter = selector.draft_shortlister(vocabulary, size, cost)
        _warm_up(drafter, reading, config, cache, scores)
    elif shortlister is not None and config.warmup > 1:
        shortlister.observe(reading.dense[: config.warmup - 1])
    if selector.is_exact:
        return _score_exact(reading, config, drafter, cache, scores)
    unsliced = session.without_room(selector, required=not masks)
    sliced = session.sliced_model(config.down_policy, unsliced=unsliced)
    for start, stop in stretches(config, reading.tokens + 1):
        # 1) Select and slice. The rows of the head are exact, so its slice is not needed here.
        selection = (select or selector.select)(statistics)
        compensation = mean_compensation(statistics)
        sliced.update(selection, compensation)
        sliced_model = sliced.model
        if masks and unsliced:
            masked = [ffn for ffn in session.ffns if ffn.path in unsliced]
            sliced_model = masked_model(sliced_model, masked, selection, compensation)
        scores.selections[start] = sliced.selection

        # 2) Run the dense and the sliced model on all tokens of the stretch at once.
        tokens, is_dense = _stretch(config, start, int(stop))
        if drafter is not None:
            drafter.reads_again = not can_take_back(cache, MAX_DRAFTS)
        model = _interleaved(session, sliced_model, statistics, is_dense)
        logits = reading.logits(model, cache, tokens)
        mx.eval(logits, statistics.arrays)

        # 3) Score.
        scores.bytes[tokens] = np.where(
            is_dense, 1, session.bytes_of(sliced_model) / session.weight_bytes
        )
        if drafter is not None:
            _draft(drafter, reading, start, logits, scores)
        logprobs = log_probabilities(logits)
        if shortlister is not None:
            logprobs = _back_off(shortlister, reading, start, logits, is_dense, scores)
        scores.put(tokens, reading, logprobs, is_dense)
    return scores


def _score_exact(
    reading: DenseReading,
    config: GlassConfig,
    drafter: DraftShortlister | None,
    cache: list[Any],
    scores: Scores,
) -> Scores:
    """Return the dense model's own scores, and the bytes that drafts and checks would read."""
    if drafter is None:
        return scores
    for start, stop in stretches(config, reading.tokens + 1):
        scores.selections[start] = Selection.everything(reading.session.shapes)
        tokens, scores.dense[tokens] = _stretch(config, start, int(stop))
        unread = start - config.warmup
        drafter.reads_again = not can_take_back(cache, unread + MAX_DRAFTS)
        _draft(drafter, reading, start, reading.dense[tokens], scores)
    return scores


def _back_off(
    shortlister: Shortlister,
    reading: DenseReading,
    start: int,
    logits: mx.array,
    is_dense: np.ndarray,
    scores: Scores,
) -> mx.array:
    """Return the log-probabilities of a stretch whose sliced tokens have a shortlist's logits.

    Args:
        shortlister: chooses the shortlist, and observes the predictions of dense tokens.
        reading: the continuation.
        start: the number of generated tokens before the stretch.
        logits: (n, vocabulary) the logits of its tokens.
        is_dense: (n,) whether a token is dense.
        scores: where the bytes go that are not read.
    """
    logprobs = log_probabilities(logits)
    shortlist = shortlister.choose(reading.read(start))
    if shortlist is not None:
        scores.vocabulary[start] = shortlist.share
        session = reading.session
        assert session.head is not None
        unread = session.head.bytes * (1 - shortlist.share) / session.weight_bytes
        scores.bytes[start - 1 : start - 1 + len(logits)] -= np.where(is_dense, 0, unread)
        backed_off = log_probabilities(shortlist.back_off(logits))
        logprobs = mx.where(mx.array(is_dense)[:, None], logprobs, backed_off)
    if is_dense.any():
        shortlister.observe(logits[mx.array(np.flatnonzero(is_dense))])
        mx.eval(shortlister.arrays)
    return logprobs


def _draft(
    drafter: DraftShortlister,
    reading: DenseReading,
    start: int,
    logits: mx.array,
    scores: Scores,
) -> None:
    """Score the bytes that drafts and checks of a stretch would read.

    A draft is right if its token is in the shortlist; see `sampling`.

    Args:
        drafter: chooses the shortlists, and observes all predictions.
        reading: the continuation.
        start: the number of generated tokens before the stretch.
        logits: (n, vocabulary) the logits of its tokens.
        scores: the scores, with the bytes of these tokens without drafts.
    """
    session, first, stop = reading.session, start - 1, start - 1 + len(logits)
    assert session.head is not None
    head = session.head.bytes / session.weight_bytes
    done = first
    while done < stop:  # once more whenever drafts were wrong
        shortlist, end = drafter.choose(reading.read(done + 1)), stop
        if shortlist is not None:
            scores.vocabulary[done + 1] = shortlist.share
            drafts = scores.bytes[done:stop] - head * (1 - shortlist.share)
            right = shortlist.shares[np.array(reading.following[done:stop])] == 0
            end = done
            for taken, count in _blocks(right, drafter.count):
                place = end - done
                read = drafts[place : place + count].sum() + head
                if drafter.reads_again and taken < count:
                    read += drafts[place : place + taken].sum()
                scores.bytes[end : end + taken] = read / taken
                end += taken
            drafter.wrong += int((~right[: end - done]).sum())
        drafter.observe(logits[done - first : end - first])
        mx.eval(drafter.arrays)
        done = end


def _blocks(right: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """Yield the number of tokens of each block, and that of its drafts, until too many are missing.

    Args:
        right: (n,) whether the draft of each token is right, so that the token is in the shortlist.
        count: the number of drafts in a block.
    """
    start = missing = 0
    while start < len(right) and missing < MAX_MISSING:
        drafts = min(count, len(right) - start)
        first_wrong = np.flatnonzero(~right[start : start + drafts])
        taken = int(first_wrong[0]) + 1 if len(first_wrong) else drafts
        yield taken, drafts
        start += taken
        missing += len(first_wrong) > 0


def _interleaved_ffn(
    ffn: FFN, dense: nn.Module, sliced: nn.Module, is_dense: np.ndarray
) -> nn.Module:
    """Return an FFN that is dense for some tokens and sliced for the others.

    Tokens affect each other in attention alone, so this computes the same as one model after the
    other.

    Args:
        ffn: the FFN.
        dense: the dense module.
        sliced: the sliced module.
        is_dense: (T,) whether a token's FFN is dense.
    """

    def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # Where an FFN is no module of its own, the module reads a cache. Both write the same to it.
        copies = [copy.copy(a) if hasattr(a, "update_and_fetch") else a for a in args]
        outputs = [dense(x, *copies, **kwargs), sliced(x, *args, **kwargs)]
        # A stack is called with the experts of each token, and has an output for each of them.
        tokens = args[0].shape[:-1] if args and ffn.experts is not None else x.shape[:-1]
        mask = mx.array(is_dense).reshape(*tokens, *[1] * (outputs[0].ndim - len(tokens)))
        return mx.where(mask, *outputs)

    return with_call(dense, call)


def _interleaved(
    session: Session, sliced: nn.Module, statistics: LocalStatistics, is_dense: np.ndarray
) -> nn.Module:
    """Return a model for T tokens, some of which are dense and observed."""
    if not is_dense.any():
        return sliced
    chosen, text = mx.array(np.flatnonzero(is_dense)), statistics.text

    def observe(path: str, hidden: mx.array, *, routing: Routing | None = None) -> mx.array:
        if routing is not None:
            return text.update(path, hidden, is_dense, routing)
        text.update(path, hidden[..., chosen, :])
        return hidden

    def observe_output(path: str, outputs: mx.array) -> mx.array:
        text.update_outputs(path, outputs[..., chosen, :])
        return outputs

    observed = with_taps(session.model, observe, observe_output, ffns=session.ffns)
    dense_ffns, sliced_ffns = (dict(model.named_modules()) for model in (observed, sliced))
    modules = {
        path: _interleaved_ffn(ffn, dense_ffns[path], sliced_ffns[path], is_dense)
        for path, ffn in ((ffn.block_path, ffn) for ffn in session.ffns)
    }
    return with_replacements(session.model, modules)


def _warm_up(
    drafter: DraftShortlister,
    reading: DenseReading,
    config: GlassConfig,
    cache: list[Any],
    scores: Scores,
) -> None:
    """Show the predictions of the warm-up to a drafter, and draft in it, as the engine does.

    Args:
        drafter: the drafter.
        reading: the continuation.
        config: the schedule.
        cache: the cache at the end of the warm-up.
        scores: where the bytes go.
    """
    undrafted = min(config.warmup, DRAFT_WARMUP)
    if undrafted > 1:
        drafter.observe(reading.dense[: undrafted - 1])
    if undrafted < config.warmup:
        drafter.reads_again = not can_take_back(cache, undrafted - config.warmup + MAX_DRAFTS)
        logits = reading.dense[undrafted - 1 : config.warmup - 1]
        _draft(drafter, reading, undrafted, logits, scores)


def _stretch(config: GlassConfig, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """Return the scored tokens of a stretch, and for each whether it is dense.

    Generated token n, counted from 1, is the scored token n - 2, because the first is not scored.
    """
    numbers = range(start + 1, stop + 1)
    is_dense = [is_dense_token(config, number) for number in numbers]
    return slice(start - 1, stop - 1), np.array(is_dense)
