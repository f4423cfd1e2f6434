"""How far a model's output is expected to depart at each density, and the density for a bound.

The curve is measured once, on text that the model writes itself, with the selection that decoding
uses by default; it is kept in `about["curve"]` of the prior.
"""

from collections.abc import Callable
from typing import Any

from glass_mlx.fidelity import Continuation, Reading, places, score
from glass_mlx.prior import GlobalPrior
from glass_mlx.recipes import ChatFrame, Recipe, Writer, chat_frame, source
from glass_mlx.slicing import DEFAULT_WARMUP, Slicing

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# As a user would sample, and not as widely as a prior's texts are.
_TEMPERATURE = 0.7


def _frame(tokenizer: TokenizerWrapper) -> ChatFrame | None:
    """What stands around a question, or None if the model cannot ask itself one."""
    try:
        return chat_frame(tokenizer)
    except ValueError:
        return None


def measure_curve(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    texts: int,
    length: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], object] = lambda texts: None,
) -> dict[str, Any]:
    """Measure KL divergence from the dense model by density.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        prior: its prior.
        texts: how many texts to measure on: answers to questions that the model asks itself or,
            if its chat template does not allow for that, what it goes on with after a beginning of
            its own. Those with less than a quarter of the length are left out: dense warm-up is
            most of them.
        length: tokens a text.
        batch_size: texts written at once.
        seed: of the texts.
        progress: called with 1 after each text.

    Returns:
        What belongs into `about["curve"]`: for each of `densities` the mean `kl`, nats a token,
        and how it was measured.

    Raises:
        ValueError: if no text is long enough.
    """
    frame = _frame(tokenizer)
    kind = "bos" if frame is None else "chat"
    # One number more than a prior's texts have, so that these are others.
    writer = Writer(model, _TEMPERATURE, [seed, 0, 0], lambda count: None)
    write = source(Recipe(kind), writer, tokenizer, length, frame)
    slicings = [Slicing(density=density, prior=prior) for density in DENSITIES]
    sums, tokens, used = np.zeros(len(DENSITIES)), 0, 0
    for batch, at in enumerate(range(0, texts, batch_size)):
        for sequence in write(min(batch_size, texts - at), batch):
            start = sequence.counted.index(1)
            text = Continuation(sequence.tokens[:start], sequence.tokens[start:])
            if len(text.written) >= max(length // 4, 2 * DEFAULT_WARMUP):
                kl = _kl(model, text, slicings)
                sums, tokens, used = sums + kl.sum(-1), tokens + kl.shape[-1], used + 1
            progress(1)
    if not used:
        raise ValueError("the model writes no text that is long enough to measure one on")
    return {
        "densities": [*DENSITIES],
        "kl": [round(float(kl), 6) for kl in sums / tokens],
        "recipe": kind,
        "texts": used,
        "tokens": tokens,
        "temperature": _TEMPERATURE,
    }


def _kl(model: nn.Module, text: Continuation, slicings: list[Slicing]) -> np.ndarray:
    """KL of each way of slicing for each scored token of a text, (slicings, T)."""
    reading = Reading(model, text, places(slicings, len(text.written)))
    return np.stack([score(reading, slicing).kl for slicing in slicings])


def check_bound(max_kl: float) -> None:
    """Raise ValueError unless this can bound a KL divergence."""
    if not 0 < max_kl < float("inf"):
        raise ValueError(f"the bound on KL must be positive, not {max_kl}")


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
    check_bound(max_kl)
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
