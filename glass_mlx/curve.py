"""How far a model's output is expected to depart at each density, and the density for a bound.

The curve is measured once, on text that the model writes itself, with the selection that decoding
uses by default; it is kept in `about["curve"]` of the prior.
"""

from collections.abc import Callable
from typing import Any

from glass_mlx.fidelity import Continuation, Reading, places, score
from glass_mlx.prior import GlobalPrior
from glass_mlx.recipes import Recipe, Writer, chat_frame, source
from glass_mlx.slicing import Slicing

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# As a user would sample, and not as widely as a prior's texts are.
_TEMPERATURE = 0.7


def measure_curve(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    texts: int,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[int], object] = lambda texts: None,
) -> dict[str, Any]:
    """Measure KL divergence from the dense model by density.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        prior: its prior.
        texts: how many texts to measure on: answers to questions that the model asks itself or,
            without a chat template, what it goes on with after a beginning of its own.
        length: tokens a text.
        seed: of the texts.
        progress: called with 1 after each text.

    Returns:
        What belongs into `about["curve"]`: for each of `densities` the mean `kl`, nats a token,
        and how it was measured.
    """
    kind = "chat" if tokenizer.has_chat_template else "bos"
    # One number more than a prior's texts have, so that these are others.
    writer = Writer(model, _TEMPERATURE, [seed, 0, 0], lambda count: None)
    frame = chat_frame(tokenizer) if kind == "chat" else None
    sequences = source(Recipe(kind), writer, tokenizer, length, frame)(texts, 0)
    sums, tokens = np.zeros(len(DENSITIES)), 0
    for sequence in sequences:
        start = sequence.counted.index(1)
        text = Continuation(sequence.tokens[:start], sequence.tokens[start:])
        if len(text.written) > 1:
            slicings = [Slicing(density=density, prior=prior) for density in DENSITIES]
            reading = Reading(model, text, places(slicings, len(text.written)))
            sums += [score(reading, slicing).kl.sum() for slicing in slicings]
            tokens += reading.tokens
        progress(1)
    if tokens == 0:
        raise ValueError("the model writes no text to measure a curve on")
    return {
        "densities": [*DENSITIES],
        "kl": [round(float(kl), 6) for kl in sums / tokens],
        "recipe": kind,
        "texts": len(sequences),
        "tokens": tokens,
        "temperature": _TEMPERATURE,
    }


def expected_density(prior: GlobalPrior | None, max_kl: float) -> float:
    """The lowest density that is expected to stay within a KL divergence from the dense model.

    Args:
        prior: the model's prior, with a curve.
        max_kl: the bound, in nats a token.

    Returns:
        A density, at least the lowest measured one. Between these, and from the highest of them to
        1, where KL is 0, the curve is taken as straight.

    Raises:
        ValueError: if the bound is not positive, or there is no curve.
    """
    if not 0 < max_kl < float("inf"):
        raise ValueError(f"max_kl must be positive, not {max_kl}")
    curve = None if prior is None else prior.about.get("curve")
    if curve is None:
        raise ValueError(
            "the density auto needs a prior with a density curve, which this one does not have; "
            "build the prior again, or give a density"
        )
    densities = np.array([*curve["densities"], 1.0])
    # What more neurons do worse is noise: the expectation never rises with the density.
    kl = np.maximum.accumulate(np.array([*curve["kl"], 0.0])[::-1])[::-1]
    within = int(np.argmax(kl <= max_kl))
    if within == 0:
        return float(densities[0])
    low, high = within - 1, within
    share = (kl[low] - max_kl) / (kl[low] - kl[high])
    return float(densities[low] + share * (densities[high] - densities[low]))
