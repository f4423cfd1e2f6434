"""Compare how often the dense model computes a token between sliced ones.

Continuations of the development prompts are scored as a generation would slice, for several shares
and intervals. Fewer dense tokens read fewer bytes, but also show fewer tokens to the statistics,
and every dense token costs no KL.
"""

import argparse
from itertools import product

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import Scores, score
from glass_mlx.reporting.tables import markdown_table

import continuations
import numpy as np

# Shorter continuations are mostly dense warm-up.
_MIN_TOKENS = 64


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=6, help="Number of prompts (%(default)s).")
    parser.add_argument(
        "--shares",
        nargs="+",
        default=["1,0.4", "0.75,0.3"],
        help="Densities and shares of the vocabulary, as D,V (%(default)s).",
    )
    parser.add_argument("--dense-every", type=int, nargs="+", default=[4, 16], help="(%(default)s)")
    parser.add_argument("--prior", help="The model's prior.")
    add_load_arguments(parser)
    return parser


def averages(scores: Scores) -> tuple[float, ...]:
    """Return a text's mean KL, that of its sliced tokens, and the bytes of these and of all."""
    sliced = ~scores.dense
    return (
        float(scores.kl.mean()),
        float(scores.kl[sliced].mean()),
        float(scores.bytes[sliced].mean()),
        float(scores.bytes.mean()),
    )


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_dense_every"):
        args = setup_arg_parser().parse_args()
        session, tokenizer = continuations.load_session(args)
        prior = find_or_measure_prior(session, tokenizer, args.prior, GlassConfig(density=0.5))
        shares = [tuple(map(float, text.split(","))) for text in args.shares]
        results: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
        for reading in continuations.read_continuations(session, tokenizer, args, [16]):
            if reading.tokens < _MIN_TOKENS:
                continue
            for (density, vocabulary), every in product(shares, args.dense_every):
                config = GlassConfig(density=density, vocabulary=vocabulary, dense_every=every)
                scores = score(reading, make_selector(session, tokenizer, prior, config))
                results.setdefault((density, vocabulary, every), []).append(averages(scores))
        rows = [
            [*(f"{value:g}" for value in key), *(f"{mean:.3f}" for mean in np.mean(values, 0))]
            for key, values in results.items()
        ]
        columns = ["density", "vocabulary", "every", "KL", "KL of sliced tokens", "bytes", "run"]
        print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
