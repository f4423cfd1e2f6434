"""Tables that explain fidelity: how good the rankings are, and how clear the selections are."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from glass_mlx.config import GlassConfig
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.models import with_taps
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.ranking import ranks, spearman
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.session import Session

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

Row = dict[str, Any]

# How many tokens of a text rank the neurons for its remainder, and the shortest remainder.
_BEGINNINGS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MIN_REMAINDER = 64

# After how many generated tokens neurons are selected.
_SELECTION_POINTS = (1, 9, 17, 33, 65, 129)

# How many tokens after the selection are scored.
_HORIZONS = (16, 32, 64, 128)


def ranking_quality(
    session: Session, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[Row]:
    """Measure how well the first tokens of a text, and the prior, rank neurons for the remainder.

    The remainder starts after the longest beginning. The figures are Spearman's correlations, as
    means over FFNs and texts. The certainty of the remainder's ranking bounds them.

    Args:
        session: the dense model's session.
        prior: its prior.
        texts: the texts.
        density: not used.
    """
    correlations: dict[int, list[tuple[float, float]]] = {}
    for text in texts:
        tokens = mx.array([*text.prompt, *text.written])
        lengths = [n for n in _BEGINNINGS if n + _MIN_REMAINDER <= tokens.size]
        beginnings, remainder = _scores_of_parts(session, tokens, lengths)
        by_prior = _correlation(prior.scores[GlassConfig.prior_statistic], remainder)
        for length, scores in zip(lengths, beginnings, strict=True):
            pair = _correlation(scores, remainder), by_prior
            correlations.setdefault(length, []).append(pair)
    return [
        {
            "tokens read": length,
            "their ranking": np.mean(pairs, 0)[0],
            "prior's": np.mean(pairs, 0)[1],
            "texts": len(pairs),
        }
        for length, pairs in sorted(correlations.items())
    ]


def _scores_of_parts(
    session: Session, tokens: mx.array, lengths: list[int]
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return the neurons' scores over each beginning of a text, and over its remainder."""
    local, cache = session.empty_statistics(), make_prompt_cache(session.model)
    scores = []
    for start, stop in zip([0, *lengths], [*lengths, tokens.size], strict=True):
        statistics = local.prompt if stop < tokens.size else local.text
        observed = with_taps(session.model, statistics.update, ffns=session.ffns)
        observed(tokens[None, start:stop], cache=cache)
        mx.eval(statistics.sums)
        scores.append(statistics.scores(GlassConfig.statistic))
    return scores[:-1], scores[-1]


def _correlation(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Return Spearman's correlation of two rankings of neurons, mean over FFNs."""
    values = [spearman(ranks(scores), ranks(b[path])) for path, scores in a.items()]
    return float(np.mean(values))


def selection_margins(
    session: Session, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[Row]:
    """Measure how clear the cut between the last kept neuron and the first dropped neuron is.

    The figures are the gap between the fused scores of these two, and the share of neurons whose
    score is within 1 % of the width from the cut: a little noise moves those to the other side.

    Args:
        session: the dense model's session.
        prior: its prior.
        texts: the texts.
        density: the density to select with.
    """
    selector = session.selector(GlassConfig(density=density, refresh=0), prior)
    margins: dict[int, list[tuple[float, float]]] = {}
    for text in texts:
        points = [n for n in _SELECTION_POINTS if n < len(text.written)]
        reading = DenseReading(session, text, points)
        for n in points:
            fused = selector.fuse(reading.statistics(n))
            rows = [row for s in fused.values() for row in s.reshape(-1, s.shape[-1])]
            margins.setdefault(n, []).extend(_margin(row, density) for row in rows)
    return [
        {"generated": n, "gap / width": np.mean(pairs, 0)[0], "within 1 %": np.mean(pairs, 0)[1]}
        for n, pairs in sorted(margins.items())
    ]


def _margin(scores: np.ndarray, density: float) -> tuple[float, float]:
    """Return the gap at the cut as a share of the width, and the share of neurons near the cut."""
    descending, width = np.sort(scores)[::-1], len(scores)
    kept = min(round(density * width), width - 1)
    near = np.abs(descending - descending[kept - 1]) <= 0.01 * width
    return (descending[kept - 1] - descending[kept]) / width, near.mean()


def kl_by_evidence(
    session: Session, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[Row]:
    """Measure KL by the numbers of tokens before and after a single selection.

    Args:
        session: the dense model's session.
        prior: its prior.
        texts: the texts.
        density: the density to select with.
    """
    prior_weights = {"text alone": 0.0, "fused": GlassConfig.prior_weight}
    base = GlassConfig(density=density, refresh=0, uniform=True)
    values: dict[tuple[str, int, int], list[float]] = {}
    for text in texts:
        points = [n for n in _SELECTION_POINTS if n + min(_HORIZONS) <= len(text.written)]
        configs = {
            (kind, n): replace(base, prior_weight=weight, warmup=n)
            for kind, weight in prior_weights.items()
            for n in points
        }
        reading = DenseReading(session, text, points)
        for (kind, n), config in configs.items():
            kl = score(reading, session.selector(config, prior)).kl[n - 1 :]
            for horizon in _HORIZONS:
                if len(kl) >= horizon:
                    values.setdefault((kind, n, horizon), []).extend(kl[:horizon])
    return [
        {"selection by": kind, "generated": n}
        | {
            f"KL in {horizon}": np.mean(values[kind, n, horizon])
            for horizon in _HORIZONS
            if (kind, n, horizon) in values
        }
        for kind, n in dict.fromkeys((kind, n) for kind, n, _ in values)
    ]


ABLATIONS: dict[str, Callable[[Session, GlobalPrior, Iterable[Continuation], float], list[Row]]] = {
    "rankings": ranking_quality,
    "margins": selection_margins,
    "evidence": kl_by_evidence,
}


def format_ablation(rows: list[Row]) -> str:
    """Format the rows of an ablation as a Markdown table."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return markdown_table(columns, cells, left=("selection by",), padded=False)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
