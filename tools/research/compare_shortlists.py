"""Compare functions of the dense model's predictions that rank the tokens of a shortlist.

Shortlists are chosen after each renewal of continuations of the development prompts, from the
predictions at the dense tokens so far and from those on text that the model writes by itself. Their
KL follows from the dense model's logits. The probability outside of a shortlist is set to its mean
over the stretch, so that only the ranking counts, and shared in proportion to the ranking.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

from glass_mlx import Session
from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.building import default_recipes
from glass_mlx.calibration.texts import chat_frame, make_source
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import DenseReading, divergence
from glass_mlx.kept_tokens import KeptTokens
from glass_mlx.renewal import is_dense_token, stretches
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.vocabulary import Shortlist, choose_rows, log_probabilities
from glass_mlx.writing import Writer

import continuations
import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm


def _power(exponent: float) -> Callable[[mx.array], mx.array]:
    return lambda logprobs: mx.exp(exponent * logprobs)


def _normalized(exponent: float) -> Callable[[mx.array], mx.array]:
    return lambda logprobs: mx.softmax(exponent * logprobs, axis=-1)


# Functions of log-probabilities (n, V), whose sum over tokens ranks.
FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "p": _power(1),
    "p^0.5": _power(0.5),
    "p^0.25": _power(0.25),
    "log p": lambda logprobs: logprobs,
    "softmax(0.7 z)": _normalized(0.7),
    "softmax(0.5 z)": _normalized(0.5),
    "softmax(0.35 z)": _normalized(0.35),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=12, help="Number of prompts (%(default)s).")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="(%(default)s)"
    )
    parser.add_argument(
        "--prior-tokens", type=float, nargs="+", default=[0, 16, 64], help="(%(default)s)"
    )
    parser.add_argument("--texts", type=int, default=24, help="Texts of the prior (%(default)s).")
    add_load_arguments(parser)
    return parser


def own_predictions(
    session: Session, tokenizer: TokenizerWrapper, count: int
) -> Iterator[mx.array]:
    """Yield the log-probabilities (n, V) on texts that the model writes as for a prior."""
    recipes = default_recipes(tokenizer)
    for number, recipe in enumerate(recipes):
        writer = Writer(session.model, 1.0, [0, number], lambda tokens: None)
        frame = chat_frame(tokenizer) if recipe.kind == "chat" else None
        source = make_source(recipe, writer, tokenizer, 128, frame)
        for sequence in source(count // len(recipes), 0):
            logits = session.model(mx.array([sequence.tokens]))[0]
            counted = mx.array(np.flatnonzero(sequence.mask[: len(sequence.tokens)]))
            yield log_probabilities(logits[counted])


def mean_scores(predictions: Iterator[mx.array]) -> dict[str, np.ndarray]:
    """Return the mean of each function over tokens, (V,)."""
    sums: dict[str, np.ndarray] = {}
    tokens = 0
    for logprobs in tqdm(predictions, desc="prior", file=sys.stderr):
        tokens += len(logprobs)
        for name, function in FUNCTIONS.items():
            sums[name] = sums.get(name, 0) + np.array(function(logprobs).sum(0))
    return {name: total / tokens for name, total in sums.items()}


def measure(
    reading: DenseReading,
    prior: dict[str, np.ndarray],
    always: KeptTokens,
    args: argparse.Namespace,
    results: dict[tuple[float, str, float], list[tuple[float, float, int]]],
) -> None:
    """Add the sums of KL and of the probability outside for each way to choose a shortlist."""
    config = GlassConfig(vocabulary=0.5)
    text = {name: np.array(function(reading.dense[: config.warmup - 1]).sum(0))
            for name, function in FUNCTIONS.items()}  # fmt: skip
    for start, stop in stretches(config, reading.tokens + 1):
        numbers = range(start + 1, int(stop) + 1)
        dense = np.array([is_dense_token(config, number) for number in numbers])
        logprobs = reading.dense[start - 1 : int(stop) - 1]
        sliced = logprobs[mx.array(np.flatnonzero(~dense))]
        kept = always(reading.read(start))
        for name in FUNCTIONS:
            for weight in args.prior_tokens:
                scores = text[name] + weight * prior[name]
                for share in args.share:
                    kl, outside = _cost(scores, share, kept, sliced)
                    key = share, name, weight
                    results.setdefault(key, []).append((kl, outside, len(sliced)))
        if dense.any():
            observed = logprobs[mx.array(np.flatnonzero(dense))]
            for name, function in FUNCTIONS.items():
                text[name] = text[name] + np.array(function(observed).sum(0))


def _cost(
    scores: np.ndarray, share: float, kept: frozenset[int], logprobs: mx.array
) -> tuple[float, float]:
    """Return the sums over tokens of KL and of the probability outside."""
    rows = choose_rows(scores, share, kept)
    shares = scores - scores.min() + 1e-3 * np.ptp(scores) / len(scores)
    shares[rows] = 0
    shares = (shares / shares.sum()).astype(np.float32)
    outside = Shortlist(rows, 0.5, shares).missed(logprobs)
    shortlist = Shortlist(rows, max(float(outside.mean()), 1e-6), shares)
    kl = divergence(logprobs, log_probabilities(shortlist.back_off(logprobs)))
    return float(kl.sum()), float(outside.sum())


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_shortlists"):
        args = setup_arg_parser().parse_args()
        session, tokenizer = continuations.load_session(args)
        prior = mean_scores(own_predictions(session, tokenizer, args.texts))
        results: dict[tuple[float, str, float], list[tuple[float, float, int]]] = {}
        always = KeptTokens(tokenizer)
        for reading in continuations.read_continuations(session, tokenizer, args, [1]):
            if reading.tokens > GlassConfig.warmup:
                measure(reading, prior, always, args, results)
        cells = []
        for (share, name, weight), values in results.items():
            kl, outside, tokens = np.array(values).sum(0)
            cells.append([f"{share:g}", name, f"{weight:g}", f"{kl / tokens:.4f}",
                          f"{outside / tokens:.4f}"])  # fmt: skip
        columns = ["share", "sum of", "prior as tokens", "KL", "outside"]
        print(markdown_table(columns, sorted(cells), left=("sum of",)))


if __name__ == "__main__":
    main()
