"""From scores token by token to intervals, JSON rows, tables and plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glass_mlx.files import replacing

import numpy as np

BASELINE = "prompt-only"
_RESAMPLES = 2000
_BIN = 32  # tokens, of the curves by position


@dataclass(frozen=True)
class Outcome:
    """How a method did on one prompt.

    Attributes:
        kl: KL divergence from the dense model of each scored token, nats.
        nll: -log p of each.
        agrees: share of them where the most likely token is the dense model's.
        exact: for each answer in the text, whether all its tokens were the most likely ones.
        dense: generated tokens that are computed densely.
        reread: generated tokens that are read again.
        density: share of neurons in the slices, or None if all tokens are computed densely.
        jaccard: agreement with the oracle's neurons, a value a layer; empty likewise.
    """

    kl: list[float]
    nll: list[float]
    agrees: float
    exact: list[bool]
    dense: int
    reread: int
    density: float | None
    jaccard: list[float]

    @property
    def generated(self) -> int:
        """The number of generated tokens: those scored, and the first."""
        return len(self.kl) + 1


def _draws(prompts: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each resampling, (resamples, prompts)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=_RESAMPLES)


def _per_token(outcomes: Sequence[Outcome], draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean KL and perplexity in each resampling."""
    tokens = draws @ np.array([len(o.kl) for o in outcomes])
    kl, nll = (draws @ np.array([sum(getattr(o, n)) for o in outcomes]) for n in ("kl", "nll"))
    return kl / tokens, np.exp(nll / tokens)


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def row(
    outcomes: Sequence[Outcome], baseline: Sequence[Outcome] | None, seed: int
) -> dict[str, Any]:
    """The figures of one method and density, with 95 % bootstrap intervals over prompts.

    Args:
        outcomes: of each prompt.
        baseline: what the method is paired with, on the same prompts.
        seed: of the resampling.
    """
    one = np.ones((1, len(outcomes)), np.int64)
    draws = _draws(len(outcomes), seed)
    (kl,), (perplexity,) = _per_token(outcomes, one)
    kls, perplexities = _per_token(outcomes, draws)
    every = np.concatenate([o.kl for o in outcomes])
    lengths = np.array([len(o.kl) for o in outcomes])
    generated = sum(o.generated for o in outcomes)
    sliced = [o for o in outcomes if o.density is not None]
    figures = {
        "density_got": float(np.mean([o.density for o in sliced])) if sliced else 1.0,
        "perplexity": float(perplexity),
        "perplexity_95": _interval(perplexities),
        "kl": float(kl),
        "kl_95": _interval(kls),
        "kl_p99": float(np.percentile(every, 99)),
        "top1": float(np.average([o.agrees for o in outcomes], weights=lengths)),
        "jaccard": float(np.mean([o.jaccard for o in sliced])) if sliced else 1.0,
        "prompts": len(outcomes),
        "tokens": generated,
        "dense_share": sum(o.dense for o in outcomes) / generated,
        "reread_share": sum(o.reread for o in outcomes) / generated,
        "jaccard_by_layer": np.mean([o.jaccard for o in sliced], axis=0).tolist() if sliced else [],
        "kl_by_position": [
            float(np.mean(np.concatenate([o.kl[at : at + _BIN] for o in outcomes])))
            for at in range(0, max(lengths), _BIN)
        ],
    }
    if outcomes[0].exact:
        figures["exact"] = float(np.mean([o.exact for o in outcomes]))
    if baseline is not None:
        (kl_0,), (perplexity_0,) = _per_token(baseline, one)
        kls_0, perplexities_0 = _per_token(baseline, draws)
        if np.all(kls_0 > 0):
            figures |= {
                "kl_change": float(kl / kl_0 - 1),
                "kl_change_95": _interval(kls / kls_0 - 1),
            }
        figures |= {
            "perplexity_change": float(perplexity / perplexity_0 - 1),
            "perplexity_change_95": _interval(perplexities / perplexities_0 - 1),
        }
    return figures


_COLUMNS = {
    "density": "density",
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
    "reread": "reread_share",
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
    return f"{value:g}" if key == "density" else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def table(rows: Sequence[dict[str, Any]], markdown: bool) -> str:
    """The rows as a table, for a screen or in Markdown."""
    columns = {n: key for n, key in _COLUMNS.items() if any(key in found for found in rows)}
    cells = [[*columns], *([_cell(key, r.get(key)) for key in columns.values()] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(
            text.ljust(width) if name == "method" else text.rjust(width)
            for name, text, width in zip(columns, line, widths, strict=True)
        )
        for line in cells
    ]
    if not markdown:
        return "\n".join(lines)
    rule = " | ".join(":---" if name == "method" else "---:" for name in columns)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw KL by density, by position and by λ, and agreement with the oracle by layer."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    densities = sorted({row["density"] for row in rows})
    files = []

    def figure(title: str, xlabel: str, ylabel: str, **panels: Any) -> tuple[Figure, Any]:
        drawing = Figure(figsize=(8, 4.5 * panels.get("nrows", 1)), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(squeeze=False, **panels)[:, 0]
        drawing.suptitle(title)
        for axis in axes:
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.grid(alpha=0.3)
        return drawing, axes

    def save(drawing: Figure, axes: Any, name: str) -> None:
        for axis in axes:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
        with replacing(folder / f"{name}.png") as temporary:
            drawing.savefig(temporary, format="png", dpi=110)
        files.append(folder / f"{name}.png")

    model = rows[0]["model"]
    shown = [m for m in methods if m != "dense" and "λ" not in m]
    twenty = [colormaps["tab20"](n) for n in (*range(0, 20, 2), *range(1, 20, 2))]
    colors = dict(zip(shown, twenty, strict=False))
    drawing, axes = figure(f"{model}: KL by density", "density", "KL, nats a token")
    for method in shown:
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["density"])
        kl, ends = np.array([r["kl"] for r in own]), np.array([r["kl_95"] for r in own])
        bars = np.maximum([kl - ends[:, 0], ends[:, 1] - kl], 0)
        axes[0].errorbar(
            [r["density"] for r in own],
            kl,
            bars,
            label=method,
            marker="o",
            capsize=2,
            color=colors.get(method),
        )
    axes[0].set_yscale("log")  # random neurons do ten times worse than chosen ones
    save(drawing, axes, "kl_by_density")

    by_position = ("KL in the course of the generation", "generated tokens", "KL, nats a token")
    by_layer = ("kept neurons that the oracle keeps, too", "layer", "Jaccard index")
    for key, (title, xlabel, ylabel), step in (
        ("kl_by_position", by_position, _BIN),
        ("jaccard_by_layer", by_layer, 1),
    ):
        drawing, axes = figure(f"{model}: {title}", xlabel, ylabel, nrows=len(densities))
        for axis, density in zip(axes, densities, strict=True):
            axis.set_title(f"density {density:g}")
            for own in rows:
                values = own[key]
                if own["density"] == density and own["method"] in shown and values:
                    at = (np.arange(len(values)) + (0.5 if step > 1 else 0)) * step
                    color = colors.get(own["method"])
                    axis.plot(at, values, label=own["method"], marker=".", color=color)
            axis.set_ylim(bottom=0)
        save(drawing, axes, key)

    fixed = [r for r in rows if "λ" in r["method"]]
    if fixed:
        drawing, axes = figure(f"{model}: KL by λ", "λ", "KL, nats a token")
        for density in densities:
            for kind in dict.fromkeys(r["method"].partition(" λ ")[0] for r in fixed):
                own = [
                    (float(r["method"].partition(" λ ")[2]), r["kl"])
                    for r in fixed
                    if r["density"] == density and r["method"].startswith(f"{kind} λ ")
                ]
                axes[0].plot(*zip(*sorted(own), strict=True), "o-", label=f"{kind}, {density:g}")
        axes[0].set_ylim(bottom=0)
        save(drawing, axes, "kl_by_mix")
    return files
