"""Decoding with drafts from a shortlist, which the whole head checks: the text of the whole head.

The body of the model, dense or sliced, computes every token, and a head with few rows samples a
draft of the next one. After some drafts, one product of the whole head with the vectors of all of
them samples every token anew, with the same random numbers. So drafts are the tokens of the whole
head unless one of these is not in the shortlist. This is self-speculative decoding (arXiv
2309.08168) of the head alone.
"""

import copy
from collections.abc import Callable, Generator
from typing import Any

from glass_mlx.block_decoding import Block, BlockDecoder, can_take_back
from glass_mlx.decoding import Sampled
from glass_mlx.draft_shortlist import MAX_MISSING, DraftShortlister
from glass_mlx.models import DraftingModel, Ranks
from glass_mlx.random_state import random_key, set_random_key
from glass_mlx.token_observer import TokenObserver

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import trim_prompt_cache


class CheckedModel(nn.Module):
    """A model that drafts with a sliced head, and checks with the whole one.

    Args:
        sliced: the sliced model with the sliced head.
        dense: the dense model with the sliced head, which shows its tokens to the observer.
        is_dense: whether the dense model drafts a token, by its number.
        hidden: the list to which the sliced head adds the vectors that it sees.
        check: computes the whole logits (1, n, vocabulary) of vectors (1, n, hidden).
        observer: sees what the dense model computes.
        shortlister: has chosen the tokens of the sliced head, and sees the predictions.

    Attributes:
        count: the number of drafts in a block.
        passes: how many tokens were drafted, or read again.
        dense_passes: how many of them by the dense model.
        checks: how many times the whole head was read.
        missing: how many tokens that replaced wrong drafts were not in the shortlist.
    """

    def __init__(
        self,
        sliced: DraftingModel,
        dense: DraftingModel,
        is_dense: Callable[[int], bool],
        hidden: list[mx.array],
        check: Callable[[mx.array], mx.array],
        observer: TokenObserver,
        shortlister: DraftShortlister,
    ) -> None:
        super().__init__()
        self._sliced, self._dense, self._is_dense = sliced, dense, is_dense
        self._hidden, self._check = hidden, check
        self._observer, self._shortlister = observer, shortlister
        self._probabilities = mx.zeros(0)
        self._drafted: list[int] = []
        self.count = shortlister.count
        self.passes, self.dense_passes, self.checks, self.missing = 0, 0, 0, 0

    def __call__(self, token: mx.array, cache: list[Any], number: int) -> tuple[mx.array, mx.array]:
        """Read a token and predict the next one.

        Args:
            token: (1,) its id.
            cache: the prompt cache.
            number: the number of the next token among the generated ones.

        Returns:
            Its logits (1, vocabulary) and log-probabilities (1, vocabulary).
        """
        self.passes += 1
        self.dense_passes += self._is_dense(number)
        return self.read(token, cache, number)

    def read(self, token: mx.array, cache: list[Any], number: int) -> tuple[mx.array, mx.array]:
        """Do the same without counting it, at the end of a text, where no loop counts."""
        is_dense = self._is_dense(number)
        logits, total = (self._dense if is_dense else self._sliced)(token[None], cache=cache)
        if is_dense:
            self._observer.end_pass(1)
        self._drafted.append(number)
        return logits[:, -1], logits[:, -1] - total[:, -1]

    def check(self) -> tuple[mx.array, mx.array]:
        """Return the whole logits and log-probabilities of all drafts since the last check.

        Both are (n, vocabulary). Exponentials of a whole vocabulary take long on a CPU, so they are
        computed once for the log-probabilities and for what is observed.
        """
        logits = self._check(mx.concatenate(self._hidden, axis=-2)).squeeze(0)
        self._hidden.clear()
        largest = logits.max(axis=-1, keepdims=True).astype(mx.float32)
        exponentials = mx.exp(logits.astype(mx.float32) - largest)
        total = exponentials.sum(axis=-1, keepdims=True)
        self._probabilities = exponentials / total
        # Rounded as in mlx-lm, which subtracts a `logsumexp` of the logits' type.
        return logits, logits - (largest + mx.log(total)).astype(logits.dtype)

    def correct(self, token: int) -> None:
        """Note that a token of the text has replaced a wrong draft."""
        assert self._shortlister.shortlist is not None
        self._shortlister.wrong += 1
        self.missing += bool(self._shortlister.shortlist.shares[token] > 0)

    def take(self, count: int) -> None:
        """Observe the first tokens of the latest check. The others follow a wrong draft."""
        self._shortlister.add(self._probabilities[:count])
        self._end_passes(count, len(self._probabilities))

    def forget(self) -> None:
        """Leave out of the next check, and do not observe, what was read since the last one."""
        self._hidden.clear()
        self._end_passes(0, len(self._drafted))

    def _end_passes(self, count: int, total: int) -> None:
        """Tell the observer that of the earliest tokens, only the first ones are of the text."""
        for place, number in enumerate(self._drafted[:total]):
            if self._is_dense(number):
                self._observer.take(int(place < count))
        del self._drafted[:total]


class CheckedDecoder(BlockDecoder):
    """A decode loop whose tokens are drafted with a shortlist and checked with the whole head.

    While the caller has the tokens of a block, the device computes the first draft of the next one.
    Entries of the cache from which tokens cannot be taken are copied before each block instead.

    Args:
        *args: arguments of `BlockDecoder`.
        ranks: the ranks that hold some of the layers each, and decide together.
        **options: further arguments of `BlockDecoder`.
    """

    def __init__(self, *args: Any, ranks: Ranks | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ranks = ranks or Ranks()
        self._held = 0  # how many tokens of the block the cache has read
        self._before: list[Any] | None = None
        self._keys: list[mx.array] = []
        # The first draft (1,) of the next block, and the random state after it.
        self._begun: tuple[mx.array, mx.array] | None = None

    def run(
        self, model: nn.Module, unread: mx.array, until: float, **options: Any
    ) -> Generator[Sampled, None, None]:
        """Generate until a total number of tokens is reached; see `Decoder.run`.

        Args:
            model: the dense or the sliced model, or a `CheckedModel`.
            unread: (n,) the last n tokens, which are not in the cache yet; for a `CheckedModel` the
                last one.
            until: the total number of generated tokens to stop at.
            **options: options of runs without checks.
        """
        if isinstance(model, CheckedModel):
            yield from self._blocks(model, until)
        else:
            yield from super().run(model, unread, until, **options)

    def can_take_back(self, tokens: int) -> bool:
        """Return whether the next tokens can be taken out of the cache after it has read them."""
        return all(self._ranks.gather(can_take_back(self.cache, tokens)))

    def _is_over(self, model: CheckedModel) -> bool:
        return model.missing >= MAX_MISSING

    def _compute(self, model: CheckedModel, most: int) -> Block:
        """Draft tokens one by one, and check all of them; see `BlockDecoder`."""
        most = min(most, self._unquantized())
        self._held = count = min(model.count, most)
        if self._begun is None:
            is_copied = not self.can_take_back(count)
            self._before = copy.deepcopy([*self.cache]) if is_copied else None
        with mx.stream(generation_stream):
            key = random_key()
            drafts = self._draft(model, count)
            set_random_key(key)
            logits, logprobs = model.check()
            model.checks += 1
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
        taken = right + 1
        if tokens[right] != proposed[right]:
            model.correct(tokens[right])
        if self._before is None:
            trim_prompt_cache(self.cache, count - taken)
            self._held = taken
            if taken < most and not self._is_over(model):
                self._begin(model, tokens[right], taken)
        return Block(tokens[:taken], mx.concatenate(rows))

    def _unquantized(self) -> int:
        """Return how many tokens the next block may have before the cache is quantized.

        It is quantized after as many tokens as without drafts.
        """
        tokens = min(self._ranks.gather(self._quantize.tokens_before(self.cache)))
        return int(min(tokens + (self._begun is not None), 2**31))

    def _draft(self, model: CheckedModel, count: int) -> list[mx.array]:
        """Draft the tokens (1,) of a block. Some may have been drafted before."""
        unread, drafts = self.last(1), []
        if self._begun is not None:
            unread, key = self._begun
            set_random_key(key)
            drafts.append(unread)
            self._begun = None
        while len(drafts) < count:
            unread = self._draft_one(model, unread, len(drafts), drafts)
            mx.async_eval(unread)
            drafts.append(unread)
        return drafts

    def _draft_one(
        self, model: CheckedModel, unread: mx.array, ahead: int, drafts: list[mx.array]
    ) -> mx.array:
        """Return a draft (1,) of the next token, lazily.

        Args:
            model: the model.
            unread: (1,) the token before it, which is not in the cache yet.
            ahead: how many tokens before it are not in the text yet.
            drafts: these tokens, for logits processors.
        """
        prediction = model(unread, self.cache, self.generated + ahead + 1)
        return self._choose_one(*prediction, drafts)[0].astype(mx.uint32)

    def _begin(self, model: CheckedModel, token: int, taken: int) -> None:
        """Compute the first draft of the next block, after the last of the tokens of this one.

        A logits processor may wait for the tokens before the one that it is called for, and copies
        of a cache are made before a block begins; so there is no such draft then.
        """
        if self._processors or not self.can_take_back(model.count):
            return
        with mx.stream(generation_stream):
            set_random_key(self._keys[taken - 1])
            draft = self._draft_one(model, mx.array([token], mx.uint32), taken, [])
            key = random_key()
            mx.async_eval(key)  # before the draft, so that nobody who reads it waits for the draft
            mx.async_eval(draft)
        self._begun = draft, key

    def _choose_one(
        self, logits: mx.array, logprobs: mx.array, drafts: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Sample a token from its logits, (1, vocabulary); see `_choose`.

        Args:
            logits: the logits, for logits processors.
            logprobs: the log-probabilities that they stand for.
            drafts: the tokens (1,) after the text so far.
        """
        if self._processors:
            return self._choose(logits, mx.concatenate([mx.zeros(0, mx.uint32), *drafts]))
        return self._sampler(logprobs), logprobs

    def _take(self, model: CheckedModel, taken: int) -> None:
        with mx.stream(generation_stream):
            model.take(taken)
        set_random_key(self._keys[taken - 1])
        void = self._held - taken
        if void:
            self._drop_begun(model)
        with mx.stream(generation_stream):
            if void and self._before is None:
                trim_prompt_cache(self.cache, void)
            elif void:
                self._read_again(model, self.tokens[-taken - 1 : -1])
            self._before = None
            self._quantize(self.cache)

    def _drop_begun(self, model: CheckedModel) -> None:
        """Take the first token of the next block back, if it was read."""
        if self._begun is not None:
            self._begun = None
            trim_prompt_cache(self.cache, 1)
            model.forget()

    def _read_again(self, model: CheckedModel, tokens: list[int]) -> None:
        """Go back to the cache before the block, and read those of its tokens that were right."""
        assert self._before is not None
        self.cache[:] = self._before
        first = self.generated - len(tokens) + 1
        for number, token in enumerate(tokens, first):
            model(mx.array([token], mx.uint32), self.cache, number)
            mx.eval([entry.state for entry in self.cache])
        model.forget()

    def _read_last(self, model: CheckedModel) -> None:
        with mx.stream(generation_stream):
            if self._begun is None:  # else the model has read the token
                model.read(self.last(1), self.cache, self.generated + 1)
            self._begun = None
            logits, logprobs = model.check()
            token, _ = self._choose_one(logits, logprobs, [])
            model.take(1)
            self._quantize(self.cache)
            mx.eval(token, random_key(), [entry.state for entry in self.cache])
