"""Compare schedules of dense tokens and renewals: KL, and the bytes that a whole run reads.

Every schedule is scored with the engine's slices on continuations of the development prompts. The
speed-up is what the bytes of all tokens allow, dense tokens included.
"""

import argparse
from itertools import product
from pathlib import Path

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import score
from glass_mlx.reporting.tables import markdown_table

import continuations
import numpy as np

Schedule = tuple[int, int, int]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=8, help="Number of prompts (%(default)s).")
    parser.add_argument("--density", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--warmup", type=int, nargs="+", default=[16], help="(%(default)s)")
    parser.add_argument("--refresh", type=int, nargs="+", default=[32], help="(%(default)s)")
    parser.add_argument(
        "--dense-every", type=int, nargs="+", default=[0, 8, 4, 3], help="(%(default)s)"
    )
    parser.add_argument("--prior", type=Path, help="The model's prior.")
    add_load_arguments(parser)
    return parser


def compare(args: argparse.Namespace) -> dict[Schedule, np.ndarray]:
    """Return the sums of KL and of bytes over each text, and its tokens, (texts, 3) by schedule."""
    session, tokenizer = continuations.load_session(args)
    prior = find_or_measure_prior(session, tokenizer, args.prior, GlassConfig(density=0.5))
    schedules = [*product(args.warmup, args.refresh, args.dense_every)]
    selectors = {
        schedule: make_selector(
            session,
            tokenizer,
            prior,
            GlassConfig(
                density=args.density,
                vocabulary=args.vocabulary,
                warmup=schedule[0],
                refresh=schedule[1],
                dense_every=schedule[2],
            ),
        )
        for schedule in schedules
    }
    results: dict[Schedule, list[list[float]]] = {schedule: [] for schedule in schedules}
    for reading in continuations.read_continuations(session, tokenizer, args, args.warmup):
        for schedule, selector in selectors.items():
            scores = score(reading, selector)
            results[schedule].append([scores.kl.sum(), scores.bytes.sum(), reading.tokens])
    return {schedule: np.array(values) for schedule, values in results.items()}


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_schedules"):
        args = setup_arg_parser().parse_args()
        cells = []
        for schedule, values in compare(args).items():
            kl, read, tokens = values.sum(0)
            error = continuations.standard_error(values[:, 0] / values[:, 2])
            cells.append(
                [
                    *map(str, schedule),
                    f"{kl / tokens:.4f}",
                    f"{error:.4f}",
                    f"{tokens / read:.3f}",
                ]
            )
        columns = ["warm-up", "refresh", "dense every", "KL", "± s.e.", "speed-up"]
        print(markdown_table(columns, cells))


if __name__ == "__main__":
    main()
