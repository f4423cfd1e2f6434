"""Plots of the rows that `report.summarize` makes: KL, and agreement with the oracle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glass_mlx.fidelity import frontier
from glass_mlx.fidelity.report import POSITION_BIN
from glass_mlx.reporting.plotting import new_figure, require_matplotlib, save_figure

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Colors = Mapping[str, tuple[float, ...]]

_KL = "KL, nats per token"


class _Curve(NamedTuple):
    """How to draw a list of figures in a row, with value n at `(n + offset) * step`."""

    title: str
    xlabel: str
    ylabel: str
    offset: float
    step: int


_CURVES = {
    "kl_by_position": _Curve("KL during generation", "generated tokens", _KL, 0.5, POSITION_BIN),
    "jaccard_by_layer": _Curve(
        "kept neurons that the oracle also keeps", "layer", "Jaccard index", 0, 1
    ),
}


def plot(
    rows: Sequence[Row],
    folder: Path,
    speedups: Mapping[tuple[Any, ...], float] | None = None,
) -> list[Path]:
    """Draw KL by bytes and, for densities, by density, by position and by λ, and agreement.

    Args:
        rows: a row for each method and setting, all of one model.
        folder: the folder to write to.
        speedups: measured speed-ups; see `frontier.draw`.

    Returns:
        The files.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    require_matplotlib()
    model = rows[0]["model"]
    figures = {"kl_by_bytes": frontier.draw(rows, speedups)}
    rows = [row for row in rows if row["density"] is not None]
    weighted_rows = [row for row in rows if "λ" in row["method"]]
    method_rows = [row for row in rows if row["method"] != "dense" and "λ" not in row["method"]]
    densities = sorted({row["density"] for row in rows})
    colors = _choose_colors(method_rows)
    if method_rows:
        figures["kl_by_density"] = _draw_kl_by_density(model, method_rows, colors)
        for key in _CURVES:
            figures[key] = _draw_curves(model, method_rows, densities, colors, key)
    if weighted_rows:
        figures["kl_by_mix"] = _draw_kl_by_prior_weight(model, weighted_rows)
    files = []
    for key, figure in figures.items():
        for axes in figure.axes:
            if key != "kl_by_bytes" and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
        file = folder / f"{key}.png"
        save_figure(figure, file, dpi=110)
        files.append(file)
    return files


def _choose_colors(rows: Sequence[Row]) -> Colors:
    """Return the color of each method: saturated colors first, then light ones."""
    from matplotlib import colormaps

    methods = dict.fromkeys(row["method"] for row in rows)
    palette = [colormaps["tab20"](n) for n in (*range(0, 20, 2), *range(1, 20, 2))]
    return dict(zip(methods, palette, strict=False))


def _new_panels(
    title: str, xlabel: str, ylabel: str, count: int = 1
) -> tuple["Figure", list["Axes"]]:
    """Create a figure with panels one below the other."""
    figure = new_figure(8, 4.5 * count)
    figure.suptitle(title)
    panels = [*figure.subplots(count, squeeze=False)[:, 0]]
    for axes in panels:
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    return figure, panels


def _draw_kl_by_density(model: str, rows: Sequence[Row], colors: Colors) -> "Figure":
    figure, (axes,) = _new_panels(f"{model}: KL by density", "density", _KL)
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["density"]
        )
        kl, bounds = np.array([p["kl"] for p in points]), np.array([p["kl_95"] for p in points])
        axes.errorbar(
            [point["density"] for point in points],
            kl,
            np.maximum([kl - bounds[:, 0], bounds[:, 1] - kl], 0),
            label=method,
            marker="o",
            capsize=2,
            color=colors.get(method),
        )
    axes.set_yscale("log")  # the KL of random neurons is ten times that of selected ones
    return figure


def _draw_curves(
    model: str, rows: Sequence[Row], densities: Sequence[float], colors: Colors, key: str
) -> "Figure":
    curve = _CURVES[key]
    figure, panels = _new_panels(
        f"{model}: {curve.title}", curve.xlabel, curve.ylabel, len(densities)
    )
    for axes, density in zip(panels, densities, strict=True):
        axes.set_title(f"density {density:g}")
        for row in rows:
            if row["density"] == density and row[key]:
                x = (np.arange(len(row[key])) + curve.offset) * curve.step
                method = row["method"]
                axes.plot(x, row[key], label=method, marker=".", color=colors.get(method))
        axes.set_ylim(bottom=0)
    return figure


def _draw_kl_by_prior_weight(model: str, rows: Sequence[Row]) -> "Figure":
    figure, (axes,) = _new_panels(f"{model}: KL by λ", "λ", _KL)
    curves: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for row in rows:
        method, _, weight = row["method"].partition(" λ ")
        curves.setdefault((row["density"], method), []).append((float(weight), row["kl"]))
    for (density, method), points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", label=f"{method}, {density:g}")
    axes.set_ylim(bottom=0)
    return figure
