"""Markdown tables, and the files that hold results."""

import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from glass_mlx.files import write_text


def markdown_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Container[str] = (),
    padded: bool = True,
) -> str:
    """Format a Markdown table.

    Args:
        columns: the headings.
        rows: the rows, with one cell per column.
        left: the headings of the left-aligned columns. All others are right-aligned.
        padded: whether to pad cells so that the columns line up on a screen.
    """
    rules = [":---" if column in left else "---:" for column in columns]
    lines = [list(columns), rules, *rows]
    if padded:
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        rules[:] = [
            ":" + "-" * (width - 1) if column in left else "-" * (width - 1) + ":"
            for column, width in zip(columns, widths, strict=True)
        ]
        lines = [
            [
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, cell, width in zip(columns, line, widths, strict=True)
            ]
            for line in lines
        ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write results as one JSON line per row."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_results(
    rows: Sequence[dict[str, Any]],
    markdown: str,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Write results to the files that are given.

    Args:
        rows: the results, written as one JSON line per row.
        markdown: the same results in Markdown.
        json_file: the file for the JSON lines. Default: none.
        markdown_file: the file for the Markdown. Default: none.
    """
    if json_file:
        write_rows(json_file, rows)
    if markdown_file:
        write_text(markdown_file, markdown + "\n")
