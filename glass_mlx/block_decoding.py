"""Decode loops that compute several tokens before they sample them: drafts, and then a check."""

import math
from abc import abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from glass_mlx.cache_masks import cache_parts
from glass_mlx.decoding import Decoder, Sampled

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import can_trim_prompt_cache

# The attributes with the number of tokens that a cache holds at most.
_BOUNDS = ("max_size", "chunk_size")


@dataclass(frozen=True)
class CacheQuantization:
    """How the keys and values of a cache are quantized; see `mlx_lm.generate.generate_step`."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __call__(self, cache: list[Any]) -> None:
        """Quantize the entries of a cache in place, once they are long enough."""
        maybe_quantize_kv_cache(cache, **vars(self))

    def tokens_before(self, cache: list[Any]) -> float:
        """Return how many more tokens a cache reads before it is quantized."""
        read = max((getattr(entry, "offset", 0) for entry in cache), default=0)
        is_due = self.kv_bits is not None and read < self.quantized_kv_start
        return self.quantized_kv_start - read if is_due else math.inf


def longest_trimmable(cache: Iterable[Any]) -> float:
    """Return how long a text may become until its tokens can no longer be taken out of a cache."""
    bounds = [
        getattr(part, attribute, math.inf) for part in cache_parts(cache) for attribute in _BOUNDS
    ]
    return min(bounds, default=math.inf)


def can_take_back(cache: list[Any], tokens: float) -> bool:
    """Return whether the next tokens can be taken out of a cache after it has read them.

    Args:
        cache: the entries.
        tokens: the number of tokens to read at most.
    """
    return can_trim_prompt_cache(cache) and all(
        longest_trimmable([part]) > getattr(part, "offset", 0) + tokens
        for part in cache_parts(cache)
    )


class Block(NamedTuple):
    """The tokens of a block that belong to the text.

    Attributes:
        tokens: their ids.
        logprobs: (rows, vocabulary) log-probabilities, at least a row for each token.
        drafts: how many of the tokens a draft model proposed.
    """

    tokens: list[int]
    logprobs: mx.array
    drafts: int = 0


class BlockDecoder(Decoder):
    """A decode loop that samples tokens in blocks.

    Runs of a model that does not compute blocks, such as the one that reads the prompt, are those
    of `Decoder`. When a block begins, the model has read all tokens but the last.

    Args:
        *args: arguments of `Decoder`.
        quantization: how the keys and values are quantized.
        **options: further arguments of `Decoder`.
    """

    def __init__(
        self, *args: Any, quantization: CacheQuantization | None = None, **options: Any
    ) -> None:
        self._quantize = quantization or CacheQuantization()
        super().__init__(*args, **(options | vars(self._quantize)))

    def _blocks(self, model: Any, until: float) -> Generator[Sampled, None, None]:
        """Generate until a total number of tokens is reached, which no block exceeds.

        It ends earlier if the model asks for that; see `_is_over`.
        """
        until = min(until, self.limit)
        while self.generated < until and not self._is_over(model):
            block = self._compute(model, int(min(until - self.generated, 2**31)))
            for number, token in enumerate(block.tokens, 1):
                self._add(token)
                try:
                    yield Sampled(token, block.logprobs[number - 1], number <= block.drafts)
                except GeneratorExit:
                    self._take(model, number)
                    self._read_last(model)
                    raise
            self._take(model, len(block.tokens))
        if self.generated == self.limit:
            self._read_last(model)

    def _is_over(self, model: Any) -> bool:
        """Return whether a run ends before the next block, although there are tokens left."""
        return False

    @abstractmethod
    def _compute(self, model: Any, most: int) -> Block:
        """Compute a block of at most so many tokens."""

    @abstractmethod
    def _take(self, model: Any, taken: int) -> None:
        """End a block, of whose tokens the text has taken so many: all others are void."""

    @abstractmethod
    def _read_last(self, model: Any) -> None:
        """Put the last token into the cache, and sample one more token, as mlx-lm's loop does."""

    def _choose(self, logits: mx.array, drafts: mx.array) -> tuple[mx.array, mx.array]:
        """Sample tokens from their logits.

        Args:
            logits: (rows, vocabulary), the last of which follow all drafts.
            drafts: (n,) the tokens after the text so far.

        Returns:
            The tokens (rows,) and their log-probabilities (rows, vocabulary).
        """
        if not self._processors:
            logprobs = _log_probabilities(logits)
            return self._sampler(logprobs), logprobs
        text = self._history.text(self.tokens[-self.generated :])
        first, sampled, rows = drafts.size + 1 - len(logits), [], []
        for place in range(len(logits)):
            row = logits[place : place + 1]
            so_far = mx.concatenate([text, drafts[: first + place]])
            for processor in self._processors:
                row = processor(so_far, row)
            rows.append(_log_probabilities(row))
            sampled.append(self._sampler(rows[-1]))
        return mx.concatenate(sampled), mx.concatenate(rows)


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
