"""Compare ways to combine dense tokens with drafts: bytes that the target reads, and KL.

The first table counts the bytes of weights in all passes of the target while it continues prompts,
per token and as a share of what the dense model reads without drafts. The draft model is the target
itself, wrong at every third place, and its own bytes do not count. The second table has the KL of
texts in which a quarter of the tokens are dense, one by one or several in a row.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from glass_mlx import streaming
from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.block_decoding import Block
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.chat_templates import encode
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity import scoring
from glass_mlx.fidelity.prompts import read_prompts
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.session import Session
from glass_mlx.speculation import SpeculativeDecoder, TargetModel

import continuations
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper


class WrongAtTimes(nn.Module):
    """A draft model that is the target, but wrong after every third token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> Any:
        """The layers of the model."""
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Compute logits (..., vocabulary)."""
        logits = self.model(tokens, cache=cache)
        place = 0 if cache is None else cache[0].offset
        return -logits if place % 3 == 0 else logits


class CountingDecoder(SpeculativeDecoder):
    """A decoder that counts its passes, and may leave drafts out of dense ones.

    Attributes:
        passes: whether each pass was dense, of all decoders.
        drafts_in_dense_passes: whether dense passes check drafts.
    """

    passes: list[bool]
    drafts_in_dense_passes = True

    def _compute(self, model: TargetModel, most: int) -> Block:
        is_dense = model.sliced is None or model._is_due()
        self.passes.append(is_dense)
        return super()._compute(model, 1 if is_dense and not self.drafts_in_dense_passes else most)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def share_read(
    session: Session,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    drafts_in_dense_passes: bool,
    **options: Any,
) -> tuple[float, float]:
    """Return the share of bytes read per token, and the share of dense tokens.

    Args:
        session: the target's session.
        tokenizer: its tokenizer.
        prompts: token ids.
        drafts_in_dense_passes: whether dense passes check drafts.
        **options: options of `stream_generate`.
    """
    attributes = {"passes": [], "drafts_in_dense_passes": drafts_in_dense_passes}
    decoder: Any = type("Counting", (CountingDecoder,), attributes)
    read = tokens = dense = 0.0
    with replaced(streaming, "SpeculativeDecoder", decoder):
        for prompt in prompts:
            start = len(decoder.passes)
            responses = list(
                streaming.stream_generate(
                    session,
                    tokenizer,
                    prompt,
                    draft_model=WrongAtTimes(session.model),
                    num_draft_tokens=3,
                    **options,
                )
            )
            report = responses[-1].glass
            assert report is not None
            sliced = report.sliced_bytes / report.dense_bytes
            read += 1 + sum(1.0 if is_dense else sliced for is_dense in decoder.passes[start:])
            tokens, dense = tokens + len(responses), dense + report.dense_tokens
    return read / tokens, dense / tokens


def in_rows(length: int, config: GlassConfig, number: int) -> bool:
    """Return whether a token is dense if as many tokens as otherwise are dense in longer rows."""
    return 0 < (number - config.warmup) % (length * config.dense_every) <= length


def divergence(
    session: Session,
    tokenizer: TokenizerWrapper,
    args: argparse.Namespace,
    prior: GlobalPrior,
    lengths: list[int],
) -> dict[int, np.ndarray]:
    """Return the mean KL of each text by the number of dense tokens in a row."""
    config = GlassConfig(density=args.density, vocabulary=args.vocabulary)
    selector = make_selector(session, tokenizer, prior, config)
    results: dict[int, list[float]] = {length: [] for length in lengths}
    for reading in continuations.read_continuations(session, tokenizer, args, [config.warmup]):
        for length in lengths:
            with replaced(scoring, "is_dense_token", partial(in_rows, length)):
                results[length].append(float(scoring.score(reading, selector).kl.mean()))
    return {length: np.array(values) for length, values in results.items()}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=4, help="Number of prompts (%(default)s).")
    parser.add_argument("--density", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=float, default=0.25, help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="(%(default)s)")
    parser.add_argument("--prior", type=Path, help="The model's prior.")
    add_load_arguments(parser)
    return parser


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_dense_passes"):
        args = setup_arg_parser().parse_args()
        session, tokenizer = continuations.load_session(args)
        prior = find_or_measure_prior(session, tokenizer, args.prior, GlassConfig(density=0.5))
        prompts = [encode(tokenizer, m) for m in read_prompts(args.prompts)[: args.limit]]
        measure: Callable[..., tuple[float, float]] = partial(
            share_read, session, tokenizer, prompts, max_tokens=args.tokens, prior=prior
        )
        shares = {"density": args.density, "vocabulary": args.vocabulary}
        cells = [
            [name, *(f"{value:.3f}" for value in measure(drafts, **options))]
            for name, drafts, options in (
                ("all neurons, drafts in every pass", True, {"density": 1.0}),
                ("slices, drafts in every pass", True, shares),
                ("slices, no drafts in dense passes", False, shares),
            )
        ]
        print(markdown_table(["passes", "bytes read", "dense tokens"], cells))
        rows = [
            [str(n), f"{kl.mean():.4f}", f"{continuations.standard_error(kl):.4f}"]
            for n, kl in divergence(session, tokenizer, args, prior, args.rows).items()
        ]
        print(markdown_table(["dense tokens in a row", "KL", "± s.e."], rows))


if __name__ == "__main__":
    main()
