"""How far a model's output is expected to depart at each density, and the density for a bound.

The curve is measured once, on text that the model writes itself, with the selection that decoding
uses by default; it is kept in `about["curve"]` of the prior. On the same text it is tried which
FFNs are better kept whole, which is kept in `about["whole"]`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from glass_mlx.fidelity import Continuation, Reading, places, score
from glass_mlx.models import find_ffns
from glass_mlx.prior import GlobalPrior
from glass_mlx.recipes import ChatFrame, Recipe, Writer, chat_frame, source
from glass_mlx.slicing import DEFAULT_DENSITY, DEFAULT_WARMUP, Slicing

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# What measuring on one text takes, for progress: so many readings by a sliced model.
STEPS = 4 + len(DENSITIES)

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
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, Any]:
    """Measure KL divergence from the dense model by density, after choosing FFNs to keep whole.

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
        progress: called with the number of steps done, `STEPS` a text that was asked for in all.

    Returns:
        What belongs into `about` of the prior: "whole", see `_find_whole`, and "curve", which has
        for each of `densities` the mean `kl`, nats a token, and how it was measured.

    Raises:
        ValueError: if no text is long enough.
    """
    frame = _frame(tokenizer)
    kind = "bos" if frame is None else "chat"
    # One number more than a prior's texts have, so that these are others.
    writer = Writer(model, _TEMPERATURE, [seed, 0, 0], lambda count: None)
    write = source(Recipe(kind), writer, tokenizer, length, frame)
    written = [
        Continuation(sequence.tokens[:start], sequence.tokens[start:])
        for batch, at in enumerate(range(0, texts, batch_size))
        for sequence in write(min(batch_size, texts - at), batch)
        for start in [sequence.counted.index(1)]
    ]
    long = [text for text in written if len(text.written) >= max(length // 4, 2 * DEFAULT_WARMUP)]
    progress(STEPS * (texts - len(long)))
    if not long:
        raise ValueError("the model writes no text that is long enough to measure one on")
    prior = replace(prior, about=prior.about | {"whole": _find_whole(model, prior, long, progress)})
    slicings = [Slicing(density=density, prior=prior) for density in DENSITIES]
    return {
        "whole": [*prior.whole],
        "curve": {
            "densities": [*DENSITIES],
            "kl": [round(float(kl), 6) for kl in _kl(model, long, slicings, progress)],
            "recipe": kind,
            "texts": len(long),
            "tokens": sum(len(text.written) - 1 for text in long),
            "temperature": _TEMPERATURE,
        },
    }


def _find_whole(
    model: nn.Module,
    prior: GlobalPrior,
    texts: list[Continuation],
    progress: Callable[[int], object],
) -> list[str]:
    """Choose FFNs to keep whole, at the others' expense: what lowers KL at the default density.

    In some models the first FFNs are worth far more than the rest, in others nothing is gained;
    docs/experiments.md has figures. The first, the second and the last are tried in this order.
    """
    paths = [ffn.path for ffn in find_ffns(model)]
    whole: list[str] = []
    lowest = float("inf")
    for extra in ([], paths[:1], paths[1:2], paths[-1:]):
        trial = [*dict.fromkeys([*whole, *extra])]
        candidate = replace(prior, about=prior.about | {"whole": trial})
        (kl,) = _kl(model, texts, [Slicing(density=DEFAULT_DENSITY, prior=candidate)], progress)
        if kl < lowest:
            whole, lowest = trial, kl
    return whole


def _kl(
    model: nn.Module,
    texts: list[Continuation],
    slicings: list[Slicing],
    progress: Callable[[int], object],
) -> np.ndarray:
    """The mean KL a token over the scored tokens of texts, for each way of slicing."""
    sums = np.zeros(len(slicings))
    for text in texts:
        reading = Reading(model, text, places(slicings, len(text.written)))
        for n, slicing in enumerate(slicings):
            sums[n] += score(reading, slicing).kl.sum()
            progress(1)
    return sums / sum(len(text.written) - 1 for text in texts)


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
