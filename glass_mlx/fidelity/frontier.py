"""The plot of what fidelity costs: KL by bytes per token, and by measured speed."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glass_mlx.reporting.plotting import new_figure

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Labels, colors and line styles of series: methods, by bounds on KL or by shares. Others are gray
# points, each with a marker of its own and a legend for all of them. The last entry is where their
# numbers stand, in printer's points to the right of and above a point: lines that are close to each
# other have them on different sides.
_STYLES = {
    ("default", "bound"): ("glass-mlx, by --max-kl", "#0b6e4f", "o-", (-6, -9)),
    ("default", "shares"): ("glass-mlx, by --density", "#0b6e4f", "o:", (5, 4)),
    ("glass", "shares"): ("GLASS as in the paper, by density", "#c8553d", "o-", (-6, -10)),
    ("prompt-only-griffin", "shares"): ("GRIFFIN, by density", "#3d5a98", "o-", (5, 4)),
    ("teal", "shares"): ("thresholds as in TEAL (computed), by share", "#8e5aa8", "s-", (5, 4)),
    ("export", "shares"): ("exported once for all texts, by density", "#b8860b", "^-", (7, -4)),
}
_GRAY, _MARKERS = "#555555", "DvP<X>^sph*"

# The names that methods have in measurements of latency.
_LATENCY_METHODS = {"prompt-only-griffin": "griffin"}


def read_speedups(file: Path) -> dict[tuple[Any, ...], float]:
    """Read measured speed-ups over whole runs, by method and setting.

    Args:
        file: the JSON lines of `glass-mlx latency`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file at {file}")
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {(row["method"], *_setting(row)): float(row["run_speedup"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold results of glass-mlx latency") from error


def _setting(row: Row) -> tuple[float | None, ...]:
    return row["max_kl"], row["density"], row["vocabulary"]


def draw(rows: Sequence[Row], speedups: Mapping[tuple[Any, ...], float] | None) -> "Figure":
    """Draw KL by bytes per token and, if they were measured, by speed-ups.

    Args:
        rows: a row for each method and setting, all of one model.
        speedups: speed-ups over whole runs, by method and setting; see `read_speedups`.
    """
    panels = 1 if speedups is None else 2
    figure = new_figure(7 if panels == 1 else 11, 5)
    figure.suptitle(f"{rows[0]['model']}: how far from the model, for how many bytes")
    ratios = {"width_ratios": [2, 1][:panels]}
    first, *others = figure.subplots(1, panels, squeeze=False, sharey=True, gridspec_kw=ratios)[0]
    rows = [row for row in rows if row["method"] != "dense"]
    _draw_panel(first, [(row, float(row["run_share"])) for row in rows])
    first.set_xlabel("bytes of weights per token, over the dense model's (whole run)")
    first.set_ylabel("KL from the dense model, nats per token")
    _add_legends(first)
    for axes in others:
        assert speedups is not None
        measured = [(row, speedups.get(_latency_key(row))) for row in rows]
        _draw_panel(axes, [(row, speedup) for row, speedup in measured if speedup is not None])
        axes.set_xlabel("measured speed over dense (whole run)")
    return figure


def _add_legends(axes: "Axes") -> None:
    """Add a legend of the lines, and one of the gray points."""
    handles, labels = axes.get_legend_handles_labels()
    lines = {"glass-mlx, KL 0", *(label for label, *_ in _STYLES.values())}
    pairs = [*zip(handles, labels, strict=True)]
    gray = [pair for pair in pairs if pair[1] not in lines]
    if gray:
        axes.add_artist(axes.legend(*zip(*gray, strict=True), fontsize=7, loc="upper right"))
    rest = [pair for pair in pairs if pair[1] in lines]
    if rest:
        axes.legend(*zip(*rest, strict=True), fontsize=8, loc="best")


def _latency_key(row: Row) -> tuple[Any, ...]:
    return _LATENCY_METHODS.get(row["method"], row["method"]), *_setting(row)


def _draw_panel(axes: "Axes", points: Sequence[tuple[Row, float]]) -> None:
    series: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    markers = cycle(_MARKERS)
    exact = [x for row, x in points if row["kl"] == 0]
    for row, x in sorted(points, key=lambda point: point[0]["kl"]):
        if row["kl"] == 0:  # which has no place on a logarithmic axis
            continue
        series.setdefault((row["method"], _kind(row)), []).append((x, row))
    for (method, kind), members in series.items():
        if (method, kind) in _STYLES:
            label, color, style, place = _STYLES[method, kind]
        else:
            label, color, style, place = method, _GRAY, next(markers), (5, 4)
        members.sort(key=_first)
        kl = np.array([row["kl"] for _, row in members])
        bounds = np.array([row["kl_95"] for _, row in members])
        axes.errorbar(
            [x for x, _ in members],
            kl,
            np.maximum([kl - bounds[:, 0], bounds[:, 1] - kl], 0),
            fmt=style,
            color=color,
            label=label,
            linewidth=2.2 if kind == "bound" else 1.3,
            elinewidth=0.8,
            capsize=2,
            markersize=5,
        )
        for x, row in members:
            if kind != "none":
                _annotate(axes, _setting_label(row), (x, row["kl"]), color, place)
    axes.set_yscale("log")
    axes.margins(x=0.1)
    color = _STYLES["default", "bound"][1]
    for x in exact[:1]:  # a bound that no slice stays within reads the same
        axes.axvline(x, color=color, linestyle="--", linewidth=2.2, label="glass-mlx, KL 0")
        _annotate(axes, "KL 0: the model's own text", (x, axes.get_ylim()[0]), color)
    axes.grid(alpha=0.25)


def _annotate(
    axes: "Axes",
    text: str,
    point: tuple[float, float],
    color: str,
    place: tuple[int, int] = (5, 4),
) -> None:
    """Write a text so many printer's points to the right of and above a point."""
    options: dict[str, Any] = {"ha": "left" if place[0] > 0 else "right"}
    options |= {"xytext": place, "textcoords": "offset points"}
    axes.annotate(text, point, fontsize=7, color=color, **options)


def _kind(row: Row) -> str:
    """Return what decides how much is kept: a bound on KL, shares, or nothing."""
    max_kl, density, _ = _setting(row)
    return "bound" if max_kl is not None else "shares" if density is not None else "none"


def _first(pair: tuple[float, Row]) -> float:
    return pair[0]


def _setting_label(row: Row) -> str:
    max_kl, density, vocabulary = _setting(row)
    if max_kl is not None:
        return f"{max_kl:g}"
    return f"{density:g}" if vocabulary in (None, 1) else f"{density:g}, {vocabulary:g}"
