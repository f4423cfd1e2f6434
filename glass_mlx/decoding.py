"""mlx-lm's decode loop, run on one prompt cache with one model after another."""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class Sampled(NamedTuple):
    """A token.

    Attributes:
        token: its id.
        logprobs: (vocabulary,) log-probabilities.
        from_draft: whether a draft model proposed it.
    """

    token: int
    logprobs: mx.array
    from_draft: bool = False


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """Return the most likely tokens: (batch, vocabulary) to (batch,)."""
    return mx.argmax(logprobs, axis=-1)


class _History:
    """Shows logits processors all tokens so far, in every run of a decoder.

    mlx-lm's loop shows only the tokens of one run. Up to version 0.31 it leaves out the tokens that
    were read before the last one, so only the tail of these tokens is used after the first run. The
    prompt looks as mlx-lm shows it.
    """

    def __init__(self) -> None:
        self._prompt: mx.array | None = None

    def for_first_run(self, processor: LogitsProcessor) -> LogitsProcessor:
        """Return the processor for the run that reads the prompt."""

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if self._prompt is None:
                self._prompt = tokens
            return processor(tokens, logits)

        return process

    def text(self, generated: list[int]) -> mx.array:
        """Return the prompt and some generated tokens, (n,)."""
        tokens = mx.array(generated, mx.uint32)
        return tokens if self._prompt is None else mx.concatenate([self._prompt, tokens])

    def for_later_run(self, processor: LogitsProcessor, generated: list[int]) -> LogitsProcessor:
        """Return the processor for a run that begins after some generated tokens."""
        before = self.text(generated[:-1])
        calls = 0

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal calls
            calls += 1
            return processor(mx.concatenate([before, tokens[-calls:]]), logits)

        return process


class Decoder:
    """A decode loop on one prompt cache: feeds tokens to models and samples the next tokens.

    mlx-lm's loop computes one token ahead: when it yields a token, the model has already read that
    token. The last token before a change of models is an exception: only the next model reads it.

    Args:
        dense: the dense model, which reads this last token if no other model follows.
        cache: the prompt cache, one entry per layer.
        prompt: (T,) token ids of the prompt.
        max_tokens: the maximum number of tokens to generate; -1 for no limit.
        sampler: maps log-probabilities (1, vocabulary) to a token (1,). Default: greedy.
        logits_processors: called with all tokens so far and logits (1, vocabulary).
        **options: passed on to `mlx_lm.generate.generate_step`.

    Attributes:
        cache: the prompt cache.
        tokens: the token ids of the prompt and of all generated tokens.
        generated: the number of generated tokens.
        limit: the maximum number of tokens to generate, or infinity.
    """

    def __init__(
        self,
        dense: nn.Module,
        cache: list[Any],
        prompt: mx.array,
        max_tokens: int,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        **options: Any,
    ) -> None:
        self._dense = dense
        self.cache, self.tokens = cache, cast(list[int], prompt.tolist())
        self.generated, self.limit = 0, math.inf if max_tokens < 0 else max_tokens
        self._sampler, self._processors = sampler or greedy_sampler, list(logits_processors or [])
        self._options, self._history = options, _History()
        self._latest: tuple[mx.array, mx.array] | None = None

    def last(self, count: int) -> mx.array:
        """Return the last tokens, (count,)."""
        return mx.array(self.tokens[-count:], mx.uint32)

    def run(
        self, model: nn.Module, unread: mx.array, until: float, **options: Any
    ) -> Generator[Sampled, None, None]:
        """Feed tokens to a model and generate until a total number of tokens is reached.

        Args:
            model: the model.
            unread: (n,) the last n tokens, which are not in the cache yet.
            until: the total number of generated tokens to stop at. The model does not read the last
                of these tokens, unless the limit is reached.
            **options: further options for `mlx_lm.generate.generate_step`.

        Yields:
            Each token with its log-probabilities. If the caller closes the generator, all
            tokens so far are in the cache, as after mlx-lm's loop.
        """
        # If there is only one token, whoever observes the prompt must not observe that token.
        is_last_run = until >= self.limit > 1
        until = min(until, self.limit)
        count = -1 if until == math.inf else int(until) - self.generated
        steps = generate_step(
            unread,
            model,
            # mlx-lm's loop samples one more token than it yields.
            max_tokens=count if is_last_run else count - 1,
            sampler=self._sample,
            logits_processors=self._processors_of_run(),
            prompt_cache=self.cache,
            **(self._options | options),
        )
        for token, logprobs in steps:
            self._add(int(token))
            yield Sampled(int(token), logprobs)
        if not is_last_run:
            assert self._latest is not None
            sampled, logprobs = self._latest
            last = int(sampled)
            self._add(last)
            try:
                yield Sampled(last, logprobs.squeeze(0))
            except GeneratorExit:
                self._read(last)
                raise
            if self.generated == self.limit:
                self._read(last)

    def _processors_of_run(self) -> list[LogitsProcessor]:
        if self.generated == 0:
            return [self._history.for_first_run(p) for p in self._processors]
        generated = self.tokens[-self.generated :]
        return [self._history.for_later_run(p, generated) for p in self._processors]

    def _sample(self, logprobs: mx.array) -> mx.array:
        self._latest = self._sampler(logprobs), logprobs
        return self._latest[0]

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        self.generated += 1

    def _read(self, token: int) -> None:
        """Put a token into the cache, and sample one more token, as mlx-lm's loop does."""
        steps = generate_step(
            mx.array([token], mx.uint32),
            self._dense,
            max_tokens=0,
            sampler=self._sample,
            logits_processors=self._processors_of_run(),
            prompt_cache=self.cache,
            **self._options,
        )
        for _ in steps:
            pass
        mx.eval([layer.state for layer in self.cache])
