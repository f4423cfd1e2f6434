"""Tables and pictures of what `measure_latency` measures."""

from pathlib import Path
from typing import Any

from glass_mlx.files import replacing

Row = dict[str, Any]

# Titles and formats, in the manner of llama-bench.
_SPEED = {
    "method": ("method", "{}"),
    "density": ("density", "{:g}"),
    "prompt_tokens": ("prompt", "{}"),
    "prefill_tps": ("prefill t/s", "{:.1f}"),
    "prefill_ratio": ("prefill time", "{:.2f}"),
    "first_token_s": ("1st token s", "{:.2f}"),
    "second_token_s": ("2nd token s", "{:.2f}"),
    "decode_tps": ("decode t/s", "{:.2f}"),
    "decode_sd": ("± sd", "{:.2f}"),
    "total_tps": ("total t/s", "{:.2f}"),
    "bytes_per_token": ("MB/token", "{:.0f}"),
    "gb_per_second": ("GB/s", "{:.1f}"),
    "speedup": ("speed-up", "{:.3f}"),
    "ceiling": ("ceiling", "{:.3f}"),
    "ceiling_ratio": ("ratio", "{:.3f}"),
    "break_even": ("pays after", "{}"),
}
_COST = {
    "method": ("method", "{}"),
    "density": ("density", "{:g}"),
    "prompt_tokens": ("prompt", "{}"),
    "first_slicing_steps": ("first slices, steps", "{:.2f}"),
    "renewal_steps": ("renewal of 10 %, steps", "{:.2f}"),
    "select_s": ("select s", "{:.3f}"),
    "slice_s": ("slice s", "{:.3f}"),
    "reread_s": ("reread s", "{:.3f}"),
    "prefill_peak_gb": ("prefill peak GB", "{:.2f}"),
    "decode_peak_gb": ("decode peak GB", "{:.2f}"),
    "held_gb": ("held GB", "{:.2f}"),
}


def _markdown(rows: list[Row], columns: dict[str, tuple[str, str]]) -> list[str]:
    titles = [title for title, _ in columns.values()]
    cells = [
        [
            "-" if row[name] is None else form.format(_scaled(name, row))
            for name, (_, form) in columns.items()
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [titles, ["-" * (width - 1) + ":" for width in widths], *cells]
    return [
        "| "
        + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def _scaled(name: str, row: Row) -> Any:
    return row[name] / 1e6 if name == "bytes_per_token" else row[name]


def table(about: dict[str, Any], rows: list[Row]) -> str:
    """What was measured on what, and two Markdown tables: speed, and what slicing costs.

    Times of slicing are also in steps, the time of a dense token.
    """
    machine = about["machine"]
    head = (
        f"{about['model']}, {about['size_gb']:.2f} GB; {machine['chip']}, {machine['cores']} "
        f"cores, {machine['memory_gb']:g} GB, {machine['device']}, {machine['system']}, power "
        f"{machine['power']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}; "
        f"{rows[0]['generation_tokens']} tokens generated, {rows[0]['repetitions']} repetitions; "
        f"load peak {about['load_peak_gb']:.2f} GB"
    )
    return "\n".join([head, "", *_markdown(rows, _SPEED), "", *_markdown(rows, _COST)])


def plot(about: dict[str, Any], rows: list[Row], file: Path) -> None:
    """Draw tokens a second against density by method, with the ceiling, for the first prompt."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["prompt_tokens"] == rows[0]["prompt_tokens"]]
    dense = next(row for row in rows if row["method"] == "dense")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    densities = sorted({row["density"] for row in rows})
    ceilings = {row["density"]: row["ceiling"] for row in rows}
    axes.plot(
        densities,
        [dense["decode_tps"] * ceilings[density] for density in densities],
        "k--",
        label="ceiling",
    )
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        points = sorted(
            (row["density"], row["speedup"] * dense["decode_tps"])
            for row in rows
            if row["method"] in (method, "dense")
        )
        axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set(xlabel="density", ylabel="tokens a second", title=about["model"], ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
