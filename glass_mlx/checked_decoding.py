"""Decoding with drafts from a shortlist, which the whole head checks: the dense model's own text.

The body of the model computes every token, and a head with few rows samples a draft of the next
one. After some drafts, one product of the whole head with the vectors of all of them samples every
token anew, with the same random numbers. So drafts are the dense model's tokens unless one of these
is not in the shortlist. This is self-speculative decoding (arXiv 2309.08168) of the head alone.
"""

import copy
from collections.abc import Callable, Generator
from typing import Any

from glass_mlx.block_decoding import Block, BlockDecoder, can_take_back
from glass_mlx.decoding import Sampled
from glass_mlx.draft_shortlist import MAX_WRONG
from glass_mlx.models import DraftingModel
from glass_mlx.random_state import random_key, set_random_key

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import trim_prompt_cache


class CheckedModel(nn.Module):
    """A model that drafts with a sliced head, and checks with the whole one.

    Args:
        drafting: the model with the sliced head.
        hidden: the list to which the sliced head adds the vectors that it sees.
        check: computes the whole logits (1, n, vocabulary) of vectors (1, n, hidden).
        observe: sees the probabilities (n, vocabulary) of predictions for tokens of the text.
        count: the number of drafts in a block.

    Attributes:
        passes: how many tokens were drafted, or read again.
        checks: how many times the whole head was read.
        wrong: how many blocks ended with a wrong draft.
    """

    def __init__(
        self,
        drafting: DraftingModel,
        hidden: list[mx.array],
        check: Callable[[mx.array], mx.array],
        observe: Callable[[mx.array], None],
        count: int,
    ) -> None:
        super().__init__()
        self._drafting, self._hidden, self._check = drafting, hidden, check
        self._observe = observe
        self._probabilities = mx.zeros(0)
        self.count, self.passes, self.checks, self.wrong = count, 0, 0, 0

    def __call__(self, token: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array]:
        """Read a token (1,); return logits (1, vocabulary) and log-probabilities of the next."""
        self.passes += 1
        logits, total = self._drafting(token[None], cache=cache)
        return logits[:, -1], logits[:, -1] - total[:, -1]

    def check(self) -> tuple[mx.array, mx.array]:
        """Return the whole logits and log-probabilities of all drafts since the last check.

        Both are (n, vocabulary). Exponentials of a whole vocabulary take long on a CPU, so they are
        computed once for the log-probabilities and for what is observed.
        """
        self.checks += 1
        logits = self._check(mx.concatenate(self._hidden, axis=-2)).squeeze(0)
        self._hidden.clear()
        shifted = logits - logits.max(axis=-1, keepdims=True)
        exponentials = mx.exp(shifted.astype(mx.float32))
        total = exponentials.sum(axis=-1, keepdims=True)
        self._probabilities = exponentials / total
        return logits, shifted - mx.log(total).astype(logits.dtype)

    def forget(self) -> None:
        """Leave out of the next check what was computed since the last one."""
        self._hidden.clear()

    def take(self, count: int) -> None:
        """Observe the first predictions of the latest check. The others follow a wrong draft."""
        self._observe(self._probabilities[:count])


class CheckedDecoder(BlockDecoder):
    """A decode loop whose tokens are drafted with a shortlist and checked with the whole head.

    The arguments are those of `BlockDecoder`. Entries of the cache from which tokens cannot be
    taken are copied before each block.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._drafted = 0
        self._before: list[Any] | None = None
        self._keys: list[mx.array] = []

    def run(
        self, model: nn.Module, unread: mx.array, until: float, **options: Any
    ) -> Generator[Sampled, None, None]:
        """Generate until a total number of tokens is reached; see `Decoder.run`.

        Args:
            model: the dense model, or a `CheckedModel`.
            unread: (n,) the last n tokens, which are not in the cache yet; for a `CheckedModel` the
                last one.
            until: the total number of generated tokens to stop at.
            **options: options of runs of the dense model.
        """
        if isinstance(model, CheckedModel):
            yield from self._blocks(model, until)
        else:
            yield from super().run(model, unread, until, **options)

    def _is_over(self, model: CheckedModel) -> bool:
        return model.wrong >= MAX_WRONG

    def _compute(self, model: CheckedModel, most: int) -> Block:
        """Draft tokens one by one, and check all of them; see `BlockDecoder`."""
        # The cache is quantized after as many tokens as without drafts.
        unquantized = self._quantize.tokens_before(self.cache)
        self._drafted = count = int(min(model.count, most, unquantized))
        self._before = None if can_take_back(self.cache, count) else copy.deepcopy(self.cache)
        with mx.stream(generation_stream):
            key, unread, drafts = random_key(), self.last(1), mx.zeros(0, mx.uint32)
            for _ in range(count):
                unread, _ = self._choose_one(*model(unread, self.cache), drafts)
                unread = unread.astype(mx.uint32)
                mx.async_eval(unread)
                drafts = mx.concatenate([drafts, unread])
            set_random_key(key)
            logits, logprobs = model.check()
            sampled, rows, self._keys = [], [], []
            for place in range(count):
                row = slice(place, place + 1)
                token, chosen_from = self._choose_one(logits[row], logprobs[row], drafts[:place])
                sampled.append(token)
                rows.append(chosen_from)
                self._keys.append(random_key())
            mx.eval(sampled, drafts, self._keys)
        tokens, proposed = [int(t) for t in sampled], [int(t) for t in drafts]
        right = 0
        while right < count - 1 and tokens[right] == proposed[right]:
            right += 1
        return Block(tokens[: right + 1], mx.concatenate(rows))

    def _choose_one(
        self, logits: mx.array, logprobs: mx.array, drafts: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Sample a token from its logits, (1, vocabulary); see `_choose`.

        Args:
            logits: the logits, for logits processors.
            logprobs: the log-probabilities that they stand for.
            drafts: (n,) the tokens after the text so far.
        """
        if self._processors:
            return self._choose(logits, drafts)
        return self._sampler(logprobs), logprobs

    def _take(self, model: CheckedModel, taken: int) -> None:
        with mx.stream(generation_stream):
            model.take(taken)
        set_random_key(self._keys[taken - 1])
        void = self._drafted - taken
        model.wrong += void > 0
        with mx.stream(generation_stream):
            if void and self._before is None:
                trim_prompt_cache(self.cache, void)
            elif void:
                self._read_again(model, self.tokens[-taken - 1 : -1])
            self._quantize(self.cache)

    def _read_again(self, model: CheckedModel, tokens: list[int]) -> None:
        """Go back to the cache before the block, and read those of its tokens that were right."""
        assert self._before is not None
        self.cache[:] = self._before
        for token in tokens:
            model(mx.array([token], mx.uint32), self.cache)
            mx.eval([entry.state for entry in self.cache])
        model.forget()

    def _read_last(self, model: CheckedModel) -> None:
        self._read(self.tokens[-1])
