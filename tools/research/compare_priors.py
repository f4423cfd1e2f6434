"""Compare priors by how close the sliced model stays to the dense model.

The dense model continues the prompts, and the sliced model is scored on these continuations for
each prior, statistic and density. Two further rows use selections from the prompt alone and from
the continuation itself (the oracle).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glass_mlx import GlassConfig, GlobalPrior, Selection
from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.report import Outcome, summarize
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.ranking import fuse, ranks
from glass_mlx.reporting.machine import made_with
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import select

import continuations
import numpy as np

ORACLE = "oracle"

# One selection after the prompt, and exact slices of quantized layers. The selections are given, so
# the density does not matter.
_CONFIG = GlassConfig(density=0.5, warmup=1, dense_every=0, refresh=0, down_policy="scatter")

Scores = Mapping[str, np.ndarray]
Outcomes = dict[tuple[str, float], list[Outcome]]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--prior", type=Path, nargs="+", required=True, help="Files to compare.")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument(
        "--prior-weight", type=float, nargs="+", default=[0.5], help="Values of λ (%(default)s)."
    )
    continuations.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="Append one JSON line per row to this file.")
    add_load_arguments(parser)
    return parser


def rank_neurons(
    reading: DenseReading, priors: Mapping[str, GlobalPrior], prior_weights: list[float]
) -> dict[str, Scores]:
    """Return the scores (m,) of each FFN's neurons, by the name of the selection method.

    Args:
        reading: the text.
        priors: the priors to fuse with the ranks over the prompt, by name.
        prior_weights: values of λ.
    """
    local = reading.statistics().prompt.scores("activation")
    local_ranks = {path: ranks(scores) for path, scores in local.items()}
    methods: dict[str, Scores] = {
        "prompt alone": local,
        ORACLE: reading.oracle.scores("activation"),
    }
    for name, prior in priors.items():
        for statistic in prior.scores:
            for weight in prior_weights:
                methods[f"{name}, {statistic}, λ {weight:g}"] = {
                    path: fuse(local_ranks[path], prior_ranks, weight)
                    for path, prior_ranks in prior.ranks(statistic).items()
                }
    return methods


def score_selection(reading: DenseReading, selection: Selection, oracle: Selection) -> Outcome:
    """Score a single selection after the prompt."""
    selector = reading.session.selector(_CONFIG, None)
    return Outcome.of(score(reading, selector, lambda local: selection), oracle)


def compare(args: argparse.Namespace) -> Outcomes:
    """Return the outcomes of all texts, by method and density."""
    session, tokenizer = continuations.load_session(args)
    priors = {str(file): session.find_prior(file) for file in args.prior}
    outcomes: Outcomes = {}
    for reading in continuations.read_continuations(session, tokenizer, args):
        methods = rank_neurons(reading, priors, args.prior_weight)
        for density in args.density:
            oracle = select(methods[ORACLE], density, session.multiples)
            for method, scores in methods.items():
                selection = select(scores, density, session.multiples)
                outcome = score_selection(reading, selection, oracle)
                outcomes.setdefault((method, density), []).append(outcome)
    return outcomes


def make_rows(outcomes: Outcomes, seed: int) -> list[dict[str, Any]]:
    """Make a row of figures for each method and density, sorted by density."""
    rows = []
    for (method, density), results in sorted(outcomes.items(), key=lambda item: item[0][1]):
        figures = summarize(results, None, seed)
        row = {"density": density, "method": method}
        row |= {key: figures[key] for key in ("kl", "perplexity", "top1", "jaccard")}
        rows.append(row | {"tokens": sum(len(outcome.kl) for outcome in results)})
    return rows


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table, and append JSON lines to the file of `--json`."""
    columns = ["density", "selection", "KL", "perplexity", "same top token", "Jaccard with oracle"]
    cells = [
        [
            f"{row['density']:g}",
            row["method"],
            f"{row['kl']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['top1']:.3f}",
            f"{row['jaccard']:.3f}",
        ]
        for row in rows
    ]
    print(markdown_table(columns, cells, left=("selection",), padded=False))
    if args.json:
        arguments = {key: str(value) for key, value in vars(args).items()}
        about = made_with() | {"model": model_name(args.model), "arguments": arguments}
        with args.json.open("a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_priors"):
        args = setup_arg_parser().parse_args()
        report(args, make_rows(compare(args), args.seed))


if __name__ == "__main__":
    main()
