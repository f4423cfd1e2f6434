"""A prompt cache that continues from turn to turn, with the statistics of the tokens in it.

The functions have the names of mlx-lm's functions and can replace them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from glass_mlx.cache_masks import cache_parts
from glass_mlx.session import Session
from glass_mlx.statistics import LocalStatistics, Shape, Total, alone

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache

# A cache with a maximum size always keeps this many tokens of the beginning, as in mlx-lm.
_SINKS = 4

# The statistics at the beginning of this many turns are kept, for trimming.
_MAX_TURNS = 4


@dataclass(frozen=True)
class Turn:
    """One use of a prompt cache, in which a prompt was read and an answer generated.

    Attributes:
        start: the number of tokens in `PromptCache.tokens` before the turn.
        prompt_end: their number after the turn's prompt.
        before: the local statistics before the turn.
        before_last: the local statistics before the last token of the turn's prompt; None if this
            is its only token. A prompt that is given again trims the cache to this point.
    """

    start: int
    prompt_end: int
    before: LocalStatistics
    before_last: LocalStatistics | None = None


class PromptCache(list[Any]):
    """mlx-lm's prompt cache, one entry per layer, with its tokens and their statistics.

    If tokens are trimmed from the cache, by whatever function, `tokens` and `statistics` follow.
    Sums over tokens cannot be taken apart, so the statistics go back to the latest point that is
    known and within the remaining tokens: the end of the prompt, the token before it, or the
    beginning of one of the latest turns. If there is none, they begin anew.

    Args:
        layers: the entries.
        statistics: the local statistics of the tokens; None for a cache from mlx-lm.
        tokens: the ids of the tokens; for a cache from mlx-lm, only those that are added later.

    Attributes:
        intact: whether the contents of the cache are known. They are unknown after an error in the
            middle of a generation.
        unlisted: how many tokens have no ids, because they were given as embeddings.
        turns: the latest turns.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        statistics: LocalStatistics | None,
        tokens: Iterable[int] = (),
    ) -> None:
        super().__init__(layers)
        self._statistics, self._tokens, self.intact = statistics, list(tokens), True
        self.unlisted = (token_count(self) or len(self._tokens)) - len(self._tokens)
        self.turns: list[Turn] = []
        # The statistics before the current turn, and before the last token of its prompt.
        self._before: LocalStatistics | None = None
        self._before_last: LocalStatistics | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptCache":
        """Return a copy, such as for one of several questions about the same prompt."""
        statistics = None if self.statistics is None else self.statistics.copy()
        other = PromptCache(copy.deepcopy([*self], memo), statistics, self.tokens)
        other.intact, other.unlisted, other.turns = self.intact, self.unlisted, [*self.turns]
        return other

    @property
    def tokens(self) -> list[int]:
        """The ids of the tokens in the cache; see the arguments."""
        self._follow_trimming()
        return self._tokens

    @property
    def statistics(self) -> LocalStatistics | None:
        """The local statistics of tokens in the cache; None if no tokens were read with any."""
        self._follow_trimming()
        return self._statistics

    def begin(
        self, shapes: Mapping[str, Shape], vocabulary_size: int, total: Total = alone
    ) -> LocalStatistics:
        """Begin to read tokens into the cache, which is not intact until `add` records them.

        Args:
            shapes: the number of neurons m of each FFN, or (experts, m), by path.
            vocabulary_size: the number of tokens V that the model knows.
            total: for a divided model; see `NeuronStatistics`.

        Returns:
            The statistics to add the tokens to.

        Raises:
            ValueError: if the cache is not intact, has tokens that were read without this
                package, or belongs to another model.
        """
        self.check("begin a new one")
        empty = LocalStatistics.empty(shapes, total=total)
        statistics = self._statistics or empty
        sums = statistics.vocabulary.sums
        other_size = sums is not None and sums.size != vocabulary_size
        if statistics.prompt.shapes != empty.prompt.shapes or other_size:
            raise ValueError("the statistics of the prompt cache are of another model")
        self._statistics, self._before = statistics, statistics.copy()
        self._before_last = None
        self.intact = False
        return statistics

    def follow_prompt(self, tokens_read: int, total: int) -> None:
        """Note how far the prompt has been read; call it for mlx-lm's reports of progress."""
        if 0 < tokens_read == total - 1 and self._statistics is not None:
            self._before_last = self._statistics.copy()

    def add(self, tokens: Iterable[int], prompt_tokens: int) -> None:
        """Record the tokens that were read into the cache, the first of which are the prompt."""
        start, added = len(self._tokens), [*tokens]
        self._tokens += added
        assert self._before is not None
        self.turns.append(Turn(start, start + prompt_tokens, self._before, self._before_last))
        del self.turns[:-_MAX_TURNS]
        count = token_count(self)
        if count is not None and count != self.unlisted + len(self._tokens):
            # The prompt was given as embeddings, which have no token ids.
            self._tokens, self.unlisted, self.turns = added, count - len(added), []
        self.intact = True

    def check(self, consequence: str) -> None:
        """Raise ValueError unless the contents of the cache are known.

        Args:
            consequence: what follows from an error in the middle of a generation.
        """
        if not self.intact:
            raise ValueError(f"the prompt cache was left in the middle of a step; {consequence}")
        count, known = token_count(self), self.unlisted + len(self.tokens)
        if count is not None and count > known:
            raise ValueError(
                f"the prompt cache has {count - known} tokens that glass_mlx did not read, so its "
                "statistics do not fit; trim them with trim_prompt_cache, or begin a new one"
            )

    def _follow_trimming(self) -> None:
        """Forget the tokens that are no longer in the cache, and their statistics."""
        count = token_count(self)
        if not self.intact or count is None or count >= self.unlisted + len(self._tokens):
            return
        self.unlisted = min(self.unlisted, count)
        del self._tokens[count - self.unlisted :]
        if self._statistics is not None:
            self._statistics = self._earlier_statistics(self._statistics)

    def _earlier_statistics(self, latest: LocalStatistics) -> LocalStatistics:
        """Return the latest known statistics that count only tokens in `tokens`."""
        remaining, prompt = len(self._tokens), latest.prompt
        while self.turns:
            turn = self.turns[-1]
            if turn.prompt_end <= remaining:
                vocabulary = turn.before.vocabulary
                return LocalStatistics(prompt, turn.before.text, vocabulary).copy()
            self.turns.pop()
            if turn.before_last is not None and turn.prompt_end - 1 == remaining:
                # What is left of the prompt is a turn without an answer.
                self.turns.append(Turn(turn.start, remaining, turn.before))
                return turn.before_last.copy()
            if turn.start <= remaining:
                return turn.before.copy()
            prompt = turn.before.prompt
        return LocalStatistics.empty(prompt.shapes, prompt.names, prompt.total)


def token_count(cache: Iterable[Any]) -> int | None:
    """Return the number of tokens that were read into a cache, or None if it does not count.

    Layers without attention have caches, too, which stay empty.
    """
    offsets = (getattr(part, "offset", None) for part in cache_parts(cache))
    return max((offset for offset in offsets if isinstance(offset, int)), default=None)


def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
    """Trim the last tokens from a prompt cache, as mlx-lm's function of this name does.

    The tokens and statistics of a `PromptCache` follow; mlx-lm's own function does the same.

    Args:
        cache: the cache.
        num_tokens: the number of tokens to trim.

    Returns:
        The number of tokens that were trimmed; 0 if the cache of a layer cannot be trimmed.
    """
    return cast(int, mlx_lm_cache.trim_prompt_cache(cache, num_tokens))


def trim_to_shared(cache: PromptCache, tokens: list[int]) -> int | None:
    """Trim a prompt cache to the tokens that it shares with a prompt.

    At least the last token of the prompt is left to read.

    Args:
        cache: the cache.
        tokens: the token ids of the whole prompt.

    Returns:
        How many tokens of the prompt are in the cache; None if the cache cannot be trimmed, because
        it has lost earlier contents, or begins with tokens that are not known.
    """
    if cache.unlisted:
        return None
    held = cache.tokens
    pairs = zip(held, tokens[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared < len(held):
        trim_prompt_cache(cache, len(held) - shared)
    return shared if shared == len(cache.tokens) else None


def check_layers(model: nn.Module, cache: list[Any]) -> None:
    """Raise ValueError if a prompt cache does not have the layers that a model needs."""
    own = mlx_lm_cache.make_prompt_cache(model)
    kinds, own_kinds = ([_kind(layer) for layer in layers] for layers in (cache, own))
    if kinds != own_kinds:
        raise ValueError(
            f"the prompt cache does not fit the model: it has {_describe(kinds)}, and the model "
            f"needs {_describe(own_kinds)}"
        )


def _kind(layer: Any) -> str:
    """Return a name for what an entry holds. Caches of keys and values can replace each other."""
    return "keys and values" if hasattr(layer, "update_and_fetch") else type(layer).__name__


def _describe(kinds: list[str]) -> str:
    """Return text such as "4 layers (ArraysCache, keys and values)"."""
    return f"{len(kinds)} layers ({', '.join(dict.fromkeys(kinds))})"


def make_prompt_cache(
    model: nn.Module | Session,
    max_kv_size: int | None = None,
    draft_model: nn.Module | None = None,
) -> PromptCache:
    """Make an empty prompt cache, as `mlx_lm.models.cache.make_prompt_cache` does.

    In every turn, pass the cache to `stream_generate` as `prompt_cache`, with the new tokens only.

    Args:
        model: the model, or a session of it.
        max_kv_size: the maximum number of tokens in a layer; see `make_layers`.
        draft_model: the draft model of speculative decoding, whose entries come last.

    Raises:
        ValueError: if the model cannot be sliced.
    """
    session = Session.of(model)
    layers = make_layers(session.model, max_kv_size, draft_model)
    return PromptCache(layers, session.empty_statistics())


def make_layers(
    model: nn.Module, max_kv_size: int | None = None, draft_model: nn.Module | None = None
) -> list[Any]:
    """Make the empty entries of a prompt cache.

    mlx-lm bounds only the caches of models that do not make their own, which leaves out most
    models. Here, every cache that would grow without end is bounded.

    Args:
        model: the model.
        max_kv_size: the maximum number of tokens in an entry: the first ones and the latest.
        draft_model: the draft model of speculative decoding, whose entries come last.
    """
    layers = mlx_lm_cache.make_prompt_cache(model)
    if draft_model is not None:
        layers += mlx_lm_cache.make_prompt_cache(draft_model)
    if max_kv_size is None:
        return layers
    sinks = min(_SINKS, max_kv_size // 2)
    return [
        RotatingKVCache(max_kv_size, keep=sinks) if type(layer) is KVCache else layer
        for layer in layers
    ]


def make_empty_copy(model: nn.Module | Session, cache: PromptCache) -> PromptCache:
    """Make an empty prompt cache with the rotating windows of another cache of the model."""
    fresh = make_prompt_cache(model)
    for n, layer in enumerate(cache):
        if type(layer) is RotatingKVCache:
            fresh[n] = RotatingKVCache(layer.max_size, keep=layer.keep)
    return fresh


def read_prompt(
    model: nn.Module | Session,
    tokens: list[int],
    cache: PromptCache,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **kwargs: Any,
) -> None:
    """Read tokens into a prompt cache without generating any.

    Args:
        model: the model that the cache was made for.
        tokens: the token ids to read.
        cache: a new cache, which is filled in place.
        progress: called with the number of tokens read so far, and the total number.
        **kwargs: passed on to `mlx_lm.generate.generate_step`.
    """
    session = Session.of(model)
    session.check_tokens(tokens)
    statistics = cache.begin(session.shapes, session.vocabulary_size, session.total)

    def evaluate(tokens_read: int, total: int) -> None:
        mx.eval(statistics.prompt.sums)
        progress(tokens_read, total)

    # With no tokens to generate, mlx-lm's loop samples one token that the model does not read.
    steps = generate_step(
        mx.array(tokens, mx.uint32),
        session.observed_on_prompt(statistics),
        max_tokens=0,
        prompt_cache=cache,
        prompt_progress_callback=evaluate,
        **kwargs,
    )
    for _ in steps:
        pass
    mx.eval(statistics.prompt.sums)
    cache.add(tokens, len(tokens))
