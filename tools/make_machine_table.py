"""Turn the measured machines in docs/data/machines/ into the table of the README.

The files come from `glass-mlx benchmark --submit-file FILE`. The table replaces what stands between
the two comments in the README.
"""

import argparse
from pathlib import Path
from typing import Any

from glass_mlx.errors import exit_on_error, parse_json
from glass_mlx.files import write_text
from glass_mlx.latency.submission import is_submission
from glass_mlx.reporting.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]

START, END = "<!-- machines -->", "<!-- end of machines -->"

_NONE = "No machine has been measured with this protocol yet."


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=Path, default=ROOT / "docs" / "data" / "machines")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    return parser


def read_machines(folder: Path) -> list[dict[str, Any]]:
    """Read the files of a folder, in the order of their names.

    Raises:
        ValueError: if a file holds something else.
    """
    machines = []
    for file in sorted(folder.glob("*.json")):
        contents = parse_json(file.read_text(encoding="utf-8"), str(file))
        if not is_submission(contents):
            raise ValueError(f"{file} was not written by glass-mlx benchmark --submit-file")
        machines.append(contents)
    return machines


def format_machines(machines: list[dict[str, Any]]) -> str:
    """Return a table with a row for each model on each machine.

    Raises:
        ValueError: if a machine lacks an entry.
    """
    if not machines:
        return _NONE
    columns = ["machine", "model", "dense, tokens/s", "sliced", "speed-up", "bytes", "with"]
    try:
        rows = [
            _row(machine, result)
            for machine in machines
            for result in machine["results"]
            if "rows" in result
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a machine's file is damaged ({error})") from error
    return markdown_table(columns, rows, left=("machine", "model", "with"), padded=False)


def _row(machine: dict[str, Any], result: dict[str, Any]) -> list[str]:
    about, versions = machine["machine"], machine["versions"]
    cores = f"{about['gpu_cores']} GPU cores" if "gpu_cores" in about else f"{about['cores']} cores"
    memory = about["memory_gb"] * 1e9 / 2**30  # as memory is sold
    title = f"{about['chip']}, {cores}, {memory:.0f} GB, {about['device']}"
    dense, sliced = result["rows"]
    share = sliced["bytes_per_token"] / dense["bytes_per_token"]
    mark = " (doubtful)" if machine["warnings"] else ""
    return [
        title,
        ", ".join(result[key] for key in ("model", "weights") if key in result),
        f"{dense['total_tps']:.1f}",
        f"{sliced['total_tps']:.1f}",
        f"{sliced['run_speedup']:.2f}{mark}",
        f"{share:.2f}",
        f"glass-mlx {versions['glass-mlx']}, mlx {versions['mlx']}, {machine['date']}",
    ]


def replace_table(text: str, table: str) -> str:
    """Return a README's text with another table.

    Raises:
        ValueError: if it lacks the comments around the table.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the README needs the lines {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def run(args: argparse.Namespace) -> None:
    """Write the table into the README.

    Raises:
        FileNotFoundError: if the README does not exist.
        ValueError: for files of another kind.
    """
    table = format_machines(read_machines(args.machines))
    text = args.readme.read_text(encoding="utf-8")
    write_text(args.readme, replace_table(text, table))


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("make_machine_table"):
        run(setup_arg_parser().parse_args())


if __name__ == "__main__":
    main()
