"""How close a sliced model stays to the dense one, scored as the GLASS paper does.

The dense model writes a continuation of a prompt. The sliced one is scored on it token by token,
with the prompt read densely. Tokens that the engine would compute densely count as exact, and
where it would read the text again, the sliced model goes on from the dense model's cache.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from glass_mlx.chat import encode
from glass_mlx.models import find_ffns, with_taps
from glass_mlx.recipes import Writer, ends
from glass_mlx.selection import Selection
from glass_mlx.slicing import Evidence, Slicer, Slicing

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

Messages = list[dict[str, str]]

# From what the dense model has seen to the neurons to keep.
Select = Callable[[Evidence], Selection]


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what follows it.

    Attributes:
        prompt: the prompt's token ids, with its chat template.
        written: the token ids that the dense model wrote.
    """

    prompt: list[int]
    written: list[int]


def read_prompts(file: Path) -> list[Messages]:
    """Read prompts: a text file with one a line, or JSONL with `prompt` or `messages`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not understood, or there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there are no prompts at {file}")
    prompts = []
    try:
        for n, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                prompts.append(_messages(line, n) if file.suffix == ".jsonl" else _asked(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the prompts {file} cannot be read: {error}") from error
    if not prompts:
        raise ValueError(f"there are no prompts in {file}")
    return prompts


def _asked(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _messages(line: str, n: int) -> Messages:
    record = json.loads(line)
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return _asked(record["prompt"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        raise ValueError(f"line {n} has neither a prompt nor messages with role and content")
    return messages


def continue_densely(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Messages],
    tokens: int,
    temperature: float,
    seed: int,
    batch: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Continuation]:
    """Have the dense model continue a batch of prompts by up to `tokens` tokens, all at once."""
    encoded = [encode(tokenizer, messages) for messages in prompts]
    write = Writer(model, temperature, [seed], progress)
    written = write(encoded, [tokens] * len(encoded), ends(tokenizer), batch)
    return [Continuation(*pair) for pair in zip(encoded, written, strict=True)]


def continue_in_batches(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Messages],
    tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    done: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[list[Continuation]]:
    """Have the dense model continue prompts, `batch_size` at once.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        prompts: what to continue.
        tokens: how many tokens to write at most after each.
        temperature: of sampling.
        seed: the same seed and batch size give the same texts.
        batch_size: prompts continued at once.
        done: how many were continued before, in whole batches; these are left out.
        progress: called with the number of tokens of every step.
    """
    for start in range(done, len(prompts), batch_size):
        asked, batch = prompts[start : start + batch_size], start // batch_size
        yield continue_densely(model, tokenizer, asked, tokens, temperature, seed, batch, progress)


@dataclass(frozen=True)
class _Place:
    """What the dense model knows at one place of a continuation."""

    cache: list[Any]
    evidence: Evidence


class Reading:
    """A continuation as the dense model reads it: what others are scored against.

    Args:
        model: the dense model.
        text: the continuation, with at least two written tokens.
        places: after how many generated tokens a selection may be made; see `Slicing.renewals`.

    Attributes:
        model: the dense model.
        tokens: T, the number of tokens that are scored: all that were written but the first.
        following: (T,) the ids of these tokens.
        oracle: the statistics of the continuation, which selection cannot know.
        dense: (T, vocabulary) log-probabilities of the scored tokens.
    """

    def __init__(self, model: nn.Module, text: Continuation, places: Sequence[int] = (1,)) -> None:
        self.model = model
        evidence = Evidence.of(model)
        self._written, self.tokens = text.written, len(text.written) - 1
        self.following = mx.array(text.written[1:])
        cache = make_prompt_cache(model)
        prompt = with_taps(model, evidence.prompt.update)
        prompt(mx.array(text.prompt)[None], cache=cache)
        mx.eval([layer.state for layer in cache], evidence.prompt.sums)

        # After n tokens the last one is not read yet: the cache has the prompt and n - 1 more.
        stops = sorted({min(n - 1, self.tokens) for n in places} | {0, self.tokens})
        self._places = {0: _Place(copy.deepcopy(cache), evidence.copy())}
        continuation = with_taps(model, evidence.text.update, evidence.text.update_outputs)
        logits: list[mx.array] = []
        for start, stop in pairwise(stops):
            part = mx.array(self._written[start:stop])[None]
            logits.append(continuation(part, cache=cache)[0].astype(mx.float32))
            text = evidence.text
            mx.eval(logits, [layer.state for layer in cache], text.sums, text.outputs)
            if stop < self.tokens:
                self._places[stop] = _Place(copy.deepcopy(cache), evidence.copy())
        self.oracle = evidence.text
        self.dense = _log_probabilities(mx.concatenate(logits))

    def evidence(self, generated: int = 1) -> Evidence:
        """What was seen of the prompt and of the text before the last of the generated tokens."""
        return self._places[generated - 1].evidence

    def negative_log_likelihood(self, scored: mx.array, start: int = 0) -> mx.array:
        """-log p of the written tokens, nats, by log-probabilities (n, vocabulary) from `start`."""
        following = self.following[start : start + len(scored), None]
        return -mx.take_along_axis(scored, following, axis=-1).squeeze(-1)

    def follow(self, model: nn.Module, start: int = 0, stop: int | None = None) -> mx.array:
        """Log-probabilities (n, vocabulary) of another model for the scored tokens in a range.

        It goes on from what the dense model has read before `start`, one less than a place.
        """
        cache = copy.deepcopy(self._places[start].cache)
        given = mx.array(self._written[start : self.tokens if stop is None else stop])
        return _log_probabilities(model(given[None], cache=cache)[0].astype(mx.float32))


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q), (T,) nats a token, of log-probabilities (T, vocabulary)."""
    return (mx.exp(p) * (p - q)).sum(-1)


@dataclass
class Scores:
    """How a sliced model did on one continuation of T scored tokens.

    Attributes:
        kl: (T,) KL divergence from the dense model, nats.
        nll: (T,) -log p of the written tokens, nats.
        agrees: (T,) whether the most likely token is the dense model's.
        right: (T,) whether the most likely token is the one that was written.
        dense: (T,) whether the token is computed densely.
        reread: how many tokens are read again.
        selections: the kept neurons, by after how many generated tokens they were selected.
    """

    kl: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    right: np.ndarray
    dense: np.ndarray
    reread: int = 0
    selections: dict[int, Selection] = field(default_factory=dict)

    @staticmethod
    def exact(reading: Reading) -> "Scores":
        """The dense model's own."""
        return Scores(
            kl=np.zeros(reading.tokens),
            nll=np.array(reading.negative_log_likelihood(reading.dense)),
            agrees=np.ones(reading.tokens, bool),
            right=np.array(mx.argmax(reading.dense, axis=-1) == reading.following),
            dense=np.ones(reading.tokens, bool),
        )


def segments(slicing: Slicing, tokens: int) -> list[tuple[int, int]]:
    """When a generation is sliced: from and up to how many generated tokens each selection lasts.

    Between two of them one token is computed densely, when the text is read again.
    """
    ends, found = slicing.renewals(), []
    start = next(ends)
    while start < tokens:
        stop = min(next(ends, tokens), tokens)
        found.append((start, stop))
        start = stop + 1
    return found


def places(slicings: Iterable[Slicing], tokens: int) -> list[int]:
    """After how many generated tokens any of them makes a selection, for `Reading`."""
    return sorted({start for slicing in slicings for start, _ in segments(slicing, tokens)})


def score(reading: Reading, slicing: Slicing, select: Select | None = None) -> Scores:
    """Score a way of slicing on a continuation, as the engine would generate it.

    Args:
        reading: the continuation, with what `places` says of the slicing.
        slicing: what is sliced, and when.
        select: what is kept. Default: what `slicing` selects.
    """
    ffns = find_ffns(reading.model)
    scores = Scores.exact(reading)
    slicer = Slicer(reading.model, slicing.down_policy)
    for start, stop in segments(slicing, reading.tokens + 1):
        evidence = reading.evidence(start)
        wanted = select(evidence) if select else slicing.select(ffns, evidence)
        sliced, kept = slicer(wanted, evidence.stand_ins())
        part = slice(start - 1, stop - 1)
        ours, dense = reading.follow(sliced, part.start, part.stop), reading.dense[part]
        best = mx.argmax(ours, axis=-1)
        scores.kl[part] = divergence(dense, ours)
        scores.nll[part] = reading.negative_log_likelihood(ours, part.start)
        scores.agrees[part] = best == mx.argmax(dense, axis=-1)
        scores.right[part] = best == reading.following[part]
        scores.dense[part] = False
        scores.reread += stop - start if stop <= reading.tokens else 0
        scores.selections[start] = kept
        del sliced, ours  # the slices can go as soon as there are new ones
    return scores
