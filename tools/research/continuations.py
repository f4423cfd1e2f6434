"""The texts that research scripts score on: the dense model's continuations of prompts."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from glass_mlx import Session, load
from glass_mlx.fidelity.prompts import WritingSettings, continue_all, read_prompts
from glass_mlx.fidelity.scoring import DenseReading

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

PROMPTS = Path(__file__).with_name("development_prompts.txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set which texts a model is scored on."""
    parser.add_argument(
        "--prompts", type=Path, default=PROMPTS, help="Prompts, one per line (%(default)s)."
    )
    parser.add_argument("--tokens", type=int, default=128, help="Generated tokens per prompt.")
    parser.add_argument("--temp", type=float, default=0.7, help="Sampling temperature.")
    parser.add_argument("--seed", type=int, default=0, help="Sampling seed.")


def writing_settings(args: argparse.Namespace) -> WritingSettings:
    """Return the settings for writing, from the flags of `add_arguments`."""
    return WritingSettings(args.tokens, args.temp, args.seed)


def load_session(args: argparse.Namespace) -> tuple[Session, TokenizerWrapper]:
    """Load the model as the flags `--model`, `--dtype` and `--dequantize` say."""
    model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
    return Session.of(model), tokenizer


def read_continuations(
    session: Session,
    tokenizer: TokenizerWrapper,
    args: argparse.Namespace,
    points: Sequence[int] = (1,),
) -> Iterator[DenseReading]:
    """Have the dense model continue all prompts, and read each continuation.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        args: the flags of `add_arguments`.
        points: the numbers of generated tokens after which neurons may be selected; see
            `DenseReading`.

    Yields:
        The readings of all continuations that have tokens to score.
    """
    prompts = read_prompts(args.prompts)[: getattr(args, "limit", None)]
    texts = continue_all(session.model, tokenizer, prompts, writing_settings(args))
    for text in tqdm([text for text in texts if len(text.written) > 1], unit="prompt"):
        yield DenseReading(session, text, points)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard error of a mean over texts, or NaN for a single text."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
