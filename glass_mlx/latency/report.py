"""Tables and a plot of measured latencies."""

from pathlib import Path
from typing import Any

from glass_mlx.reporting.plotting import new_figure, save_figure
from glass_mlx.reporting.tables import markdown_table

Row = dict[str, Any]

# Headings and formats by key, in the style of llama-bench.
_SPEED = {
    "method": ("method", "{}"),
    "density_got": ("density", "{:.3g}"),
    "vocabulary_got": ("vocabulary", "{:.3g}"),
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
    "run_speedup": ("run speed-up", "{:.3f}"),
    "run_ceiling": ("run ceiling", "{:.3f}"),
    "run_ceiling_ratio": ("ratio", "{:.3f}"),
    "break_even": ("pays after", "{}"),
}
_COST = {
    "method": ("method", "{}"),
    "density_got": ("density", "{:.3g}"),
    "vocabulary_got": ("vocabulary", "{:.3g}"),
    "prompt_tokens": ("prompt", "{}"),
    "first_slicing_steps": ("first slices, steps", "{:.2f}"),
    "renewal_steps": ("renewal of 10 %, steps", "{:.2f}"),
    "select_s": ("select s", "{:.3f}"),
    "slice_s": ("slice s", "{:.3f}"),
    "prefill_peak_gb": ("prefill peak GB", "{:.2f}"),
    "decode_peak_gb": ("decode peak GB", "{:.2f}"),
    "held_gb": ("held GB", "{:.2f}"),
}


def _format_table(rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    cells = [
        [
            "-" if row[key] is None else form.format(_scaled(key, row))
            for key, (_, form) in columns.items()
        ]
        for row in rows
    ]
    return markdown_table([heading for heading, _ in columns.values()], cells)


def _scaled(key: str, row: Row) -> Any:
    return row[key] / 1e6 if key == "bytes_per_token" else row[key]


def format_report(about: dict[str, Any], rows: list[Row]) -> str:
    """Format the conditions and two Markdown tables: speed, and the cost of slicing.

    The cost of slicing is also given in steps. A step is the time that the dense model takes per
    token.
    """
    machine = about["machine"]
    head = (
        f"{about['model']}, {about['size_gb']:.2f} GB; {machine['chip']}, {machine['cores']} "
        f"cores, {machine['memory_gb']:g} GB, {machine['device']}, {machine['system']}, power "
        f"{machine['power']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}; "
        f"{rows[0]['generation_tokens']} tokens generated, {rows[0]['repetitions']} repetitions; "
        f"load peak {about['load_peak_gb']:.2f} GB"
    )
    return "\n".join([head, "", _format_table(rows, _SPEED), "", _format_table(rows, _COST)])


def plot(about: dict[str, Any], rows: list[Row], file: Path) -> None:
    """Draw tokens per second by density and method, with the ceiling, for the first prompt."""
    rows = [row for row in rows if row["prompt_tokens"] == rows[0]["prompt_tokens"]]
    dense = next(row for row in rows if row["method"] == "dense")
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    densities = sorted({row["density_got"] for row in rows})
    ceilings = {row["density_got"]: row["ceiling"] for row in rows}
    axes.plot(
        densities,
        [dense["decode_tps"] * ceilings[density] for density in densities],
        "k--",
        label="ceiling",
    )
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        points = sorted(
            (row["density_got"], row["speedup"] * dense["decode_tps"])
            for row in rows
            if row["method"] in (method, "dense")
        )
        axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set(xlabel="density", ylabel="tokens per second", title=about["model"], ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, file)
