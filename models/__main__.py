"""List the architectures of mlx-lm and what of them can be sliced."""

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version

from tqdm import tqdm

from .architectures import Architecture, names, survey


def table(architectures: list[Architecture]) -> str:
    """A Markdown table, and how many architectures can be sliced."""
    lines = ["| architecture | FFN | sites | supported |", "| :--- | :--- | ---: | :--- |"]
    for a in architectures:
        verdict = "yes" if a.supported else f"no: {a.reason}"
        lines.append(f"| {a.architecture} | {a.ffn or '-'} | {a.sites} | {verdict} |")
    supported = sum(a.supported for a in architectures)
    found = f"mlx-lm {version('mlx-lm')}: {supported} of {len(architectures)} can be sliced"
    return "\n".join([*lines, "", found])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m glass_mlx.models", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list of objects")
    args = parser.parse_args()
    bar = tqdm(survey(), total=len(names()), unit="model", leave=False, dynamic_ncols=True)
    architectures = list(bar)
    if args.json:
        print(json.dumps([asdict(a) for a in architectures], indent=1))
    else:
        print(table(architectures))


if __name__ == "__main__":
    main()
