"""KL divergence of a model that is sliced once, for all texts, such as an exported one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import divergence
from glass_mlx.vocabulary import log_probabilities

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

_PREFILL_STEP = 512


class Divergence(NamedTuple):
    """A measured KL divergence from the dense model.

    Attributes:
        kl: the mean over tokens, in nats per token.
        standard_error: the standard error of this mean over texts; infinite for a single text.
        tokens: the number of tokens.
    """

    kl: float
    standard_error: float
    tokens: int

    def __str__(self) -> str:
        """Return the mean and its standard error, as in `0.123 ± 0.020`."""
        error = f" ± {self.standard_error:.3f}" if np.isfinite(self.standard_error) else ""
        return f"{self.kl:.3f}{error}"


def read_texts(
    model: nn.Module,
    texts: Sequence[Continuation],
    progress: Callable[[int], object] = lambda count: None,
) -> list[mx.array]:
    """Return a model's log-probabilities (n, vocabulary) float32 of the n written tokens of texts.

    Args:
        model: the model, dense or sliced, which reads the prompts, too.
        texts: the texts.
        progress: called with 1 after each text.
    """
    results = []
    for text in texts:
        results.append(read_alone(model, text))
        progress(1)
    return results


def read_alone(model: nn.Module, text: Continuation, size: int | None = None) -> mx.array:
    """Return a model's log-probabilities of the n written tokens of a text.

    Args:
        model: the model, which reads the prompt, too.
        text: the text.
        size: only the first tokens of the vocabulary count. Default: all.

    Returns:
        (n, size) float32.
    """
    # Some models share keys and values between layers by their caches.
    cache, prompt = make_prompt_cache(model), text.prompt[:-1]
    for start in range(0, len(prompt), _PREFILL_STEP):
        mx.eval(model(mx.array([prompt[start : start + _PREFILL_STEP]]), cache=cache)[:, -1])
    tokens = text.prompt[-1:] + text.written[:-1]
    logprobs = log_probabilities(model(mx.array([tokens]), cache=cache)[0, :, :size])
    mx.eval(logprobs)
    return logprobs


def compare(dense: Sequence[mx.array], sliced: Sequence[mx.array]) -> Divergence:
    """Return the divergence of a sliced model from the dense one.

    Args:
        dense: the dense model's log-probabilities, as `read_texts` returns them.
        sliced: those of the sliced model for the same texts.

    Raises:
        ValueError: if they are not finite.
    """
    pairs = zip(dense, sliced, strict=True)
    sums = np.array([divergence(p, q).sum().item() for p, q in pairs])
    if not np.isfinite(sums).all():
        raise ValueError(
            "the model computes probabilities that are not a number in this precision; try another "
            "one with --dtype"
        )
    counts = np.array([len(p) for p in dense])
    mean, texts = sums.sum() / counts.sum(), len(counts)
    # The error of a ratio of two sums over texts: of KL, and of tokens.
    residuals = np.square(sums - mean * counts).sum() * texts / max(1, texts - 1)
    error = residuals**0.5 / counts.sum() if texts > 1 else np.inf
    return Divergence(float(mean), float(error), int(counts.sum()))
