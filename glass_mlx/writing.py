"""Sample text from a model, many sequences at once."""

from collections.abc import Callable
from contextlib import closing
from itertools import chain

from glass_mlx.models import check_tokens, vocabulary_size

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper


def stop_sequences(tokenizer: TokenizerWrapper) -> list[list[int]]:
    """Return the end-of-sequence tokens in the form that a `Writer` takes."""
    return [[token] for token in sorted(tokenizer.eos_token_ids)]


class Writer:
    """A sampler of text from a model, many sequences at once.

    Args:
        model: the model.
        temperature: the sampling temperature.
        seed: numbers that seed the sampling. The same seed and batch give the same text.
        progress: called at every step with the number of tokens written.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        seed: list[int],
        progress: Callable[[int], object],
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature of sampling must be positive, not {temperature}")
        self.model, self.temperature = model, temperature
        self._seed, self._progress = seed, progress

    def __call__(
        self,
        prompts: list[list[int]],
        lengths: list[int],
        stop: list[list[int]],
        batch: int,
        turn: int = 0,
    ) -> list[list[int]]:
        """Continue prompts, each up to a maximum number of tokens.

        Args:
            prompts: the token ids to continue.
            lengths: the maximum number of tokens to write after each prompt.
            stop: sequences of token ids that end a text.
            batch: the number of the batch. Together with `turn` and the seed it determines the
                random numbers.
            turn: the number of the turn within the batch.

        Returns:
            The new token ids of each text, including the sequence that ended it.

        Raises:
            ValueError: if a prompt has a token that the model does not know.
        """
        check_tokens(chain.from_iterable(prompts), vocabulary_size(self.model))
        state = np.random.SeedSequence([*self._seed, batch, turn]).generate_state(1)[0]
        key = mx.random.key(int(state))

        def sampler(logprobs: mx.array) -> mx.array:
            nonlocal key
            key, step = mx.random.split(key)
            return mx.random.categorical(logprobs / self.temperature, key=step)

        generator = BatchGenerator(
            self.model,
            sampler=sampler,
            stop_tokens=stop,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        with closing(generator):
            texts: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts, lengths)}
            while responses := generator.next_generated():
                for response in responses:
                    texts[response.uid].append(response.token)
                self._progress(len(responses))
        return list(texts.values())
