"""List mlx-lm's architectures and whether they can be sliced."""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("models")

import json
from dataclasses import asdict
from importlib.metadata import version

from glass_mlx.arguments import CommandParser
from glass_mlx.errors import exit_on_error
from glass_mlx.models.architectures import Architecture, names, survey
from glass_mlx.reporting.tables import markdown_table

from tqdm import tqdm


def table(architectures: list[Architecture]) -> str:
    """Format a Markdown table, and the number of architectures that can be sliced."""
    rows = [
        [a.architecture, a.ffn or "-", str(a.sites), "yes" if a.supported else f"no: {a.reason}"]
        for a in architectures
    ]
    columns = ["architecture", "FFN", "sites", "supported"]
    left = ("architecture", "FFN", "supported")
    supported = sum(a.supported for a in architectures)
    count = f"mlx-lm {version('mlx-lm')}: {supported} of {len(architectures)} can be sliced"
    return "\n".join([markdown_table(columns, rows, left, padded=False), "", count])


def main() -> None:
    """Run the command."""
    with exit_on_error("models"):
        parser = CommandParser(description=__doc__)
        parser.add_argument("--json", action="store_true", help="Print a JSON list of objects.")
        args = parser.parse()
        bar = tqdm(survey(), total=len(names()), unit="model", leave=False, dynamic_ncols=True)
        architectures = list(bar)
        if args.json:
            print(json.dumps([asdict(a) for a in architectures], indent=1))
        else:
            print(table(architectures))
