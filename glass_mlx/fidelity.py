"""How close a sliced model stays to the dense one, scored as the GLASS paper does.

The dense model writes a continuation of a prompt. The sliced one is scored on it token by token,
with the prompt read densely and the FFNs sliced from the first generated token on.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glass_mlx.models import find_ffns, with_taps
from glass_mlx.recipes import Writer, ends
from glass_mlx.statistics import NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what the dense model wrote after it.

    Attributes:
        prompt: the prompt's token ids, with its chat template.
        written: the token ids that the dense model wrote.
    """

    prompt: list[int]
    written: list[int]


def encode(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Token ids of a prompt, inside the chat template if there is one."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def continue_densely(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[str],
    tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Continuation]:
    """Have the dense model continue prompts by up to `tokens` tokens, all in one batch."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    write = Writer(model, temperature, [seed], progress)
    written = write(encoded, [tokens] * len(encoded), ends(tokenizer), batch=0)
    return [Continuation(*pair) for pair in zip(encoded, written, strict=True)]


class Reading:
    """A continuation as the dense model reads it: what others are scored against.

    Args:
        model: the dense model.
        text: the continuation.
        statistics: which statistics to keep.

    Attributes:
        prompt_statistics: the statistics of the prompt.
        oracle_statistics: those of the continuation, which selection cannot know.
        dense: (T, vocabulary) log-probabilities of the token after each written one but the last.
    """

    def __init__(
        self, model: nn.Module, text: Continuation, statistics: tuple[str, ...] = ("activation",)
    ) -> None:
        widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
        self.prompt_statistics = NeuronStatistics(widths, statistics)
        self.oracle_statistics = NeuronStatistics(widths, statistics)
        self._cache, self._written = make_prompt_cache(model), text.written
        prompt = with_taps(model, self.prompt_statistics.update)
        prompt(mx.array(text.prompt)[None], cache=self._cache)
        mx.eval([layer.state for layer in self._cache], self.prompt_statistics.sums)
        self.dense = self.score(with_taps(model, self.oracle_statistics.update))
        mx.eval(self.dense, self.oracle_statistics.sums)

    def score(self, model: nn.Module) -> mx.array:
        """Log-probabilities (T, vocabulary) of a model that goes on after the dense prompt."""
        cache = copy.deepcopy(self._cache)
        logits = model(mx.array(self._written[:-1])[None], cache=cache)[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def negative_log_likelihood(self, scored: mx.array) -> mx.array:
        """-log p, (T,) nats, of the written tokens after the first."""
        following = mx.array(self._written[1:])
        return -mx.take_along_axis(scored, following[:, None], axis=-1).squeeze(-1)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q), (T,) nats a token, of log-probabilities (T, vocabulary)."""
    return (mx.exp(p) * (p - q)).sum(-1)
