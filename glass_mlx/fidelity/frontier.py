"""The plot of what fidelity costs: KL by bytes per token, and by measured speed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glass_mlx.config import DEFAULT_MAX_KL
from glass_mlx.reporting.plotting import new_figure

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Labels and colors by method. Other methods are drawn in gray with their names.
_STYLES = {
    "default": ("glass-mlx, by --max-kl", "#0b6e4f"),
    "glass": ("GLASS as in the paper, by density", "#c8553d"),
    "prompt-only-griffin": ("GRIFFIN, by density", "#3d5a98"),
}

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
    figure = new_figure(7.2 * panels, 5)
    figure.suptitle(f"{rows[0]['model']}: how far from the model, for how many bytes", x=0.5)
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    rows = [row for row in rows if row["method"] != "dense" and row["kl"] > 0]
    _draw_panel(first, [(row, float(row["run_share"])) for row in rows])
    first.set_xlabel("bytes of weights per token, over the dense model's (whole run)")
    first.set_ylabel("KL from the dense model, nats per token")
    for axes in others:
        assert speedups is not None
        measured = [(row, speedups.get(_latency_key(row))) for row in rows]
        _draw_panel(axes, [(row, speedup) for row, speedup in measured if speedup is not None])
        axes.set_xlabel("measured speed over the dense model's (whole run)")
    return figure


def _latency_key(row: Row) -> tuple[Any, ...]:
    return _LATENCY_METHODS.get(row["method"], row["method"]), *_setting(row)


def _draw_panel(axes: "Axes", points: Sequence[tuple[Row, float]]) -> None:
    for method in dict.fromkeys(row["method"] for row, _ in points):
        mine = sorted(((x, row) for row, x in points if row["method"] == method), key=_first)
        label, color = _STYLES.get(method, (method, "#777777"))
        is_quantization = _setting(mine[0][1]) == (None, None, None)
        x, kl = [x for x, _ in mine], np.array([row["kl"] for _, row in mine])
        bounds = np.array([row["kl_95"] for _, row in mine])
        axes.errorbar(
            x,
            kl,
            np.maximum([kl - bounds[:, 0], bounds[:, 1] - kl], 0),
            fmt="D" if is_quantization else "o-",
            color="#444444" if is_quantization else color,
            label=None if is_quantization else label,
            linewidth=2.2 if method == "default" else 1.4,
            elinewidth=0.8,
            capsize=2,
            markersize=5,
        )
        for at, row in mine:
            name = method if is_quantization else _setting_label(row)
            axes.annotate(
                name,
                (at, row["kl"]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=7,
                color="#444444" if is_quantization else color,
            )
    axes.axhline(DEFAULT_MAX_KL, color="#0b6e4f", linestyle=":", linewidth=1)
    axes.annotate(
        f"default bound {DEFAULT_MAX_KL}",
        (0, DEFAULT_MAX_KL),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7,
        color="#0b6e4f",
    )
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="best")


def _first(pair: tuple[float, Row]) -> float:
    return pair[0]


def _setting_label(row: Row) -> str:
    max_kl, density, vocabulary = _setting(row)
    if max_kl is not None:
        return f"{max_kl:g}"
    assert density is not None
    return f"{density:g}" if vocabulary in (None, 1) else f"{density:g}, {vocabulary:g}"
