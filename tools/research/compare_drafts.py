"""Compare schedules of checked drafts, with and without a prior: the bytes that a whole run reads.

Drafts are right if the token of the text is in the shortlist, on continuations of the development
prompts. No figure depends on what a product with several rows costs, but the choice of shortlists
does.
"""

import argparse
from dataclasses import replace
from itertools import product

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_needed_prior, make_selector
from glass_mlx.config import DRAFT_WARMUP, EXACT_REFRESH, GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import score
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selector

import continuations
import numpy as np

# Whether there is a prior, the warm-up and the first interval between renewals.
Setting = tuple[bool, int, int]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=8, help="Number of prompts (%(default)s).")
    parser.add_argument(
        "--warmup", type=int, nargs="+", default=[DRAFT_WARMUP], help="At most 4 (%(default)s)."
    )
    parser.add_argument(
        "--refresh", type=int, nargs="+", default=[EXACT_REFRESH], help="(%(default)s)"
    )
    add_load_arguments(parser)
    return parser


def compare(args: argparse.Namespace) -> dict[Setting, np.ndarray]:
    """Return the sums over each text, (texts, 3), by setting: bytes, shares and tokens.

    Bytes are those of a token over the dense model's, and shares those of the vocabulary.
    """
    session, tokenizer = continuations.load_session(args)
    prior, config = find_needed_prior(session, tokenizer, model=args.model), GlassConfig()
    selectors: dict[Setting, Selector] = {}
    for has_prior, warmup, refresh in product((True, False), args.warmup, args.refresh):
        selector = make_selector(session, tokenizer, prior if has_prior else None, config)
        selector.config = replace(selector.config, warmup=warmup, refresh=refresh)
        selectors[has_prior, warmup, refresh] = selector
    results: dict[Setting, list[list[float]]] = {setting: [] for setting in selectors}
    for reading in continuations.read_continuations(session, tokenizer, args, args.warmup):
        for setting, selector in selectors.items():
            scores = score(reading, selector)
            shares = np.mean([*scores.vocabulary.values()] or [1.0]) * reading.tokens
            results[setting].append([scores.bytes.sum(), float(shares), reading.tokens])
    return {setting: np.array(values) for setting, values in results.items()}


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_drafts"):
        args = setup_arg_parser().parse_args()
        cells = []
        for (has_prior, warmup, refresh), values in compare(args).items():
            read, shares, tokens = values.sum(0)
            error = continuations.standard_error(values[:, 0] / values[:, 2])
            figures = [f"{value:.3f}" for value in (shares / tokens, read / tokens, error)]
            cells.append(["yes" if has_prior else "no", f"{warmup}", f"{refresh}", *figures])
        columns = ["prior", "warm-up", "refresh", "vocabulary", "bytes", "± s.e."]
        print(markdown_table(columns, cells))


if __name__ == "__main__":
    main()
