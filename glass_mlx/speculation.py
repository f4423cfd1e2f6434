"""Speculative decoding: a draft model proposes tokens, and one pass of the target checks them all.

The target computes every token of the text: it samples a token after each draft, and the drafts
count as far as they are the tokens that it sampled (arXiv 2211.17192, in the form of mlx-lm).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from glass_mlx.block_decoding import (
    Block,
    BlockDecoder,
    CacheQuantization,
    can_take_back,
    longest_trimmable,
)
from glass_mlx.decoding import Sampled
from glass_mlx.models import vocabulary_size
from glass_mlx.prompt_cache import check_layers, make_layers
from glass_mlx.token_observer import TokenObserver

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

# The number of drafts in a pass, as in mlx-lm.
DEFAULT_DRAFT_TOKENS = 2

# The draft model's logit of a token that it does not know.
_UNKNOWN = -1e9

# Samples from logits (rows, vocabulary), the last of which follow all given drafts (n,); returns
# tokens (rows,) and log-probabilities (rows, vocabulary).
Choose = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Drafting:
    """What drafts tokens in a generation.

    Attributes:
        model: the draft model.
        count: the number of tokens that it drafts at once.

    Raises:
        ValueError: if it is no model, or if it cannot draft so many tokens.
    """

    model: nn.Module
    count: int

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"the draft model must be a model, not {type(self.model).__name__}")
        if self.count < 0:
            raise ValueError(f"the number of draft tokens must be at least 0, not {self.count}")

    def split(self, target: nn.Module, cache: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the entries of the target and those of the draft model in a prompt cache.

        Raises:
            ValueError: if they are not those of these models.
        """
        count = len(make_layers(target))
        entries, draft_entries = list(cache[:count]), list(cache[count:])
        check_layers(target, entries)
        if not draft_entries:
            raise ValueError(
                "the prompt cache has no entries for the draft model; make a new one with the "
                "draft model, or leave the draft model out"
            )
        check_layers(self.model, draft_entries)
        return entries, draft_entries

    def check_cache(self, target: nn.Module, cache: list[Any], tokens: float) -> None:
        """Check that drafts can be taken back throughout a generation.

        Args:
            target: the target.
            cache: the entries of both models.
            tokens: the number of tokens to read at most.

        Raises:
            ValueError: if they cannot, or if the entries are not those of these models.
        """
        entries, draft_entries = self.split(target, cache)
        check_trimmable(entries, tokens, "model")
        check_trimmable(draft_entries, tokens, "draft model")


def check_trimmable(cache: list[Any], tokens: float, name: str) -> None:
    """Check that drafts can be taken out of a cache throughout a generation.

    Args:
        cache: the entries of a model.
        tokens: the number of tokens to read into it at most.
        name: what to call the model.

    Raises:
        ValueError: if they cannot.
    """
    if can_take_back(cache, tokens):
        return
    if not can_trim_prompt_cache(cache):
        kinds = {type(entry).__name__ for entry in cache if not entry.is_trimmable()}
        raise ValueError(
            f"speculative decoding must take drafts back, but tokens cannot be taken out of this "
            f"{name}'s cache ({', '.join(sorted(kinds))}); leave the draft model out"
        )
    raise ValueError(
        f"speculative decoding must take drafts back, but this {name}'s cache keeps only "
        f"the latest {longest_trimmable(cache)} tokens of longer texts; generate fewer tokens, or "
        "leave the draft model out"
    )


class Draft:
    """A draft model, which has read some of the text.

    Args:
        drafting: the model.
        cache: its prompt cache.
        size: the number of tokens that the target knows.
        prefill_step_size: how many tokens it reads at once.
        quantize: how its cache is quantized.

    Attributes:
        cache: its prompt cache.
        count: the number of tokens that it drafts at once.
    """

    def __init__(
        self,
        drafting: Drafting,
        cache: list[Any],
        size: int,
        prefill_step_size: int,
        quantize: CacheQuantization,
    ) -> None:
        self.cache, self.count = cache, drafting.count
        self._model, self._size = drafting.model, size
        self._own_size = vocabulary_size(drafting.model)
        self._step_size, self._quantize = prefill_step_size, quantize
        self._tokens_read = 0

    def propose(self, text: list[int], count: int, choose: Choose) -> mx.array:
        """Draft the next tokens.

        Args:
            text: the token ids of the text so far.
            count: the number of tokens.
            choose: how tokens are sampled.

        Returns:
            (count,) token ids. The draft model has read all of them but the last.
        """
        drafts = mx.zeros(0, mx.uint32)
        if count == 0:
            return drafts
        if len(text) - self._tokens_read > 2:  # two, if all drafts of the latest pass were right
            self.read(text[:-1])
        unread = mx.array(text[self._tokens_read :], mx.uint32)
        for _ in range(count):
            unread, _ = choose(self._logits(unread), drafts)
            mx.async_eval(unread)
            drafts = mx.concatenate([drafts, unread])
        self._tokens_read = len(text) + count - 1
        return drafts

    def read(self, text: list[int]) -> None:
        """Read the text's tokens that were not read yet."""
        while unread := text[self._tokens_read :][: self._step_size]:
            self._logits(mx.array(unread, mx.uint32))
            mx.eval([entry.state for entry in self.cache])
            self._tokens_read += len(unread)

    def keep(self, count: int) -> None:
        """Forget all tokens but the first ones of the text."""
        if self._tokens_read > count:
            trim_prompt_cache(self.cache, self._tokens_read - count)
            self._tokens_read = count

    def _logits(self, tokens: mx.array) -> mx.array:
        """Read tokens (n,); return the logits (1, vocabulary) after them, of the target's size.

        Models of one family pad their vocabularies to different sizes.
        """
        known = mx.minimum(tokens, self._own_size - 1)  # MLX does not check indices
        logits = self._model(known[None], cache=self.cache)[:, -1, : self._size]
        self._quantize(self.cache)
        missing = self._size - logits.shape[-1]
        return mx.pad(logits, [(0, 0), (0, missing)], constant_values=_UNKNOWN)


class TargetModel(nn.Module):
    """The target of speculative decoding: each of its passes is dense or sliced as a whole.

    Args:
        dense: the dense model, which shows its tokens to the observer.
        observer: sees what the dense model computes.
        sliced: the sliced model, or None if all passes are dense.
        is_due: whether the dense model computes the next pass.
    """

    def __init__(
        self,
        dense: nn.Module,
        observer: TokenObserver,
        sliced: nn.Module | None = None,
        is_due: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__()
        self.dense, self.sliced = dense, sliced
        self._is_dense = True
        self._observer, self._is_due = observer, is_due

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Compute the logits of a pass; the arguments are the models'."""
        if self.sliced is None:
            return self.dense(*args, **kwargs)
        self._is_dense = self._is_due()
        model = self.dense if self._is_dense else self.sliced
        return model(*args, **kwargs)

    def was_dense(self, _: int) -> bool:
        """Return whether the dense model computed a token, which is of the latest pass."""
        return self._is_dense

    def take(self, count: int) -> None:
        """Note how many tokens of the text the latest pass has computed; the others are void."""
        if self._is_dense:
            self._observer.take(count)


class SpeculativeDecoder(BlockDecoder):
    """A decode loop that lets a draft model propose tokens.

    The first run, which reads the prompt, goes without drafts. In later runs the draft model has
    read all tokens but the last, or fewer, when a block begins.

    Args:
        dense: see `BlockDecoder`, also for the other arguments.
        cache: the prompt cache with the entries of both models. Its list is up to date once the
            generation ends.
        prompt: (T,) token ids of the prompt.
        max_tokens: the maximum number of tokens to generate; -1 for no limit.
        drafting: the draft model.
        prefill_step_size: how many tokens are read at once.
        **options: further arguments of `BlockDecoder`.
    """

    def __init__(
        self,
        dense: nn.Module,
        cache: list[Any],
        prompt: mx.array,
        max_tokens: int,
        drafting: Drafting,
        prefill_step_size: int = 2048,
        **options: Any,
    ) -> None:
        entries, draft_entries = drafting.split(dense, cache)
        options |= {"prefill_step_size": prefill_step_size}
        super().__init__(dense, entries, prompt, max_tokens, **options)
        size = vocabulary_size(dense)
        self._draft = Draft(drafting, draft_entries, size, prefill_step_size, self._quantize)
        self._both = cache
        self._drafted = 0

    def run(
        self, model: nn.Module, unread: mx.array, until: float, **options: Any
    ) -> Generator[Sampled, None, None]:
        """Generate until a total number of tokens is reached; see `Decoder.run`.

        Args:
            model: the model that reads the prompt, and later a `TargetModel`.
            unread: (n,) the last n tokens, which are not in the cache yet; the last one after the
                first run.
            until: the total number of generated tokens to stop at, which no pass exceeds.
            **options: options of the first run.
        """
        if self.generated == 0:
            yield from super().run(model, unread, until, **options)
            return
        assert isinstance(model, TargetModel)
        yield from self._blocks(model, until)

    def _compute(self, model: TargetModel, most: int) -> Block:
        """Draft tokens, and check them in one pass; see `BlockDecoder`."""
        self._drafted = count = min(self._draft.count, most - 1)
        with mx.stream(generation_stream):
            drafts = self._draft.propose(self.tokens, count, self._choose)
            unread = mx.concatenate([self.last(1), drafts])
            logits = model(unread[None], cache=self.cache)
            self._quantize(self.cache)
            sampled, logprobs = self._choose(logits.squeeze(0), drafts)
            mx.eval(sampled, drafts)
        tokens, proposed = [int(t) for t in sampled], [int(t) for t in drafts]
        accepted = 0
        while accepted < count and tokens[accepted] == proposed[accepted]:
            accepted += 1
        return Block(tokens[: accepted + 1], logprobs, accepted)

    def _take(self, model: TargetModel, taken: int) -> None:
        model.take(taken)
        trim_prompt_cache(self.cache, self._drafted + 1 - taken)
        self._draft.keep(len(self.tokens) - 1)

    def _read_last(self, model: TargetModel) -> None:
        self._compute(model, 1)
        model.take(1)
        self._catch_up()

    def _read(self, token: int) -> None:
        super()._read(token)
        self._catch_up()

    def _catch_up(self) -> None:
        """Let the draft model read what it has not read, so that both caches hold the text."""
        with mx.stream(generation_stream):
            self._draft.read(self.tokens)
        self._both[:] = [*self.cache, *self._draft.cache]  # quantized entries are new objects
