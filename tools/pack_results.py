"""Pack JSON lines of measurements for docs/data: one file for a table, without local paths.

Files of glass-mlx fidelity and latency repeat a prior's whole description in every line. It is
replaced by what identifies the prior. Paths in recorded arguments become names. Nothing else
changes.
"""

import argparse
from pathlib import Path
from typing import Any

from glass_mlx.errors import exit_on_error, parse_json
from glass_mlx.reporting.tables import write_rows

# What of a prior's description stays.
_PRIOR = ("model", "tokens", "seed", "recipe", "recipes")

Row = dict[str, Any]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="Files with JSON lines.")
    parser.add_argument("--output", type=Path, required=True, help="The file to write.")
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="Methods whose rows are left out, such as those that were measured again.",
    )
    return parser


def packed(row: Row) -> Row:
    """Return a row without a prior's long description and without folders."""
    row = dict(row)
    if isinstance(row.get("prior"), dict):
        row["prior"] = {key: row["prior"][key] for key in _PRIOR if key in row["prior"]}
    if isinstance(row.get("arguments"), dict):
        row["arguments"] = {name: _name(value) for name, value in row["arguments"].items()}
    return row


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return [_name(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return Path(value).name if is_path else value


def run(args: argparse.Namespace) -> None:
    """Pack the files into one.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a line is no JSON object.
    """
    rows = []
    for file in args.files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = parse_json(line, f"line {number} of {file}")
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {file} is no JSON object")
            if row.get("method") not in args.leave_out:
                rows.append(packed(row))
    write_rows(args.output, rows)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("pack_results"):
        run(setup_arg_parser().parse_args())


if __name__ == "__main__":
    main()
