"""A request on its way: what it asks for, and what has been generated for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from glass_mlx.config import GlassConfig
from glass_mlx.generation_report import Report

import mlx.core as mx
from mlx_lm.server import CompletionRequest, Response
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token with its log-probability, and the most likely tokens in its place.

    Attributes:
        id: the token's id.
        text: its text.
        logprob: its log-probability.
        top: the most likely tokens, most likely first, without alternatives of their own.
    """

    id: int
    text: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


def token_logprob(
    token: int, logprobs: mx.array, top: int, tokenizer: TokenizerWrapper
) -> TokenLogprob:
    """Return the log-probability of a token, and of the most likely ones.

    Args:
        token: the token's id.
        logprobs: (vocabulary,) log-probabilities.
        top: how many of the most likely tokens to return.
        tokenizer: gives the tokens' texts.
    """
    ids = cast(list[int], mx.argsort(-logprobs)[:top].tolist()) if top > 0 else []
    values = cast(list[float], logprobs[mx.array([token, *ids])].tolist())
    texts = [tokenizer.decode([identifier]) for identifier in (token, *ids)]
    alternatives = map(TokenLogprob, ids, texts[1:], values[1:])
    return TokenLogprob(token, texts[0], values[0], tuple(alternatives))


@dataclass
class Piece(Response):
    """mlx-lm's response to a generated token, with what our answers have in addition.

    Attributes:
        number: the number of tokens so far.
        report: the report on the slicing.
        seconds: the time since the first token.
        logprobs: the token's log-probability, if it was asked for and not sent before.
    """

    number: int
    report: Report
    seconds: float
    logprobs: TokenLogprob | None = None


@dataclass
class Job(CompletionRequest):
    """mlx-lm's request, with how to slice, and with what has been generated.

    Attributes:
        config: how the answer is sliced.
        is_dense: whether the dense model answers.
        trace: whether the stream says what is kept.
        is_gone: returns whether the client has closed the connection.
        is_abandoned: whether nobody waits for the answer any more.
        latest: the latest piece of the answer.
        logprobs: log-probabilities that were not sent yet.
    """

    config: GlassConfig = field(default_factory=GlassConfig)
    is_dense: bool = False
    trace: bool = False
    is_gone: Callable[[], bool] = lambda: False
    is_abandoned: bool = False
    latest: Piece | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Return what other ranks need to know of the request: all but its connection."""
        return {name: value for name, value in vars(self).items() if name != "is_gone"}

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return 0 if self.latest is None else self.latest.number

    def receive(self, piece: Piece) -> None:
        """Note a piece of the answer."""
        self.latest = piece
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)

    def take_logprobs(self) -> list[TokenLogprob]:
        """Return the log-probabilities that were not sent yet, which counts as sending them."""
        taken, self.logprobs = self.logprobs, []
        return taken
