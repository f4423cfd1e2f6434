"""Measure two ways to choose weights anew for every token, without special kernels.

Neurons: gate projections are computed whole, and blocks of neurons with the largest activations
pass on to the up and down projections, as single neurons do in CATS (arXiv 2404.08763). Blocks may
be of neighbors, or of neurons with similar ranks in the prior.

Tokens: a narrow product guesses all logits, and the most probable rows of the head are computed
exactly, as in SVD-softmax (NIPS 2017). The narrow product has the least error on hidden vectors of
other texts.

Both are computed with whole products, on continuations of the development prompts. Prompts are read
densely where neurons are chosen. The tables have the bytes that would be read, and KL.
"""

import argparse
import math
from collections.abc import Iterator

from glass_mlx import GlobalPrior, Session
from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import Continuation, continue_all, read_prompts
from glass_mlx.fidelity.scoring import divergence
from glass_mlx.fidelity.static import read_alone
from glass_mlx.models import with_taps
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.vocabulary import log_probabilities

import continuations
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

_DENSITIES, _BLOCKS = (0.5, 0.25, 0.125), (1, 16, 32)
_RANKS, _EXACT = (1 / 16, 1 / 8, 1 / 4), (256, 1024, 4096)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--limit", type=int, default=12, help="Number of prompts (%(default)s).")
    continuations.add_arguments(parser)
    add_load_arguments(parser)
    return parser


def with_chosen_blocks(
    session: Session, prior: GlobalPrior | None, density: float, block: int
) -> nn.Module:
    """Return the model with only the most active blocks of neurons in each FFN.

    Args:
        session: the model's session.
        prior: sorts neurons into blocks by their ranks. Default: blocks of neighbors.
        density: the share of blocks that pass, chosen by the sums of squared hidden vectors, which
            are at least as good a guide as the gates alone.
        block: the number of neurons in a block.
    """
    orders = {} if prior is None else prior.ranks("griffin")

    def choose(path: str, hidden: mx.array) -> mx.array:
        order = mx.array(np.argsort(orders[path])) if orders else mx.arange(hidden.shape[-1])
        squares = mx.square(hidden)[..., order]
        sums = squares.reshape(*squares.shape[:-1], -1, block).sum(-1)
        count = max(1, round(density * sums.shape[-1]))
        least = mx.sort(sums, axis=-1)[..., -count, None]
        passes = mx.repeat(sums >= least, block, axis=-1)[..., mx.argsort(order)]
        return mx.where(passes, hidden, 0)

    return with_taps(session.model, choose, ffns=session.ffns)


def compare_blocks(session: Session, texts: list[Continuation]) -> Iterator[list[str]]:
    """Yield a row for each way to choose blocks, with the mean KL over texts."""
    prior = session.find_prior()
    dense = [read_alone(session.model, text) for text in texts]
    for block in _BLOCKS:
        for name, order in (("neighbors", None), ("the prior's ranks", prior)):
            if block == 1 and order is not None:
                continue
            for density in _DENSITIES:
                model = with_chosen_blocks(session, order, density, block)
                kl = [
                    float(divergence(reference, _follow(session.model, model, text)).mean())
                    for text, reference in zip(texts, dense, strict=True)
                ]
                size = (1 + 2 * density) / 3
                yield [f"{block}", name, f"{density:g}", f"{size:.3f}", f"{np.mean(kl):.3f}"]


def _follow(dense: nn.Module, model: nn.Module, text: Continuation) -> mx.array:
    """Return a model's log-probabilities of the written tokens after the dense model's prompt."""
    cache = make_prompt_cache(dense)
    mx.eval(dense(mx.array([text.prompt[:-1]]), cache=cache))
    tokens = text.prompt[-1:] + text.written[:-1]
    return log_probabilities(model(mx.array([tokens]), cache=cache)[0])


def compare_guesses(session: Session, texts: list[Continuation]) -> Iterator[list[str]]:
    """Yield a row for each width of the guess, from the first half of the texts to the second."""
    head = _head_matrix(session)
    half = len(texts) // 2
    seen, new = (
        np.concatenate([_hidden(session, text) for text in part])
        for part in (texts[:half], texts[half:])
    )
    left, right = _least_squares_factors(head, seen)
    logits = mx.array(new @ head.T)
    logprobs = log_probabilities(logits)
    for share in _RANKS:
        rank = round(share * head.shape[1])
        guess = mx.array(new @ right[:, :rank] @ left[:, :rank].T)
        for exact in _EXACT:
            rows = mx.argpartition(-guess, exact - 1, axis=-1)[:, :exact]
            mixed = mx.put_along_axis(guess, rows, mx.take_along_axis(logits, rows, -1), -1)
            kl = np.array(divergence(logprobs, log_probabilities(mixed)))
            size = share + exact / len(head)
            yield [f"{share:g}", f"{exact}", f"{size:.3f}", f"{kl.mean():.3f}",
                   f"{np.percentile(kl, 99):.2f}"]  # fmt: skip


def _head_matrix(session: Session) -> np.ndarray:
    """Return the rows (V, d) of a head that is the model's embedding.

    Raises:
        ValueError: if it has another head.
    """
    for _, module in session.model.named_modules():
        size = session.head.size if session.head else 0
        if isinstance(module, nn.Embedding) and len(module.weight) == size:
            return np.array(module.weight.astype(mx.float32))
    raise ValueError("this model's head is not its embedding")


def _hidden(session: Session, text: Continuation) -> np.ndarray:
    """Return the vectors (n, d) that the head reads for the written tokens."""
    tokens = mx.array([text.prompt + text.written[:-1]])
    hidden = session.model.model(tokens)[0, len(text.prompt) - 1 :]
    return np.array(hidden.astype(mx.float32))


def _least_squares_factors(head: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return factors (V, d) and (d, d); their first r columns make the best products of rank r.

    The best have the least squared error of logits over the hidden vectors (n, d).
    """
    covariance = hidden.T @ hidden / len(hidden)
    covariance += 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    inverse = vectors / np.sqrt(values) @ vectors.T
    _, basis = np.linalg.eigh(root @ (head.T @ head) @ root)
    basis = basis[:, ::-1]
    return head @ (root @ basis), inverse @ basis


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_per_token"):
        args = setup_arg_parser().parse_args()
        session, tokenizer = continuations.load_session(args)
        prompts = read_prompts(args.prompts)[: args.limit]
        settings = continuations.writing_settings(args)
        texts = continue_all(session.model, tokenizer, prompts, settings)
        columns = ["block", "of", "share that passes", "bytes of FFNs", "KL"]
        rows = compare_blocks(session, texts[: math.ceil(args.limit / 2)])
        print(markdown_table(columns, [*rows], left=("of",), padded=False), end="\n\n")
        columns = ["width of the guess", "exact rows", "bytes of the head", "KL", "99 %"]
        print(markdown_table(columns, [*compare_guesses(session, texts)], padded=False))


if __name__ == "__main__":
    main()
