"""Measure a prior's density curve, and choose the FFNs that are better kept dense.

Both are measured once, on text that the model writes itself, with the selection that decoding uses
by default. The prior's `about["curve"]` holds the curve, and `about["whole"]` the FFNs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from glass_mlx.calibration.texts import BatchSource, ChatFrame, Recipe, chat_frame, make_source
from glass_mlx.config import GlassConfig
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.prior.density_curve import conditions
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.renewal import all_selection_points
from glass_mlx.session import Session
from glass_mlx.writing import Writer

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# The number of readings by a sliced model per text, for progress bars.
READINGS_PER_TEXT = 4 + len(DENSITIES)

# Users sample at about this temperature. The texts of a prior have a higher temperature.
_TEMPERATURE = 0.7


def measure_curve(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    texts: int,
    length: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], object] = lambda readings: None,
) -> dict[str, Any]:
    """Choose the FFNs to keep dense, and measure KL from the dense model by density.

    The texts are answers to questions that the model asks itself. If its chat template does not
    allow that, they are continuations of a beginning that the model wrote. Texts with less than a
    quarter of the length are left out, because most of their tokens are dense warm-up.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        prior: its prior.
        texts: how many texts to measure on.
        length: tokens per text.
        batch_size: texts written at once.
        seed: the seed of the texts.
        progress: called with the number of new readings, `READINGS_PER_TEXT` for each text.

    Returns:
        Entries for `about` of the prior: "whole", the FFNs to keep dense, and "curve", with the
        mean `kl` in nats per token for each of `densities`, and the conditions of the measurement.

    Raises:
        ValueError: if no text is long enough.
    """
    frame = _frame(tokenizer)
    kind = "bos" if frame is None else "chat"
    # A prior's texts have a seed of two numbers, so a seed of three gives different texts.
    writer = Writer(model, _TEMPERATURE, [seed, 0, 0], lambda count: None)
    source = make_source(Recipe(kind), writer, tokenizer, length, frame)
    shortest = max(length // 4, 2 * GlassConfig.warmup)
    all_texts = _write_texts(source, texts, batch_size)
    long_texts = [text for text in all_texts if len(text.written) >= shortest]
    progress(READINGS_PER_TEXT * (texts - len(long_texts)))
    if not long_texts:
        raise ValueError("the model writes no text that is long enough to measure a curve on")
    session = Session.of(model)
    kept_dense = _choose_kept_dense(session, prior, long_texts, progress)
    prior = replace(prior, about=prior.about | {"whole": kept_dense})
    configs = [GlassConfig(density=density) for density in DENSITIES]
    kl_by_density = _kl(session, prior, long_texts, configs, progress)
    return {
        "whole": kept_dense,
        "curve": {
            "densities": [*DENSITIES],
            "kl": [round(float(kl), 6) for kl in kl_by_density],
            "recipe": kind,
            "texts": len(long_texts),
            "tokens": sum(len(text.written) - 1 for text in long_texts),
            "temperature": _TEMPERATURE,
            "conditions": conditions(GlassConfig(), session.weight_format),
        },
    }


def _frame(tokenizer: TokenizerWrapper) -> ChatFrame | None:
    """Return the chat frame, or None if the model cannot ask itself a question."""
    try:
        return chat_frame(tokenizer)
    except ValueError:
        return None


def _write_texts(source: BatchSource, texts: int, batch_size: int) -> list[Continuation]:
    """Write texts in batches, each split where the tokens that count begin."""
    return [
        Continuation(sequence.tokens[:begin], sequence.tokens[begin:])
        for batch, start in enumerate(range(0, texts, batch_size))
        for sequence in source(min(batch_size, texts - start), batch)
        for begin in [sequence.mask.index(1)]
    ]


def _choose_kept_dense(
    session: Session,
    prior: GlobalPrior,
    texts: list[Continuation],
    progress: Callable[[int], object],
) -> list[str]:
    """Choose FFNs to keep dense at the others' expense: those that lower KL at density 0.5.

    In some models the first FFNs matter far more than the others; in other models, keeping FFNs
    dense gains nothing (docs/experiments.md has figures). The first, the second and the last are
    tried, in this order.
    """
    paths = [ffn.path for ffn in session.ffns]
    kept_dense: list[str] = []
    lowest = float("inf")
    for extra in ([], paths[:1], paths[1:2], paths[-1:]):
        trial = [*dict.fromkeys([*kept_dense, *extra])]
        candidate = replace(prior, about=prior.about | {"whole": trial})
        (kl,) = _kl(session, candidate, texts, [GlassConfig()], progress)
        if kl < lowest:
            kept_dense, lowest = trial, kl
    return kept_dense


def _kl(
    session: Session,
    prior: GlobalPrior,
    texts: list[Continuation],
    configs: list[GlassConfig],
    progress: Callable[[int], object],
) -> np.ndarray:
    """Return the mean KL per scored token, for each configuration."""
    sums = np.zeros(len(configs))
    for text in texts:
        points = all_selection_points(configs, len(text.written))
        reading = DenseReading(session, text, points)
        for n, config in enumerate(configs):
            sums[n] += score(reading, session.selector(config, prior)).kl.sum()
            progress(1)
    return sums / sum(len(text.written) - 1 for text in texts)
