"""mlx-lm's decode loop, run on one prompt cache with one model after another."""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# A token, and its log-probabilities (vocabulary,).
Sampled = tuple[int, mx.array]


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """Take the most likely token, (batch, vocabulary) to (batch,)."""
    return mx.argmax(logprobs, axis=-1)


def _with_history(processor: LogitsProcessor, history: mx.array) -> LogitsProcessor:
    """Show a processor all tokens: mlx-lm's loop shows those of one call only."""
    return lambda tokens, logits: processor(mx.concatenate([history, tokens]), logits)


class Decoder:
    """Feeds tokens to models and samples the next ones.

    mlx-lm's loop computes one token ahead: when it hands a token out, the model has read it. The
    last token before a change of models is different: the next model is the first to read it.

    Args:
        dense: the dense model, which reads that token if nothing follows.
        cache: the prompt cache, one entry per layer.
        prompt: (T,) token ids of the prompt.
        max_tokens: how many tokens to generate at most; -1 for no limit.
        sampler: maps log-probabilities (1, vocabulary) to a token (1,). Default: greedy.
        logits_processors: called with all tokens so far and logits (1, vocabulary).
        **options: passed on to `mlx_lm.generate.generate_step`.

    Attributes:
        cache: the prompt cache.
        tokens: the prompt, and all generated tokens.
        generated: the number of generated tokens.
        limit: the number of tokens to generate at most, or infinity.
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
        self._options = options
        self._latest: tuple[mx.array, mx.array] | None = None

    def last(self, count: int) -> mx.array:
        """Return the last tokens, (count,)."""
        return mx.array(self.tokens[-count:], mx.uint32)

    def run(
        self, model: nn.Module, given: mx.array, until: float, **options: Any
    ) -> Generator[Sampled, None, None]:
        """Feed tokens to a model and generate, up to a number of tokens in all.

        Args:
            model: the model.
            given: (n,) the last n tokens, which are not in the cache yet.
            until: the number of generated tokens to stop at. The model does not read the last of
                them, unless the limit is reached.
            **options: further options for `mlx_lm.generate.generate_step`.

        Yields:
            Each token with its log-probabilities. If the caller stops here, all tokens are in the
            cache, as mlx-lm leaves it.
        """
        is_last_run = until >= self.limit
        until = min(until, self.limit)
        count = -1 if until == math.inf else int(until) - self.generated
        history = mx.array(self.tokens[: len(self.tokens) - given.size], mx.uint32)
        steps = generate_step(
            given,
            model,
            # mlx-lm's loop samples one more token than it yields.
            max_tokens=count if is_last_run else count - 1,
            sampler=self._sample,
            logits_processors=[_with_history(p, history) for p in self._processors],
            prompt_cache=self.cache,
            **self._options,
            **options,
        )
        for token, logprobs in steps:
            self._add(int(token))
            yield int(token), logprobs
        if not is_last_run:
            assert self._latest is not None
            sampled, logprobs = self._latest
            last = int(sampled)
            self._add(last)
            try:
                yield last, logprobs.squeeze(0)
            except GeneratorExit:
                self._read(last)
                raise

    def _sample(self, logprobs: mx.array) -> mx.array:
        self._latest = self._sampler(logprobs), logprobs
        return self._latest[0]

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        self.generated += 1

    def _read(self, token: int) -> None:
        """Put a token into the cache."""
        self._dense(mx.array([[token]], mx.uint32), cache=self.cache)
        mx.eval([layer.state for layer in self.cache])
