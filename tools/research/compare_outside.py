"""Compare expectations of the probability outside of a shortlist.

Shortlists are chosen after each renewal of continuations of the development prompts, as in a
generation. Their KL follows from the dense model's logits. The probability outside is expected to
be a factor times the squared share of the scores outside, until it is measured at dense tokens. For
comparison it is set to its mean over all texts, and to its true value for each token.
"""

import argparse
from itertools import product
from typing import NamedTuple

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import DenseReading
from glass_mlx.renewal import is_dense_token, stretches
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selector
from glass_mlx.vocabulary import VocabularyStatistics

import continuations
import mlx.core as mx
import numpy as np


class Stretch(NamedTuple):
    """What a shortlist leaves out in a stretch of n tokens.

    Attributes:
        scores_outside: the share of the scores outside of it.
        outside: (n,) the probability outside.
        relative: (n,) the sum of p log(p / share) over the tokens outside, nats.
        dense: (n,) whether a token is dense.
    """

    scores_outside: float
    outside: np.ndarray
    relative: np.ndarray
    dense: np.ndarray


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=12, help="Number of prompts (%(default)s).")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.25, 0.4, 0.6], help="(%(default)s)"
    )
    parser.add_argument(
        "--factor", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4], help="(%(default)s)"
    )
    parser.add_argument(
        "--expectation-tokens", type=float, nargs="+", default=[4, 8, 16], help="(%(default)s)"
    )
    parser.add_argument("--prior", help="The model's prior.")
    add_load_arguments(parser)
    return parser


def follow(reading: DenseReading, selector: Selector) -> list[Stretch]:
    """Choose the shortlists of a text, and measure what each leaves out."""
    config, statistics = selector.config, VocabularyStatistics()
    shortlister = selector.shortlister(statistics)
    assert shortlister is not None
    shortlister.observe(reading.dense[: config.warmup - 1])
    result = []
    for start, stop in stretches(config, reading.tokens + 1):
        shortlist = shortlister.choose(reading.read(start))
        assert shortlist is not None
        logprobs = np.array(reading.dense[start - 1 : int(stop) - 1])
        others = np.setdiff1d(np.arange(len(shortlist.shares)), shortlist.rows)
        p = np.exp(logprobs[:, others])
        relative = (p * (logprobs[:, others] - np.log(shortlist.shares[others]))).sum(-1)
        dense = np.array([is_dense_token(config, n) for n in range(start + 1, int(stop) + 1)])
        scores = shortlister.scores
        assert scores is not None
        result.append(Stretch(scores[others].sum() / scores.sum(), p.sum(-1), relative, dense))
        if dense.any():
            shortlister.observe(reading.dense[mx.array(start - 1 + np.flatnonzero(dense))])
            mx.eval(shortlister.arrays)
    return result


def cost(stretch: Stretch, expected: float | np.ndarray) -> np.ndarray:
    """Return KL (tokens,) of the sliced tokens, in nats, for an expected probability outside."""
    expected = np.broadcast_to(np.clip(expected, 1e-7, 0.99), stretch.outside.shape)
    inside = np.maximum(1 - stretch.outside, 1e-6)
    kl = inside * np.log(inside / (1 - expected)) + stretch.relative
    return (kl - stretch.outside * np.log(expected))[~stretch.dense]


def mean_cost(texts: list[list[Stretch]], factor: float, expectation_tokens: float) -> float:
    """Return the mean KL of an expectation that measurements at dense tokens correct."""
    costs = []
    for text in texts:
        total, measured = 0.0, 0
        for stretch in text:
            expected = expectation_tokens * factor * stretch.scores_outside**2
            costs.append(cost(stretch, (total + expected) / (measured + expectation_tokens)))
            total += stretch.outside[stretch.dense].sum()
            measured += int(stretch.dense.sum())
    return float(np.concatenate(costs).mean())


def compare(texts: list[list[Stretch]], share: float, args: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the table for one share of the vocabulary."""
    rows = [
        [f"{share:g}", f"{factor:g}", f"{tokens:g}", f"{mean_cost(texts, factor, tokens):.4f}"]
        for factor, tokens in product(args.factor, args.expectation_tokens)
    ]
    parts = [stretch for text in texts for stretch in text]
    mean = np.concatenate([part.outside[~part.dense] for part in parts]).mean()
    by_mean = np.concatenate([cost(part, mean) for part in parts]).mean()
    by_truth = np.concatenate([cost(part, part.outside) for part in parts]).mean()
    rows.append([f"{share:g}", "the mean", "", f"{by_mean:.4f}"])
    rows.append([f"{share:g}", "the truth", "", f"{by_truth:.4f}"])
    return rows


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_outside"):
        args = setup_arg_parser().parse_args()
        session, tokenizer = continuations.load_session(args)
        configs = {share: GlassConfig(vocabulary=share) for share in args.share}
        prior = find_or_measure_prior(session, tokenizer, args.prior, configs[args.share[0]])
        texts: dict[float, list[list[Stretch]]] = {share: [] for share in args.share}
        for reading in continuations.read_continuations(session, tokenizer, args):
            for share, config in configs.items():
                if reading.tokens > config.warmup:
                    selector = make_selector(session, tokenizer, prior, config)
                    texts[share].append(follow(reading, selector))
        rows = [row for share in args.share for row in compare(texts[share], share, args)]
        print(markdown_table(["share", "factor", "tokens", "KL"], rows))


if __name__ == "__main__":
    main()
