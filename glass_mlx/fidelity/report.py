"""Summarize scores of single prompts as figures with intervals, and format these as tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from glass_mlx.fidelity.scoring import Scores
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selection, jaccard

import numpy as np

# The method that others are compared with.
BASELINE = "prompt-only"

# The number of tokens per point of "kl_by_position".
POSITION_BIN = 32

_RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """The result of a method on one prompt.

    Attributes:
        kl: KL divergence from the dense model of each scored token, nats.
        nll: -log p of each scored token, nats.
        agrees: share of scored tokens whose most likely token is the dense model's.
        exact: for each answer in the text, whether every token was the most likely one.
        dense: number of generated tokens that are computed densely.
        density: share of neurons in the slices, or None if all tokens are computed densely.
        vocabulary: share of the vocabulary in the slices, or None likewise; with drafts, the mean
            over the choices of shortlists.
        sliced_bytes: bytes of weights that a sliced token reads, over the dense model's, or None
            likewise.
        run_bytes: the same, averaged over all tokens, with dense tokens.
        jaccard: agreement with the oracle's selection, one value per FFN. Empty if all tokens are
            computed densely, or no oracle is known.
    """

    kl: list[float]
    nll: list[float]
    agrees: float
    exact: list[bool]
    dense: int
    density: float | None
    vocabulary: float | None
    sliced_bytes: float | None
    run_bytes: float
    jaccard: list[float]

    @staticmethod
    def of(
        scores: Scores, oracle: Selection | None, answers: Sequence[tuple[int, int]] = ()
    ) -> "Outcome":
        """Condense the scores of a method on one text.

        Args:
            scores: the scores.
            oracle: the selection to compare the method's selections with, if there are any.
            answers: the ranges of scored tokens that hold an answer.
        """
        selections = [*scores.selections.values()]
        vocabulary = [*scores.vocabulary.values()] or [1.0]
        sliced = ~scores.dense
        agreement = [
            [*jaccard(selection, oracle).values()] for selection in selections if oracle is not None
        ]
        return Outcome(
            kl=[round(float(value), 6) for value in scores.kl],
            nll=[round(float(value), 6) for value in scores.nll],
            agrees=float(scores.agrees.mean()),
            exact=[bool(scores.right[start:stop].all()) for start, stop in answers],
            dense=int(scores.dense.sum()) + 1,
            density=float(np.mean([s.density for s in selections])) if selections else None,
            vocabulary=float(np.mean(vocabulary)) if selections else None,
            sliced_bytes=float(scores.bytes[sliced].mean()) if sliced.any() else None,
            run_bytes=float(scores.bytes.mean()),
            jaccard=np.mean(agreement, axis=0).tolist() if agreement else [],
        )

    @property
    def generated(self) -> int:
        """The number of generated tokens: the scored tokens and the first."""
        return len(self.kl) + 1


class _Estimate(NamedTuple):
    """Mean KL and perplexity per token, over the prompts and over each resample of them."""

    kl: float
    perplexity: float
    kl_resamples: np.ndarray
    perplexity_resamples: np.ndarray


def _estimate(outcomes: Sequence[Outcome], seed: int) -> _Estimate:
    prompts = len(outcomes)
    (kl,), (perplexity,) = _token_means(outcomes, np.ones((1, prompts), np.int64))
    # The same seed draws the same prompts, which pairs the resamples of two methods.
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=_RESAMPLES)
    return _Estimate(float(kl), float(perplexity), *_token_means(outcomes, draws))


def _token_means(outcomes: Sequence[Outcome], draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean KL and perplexity, both (n,), for prompts drawn `draws` (n, prompts) times."""
    tokens = draws @ np.array([len(o.kl) for o in outcomes])
    kl = draws @ np.array([sum(o.kl) for o in outcomes])
    nll = draws @ np.array([sum(o.nll) for o in outcomes])
    return kl / tokens, np.exp(nll / tokens)


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def summarize(
    outcomes: Sequence[Outcome], baseline: Sequence[Outcome] | None, seed: int
) -> dict[str, Any]:
    """Compute the figures of one method and density, with 95 % bootstrap intervals over prompts.

    Args:
        outcomes: the outcome of each prompt.
        baseline: the outcomes of the method to compare with, on the same prompts.
        seed: the seed of the resampling.
    """
    estimate = _estimate(outcomes, seed)
    figures = _means(outcomes, estimate) | _curves(outcomes)
    if outcomes[0].exact:
        figures["exact"] = float(np.mean([o.exact for o in outcomes]))
    if baseline is not None:
        figures |= _changes(estimate, _estimate(baseline, seed))
    return figures


def _means(outcomes: Sequence[Outcome], estimate: _Estimate) -> dict[str, Any]:
    compared = [o.jaccard for o in outcomes if o.jaccard]
    lengths = [len(o.kl) for o in outcomes]
    generated = sum(o.generated for o in outcomes)
    top1 = float(np.average([o.agrees for o in outcomes], weights=lengths))
    return {
        "density_got": _mean(o.density for o in outcomes),
        "vocabulary_got": _mean(o.vocabulary for o in outcomes),
        "bytes_share": _mean(o.sliced_bytes for o in outcomes),
        "run_share": float(np.average([o.run_bytes for o in outcomes], weights=lengths)),
        "perplexity": estimate.perplexity,
        "perplexity_95": _interval(estimate.perplexity_resamples),
        "kl": estimate.kl,
        "kl_95": _interval(estimate.kl_resamples),
        "kl_p99": float(np.percentile(np.concatenate([o.kl for o in outcomes]), 99)),
        "top1": top1,
        "flip_rate": 1 - top1,
        "jaccard": float(np.mean(compared)) if compared else 1.0,
        "prompts": len(outcomes),
        "tokens": generated,
        "dense_share": sum(o.dense for o in outcomes) / generated,
    }


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None, or 1 if there are none."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else 1.0


def _curves(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    agreement = [o.jaccard for o in outcomes if o.jaccard]
    return {
        "jaccard_by_layer": np.mean(agreement, axis=0).tolist() if agreement else [],
        "kl_by_position": [
            float(np.mean(np.concatenate([o.kl[start : start + POSITION_BIN] for o in outcomes])))
            for start in range(0, max(len(o.kl) for o in outcomes), POSITION_BIN)
        ],
    }


def _changes(estimate: _Estimate, baseline: _Estimate) -> dict[str, Any]:
    """Return the changes from a baseline. KL is left out if the baseline's KL may be zero."""
    changes: dict[str, Any] = {}
    if np.all(baseline.kl_resamples > 0):
        ratios = estimate.kl_resamples / baseline.kl_resamples
        changes["kl_change"] = estimate.kl / baseline.kl - 1
        changes["kl_change_95"] = _interval(ratios - 1)
    ratios = estimate.perplexity_resamples / baseline.perplexity_resamples
    changes["perplexity_change"] = estimate.perplexity / baseline.perplexity - 1
    changes["perplexity_change_95"] = _interval(ratios - 1)
    return changes


# Headings of the table, and the figures below them.
_COLUMNS = {
    "max KL": "max_kl",
    "density": "density_got",
    "vocabulary": "vocabulary_got",
    "bytes": "bytes_share",
    "run": "run_share",
    "method": "method",
    "KL": "kl",
    "± 95 %": "kl_95",
    "99 %": "kl_p99",
    "perplexity": "perplexity",
    "same top": "top1",
    "exact": "exact",
    "Jaccard": "jaccard",
    "KL change": "kl_change",
    "95 %": "kl_change_95",
    "PPL change": "perplexity_change",
    "dense": "dense_share",
}
_PERCENT = ("kl_change", "kl_change_95", "perplexity_change")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "kl_95":
        return f"{(value[1] - value[0]) / 2:.3f}"
    if key in _PERCENT:
        values = value if isinstance(value, list) else [value]
        return " to ".join(f"{100 * v:+.1f}" for v in values) + " %"
    if isinstance(value, str):
        return value
    return f"{value:g}" if key == "max_kl" else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def format_table(rows: Sequence[dict[str, Any]], markdown: bool) -> str:
    """Format the rows as a table, in Markdown or plainly for a screen."""
    columns = {
        title: key
        for title, key in _COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }
    cells = [[_cell(key, row.get(key)) for key in columns.values()] for row in rows]
    table = markdown_table([*columns], cells, left=("method",))
    if markdown:
        return table
    heading, _, *lines = table.split("\n")
    return "\n".join(line.removeprefix("| ").removesuffix(" |") for line in (heading, *lines))
