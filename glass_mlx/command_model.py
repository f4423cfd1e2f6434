"""The model that a command's flags name, and its prior."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from glass_mlx.arguments import load_options
from glass_mlx.calibration.first_use import find_needed_prior
from glass_mlx.checkpoints.loading import advice, load
from glass_mlx.config import GlassConfig
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.session import Session

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper


def note_advice(model: nn.Module) -> None:
    """Say on standard error how the model would be faster, if it would."""
    if hint := advice(model):
        print(hint, file=sys.stderr)


def load_session(args: argparse.Namespace, **options: Any) -> tuple[Session, TokenizerWrapper]:
    """Load the model of `--model`, and return its session and its tokenizer.

    Args:
        args: the parsed flags; see `load_options`.
        **options: further arguments of `load`.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if it cannot be used.
    """
    model, tokenizer = load(args.model, **load_options(args), **options)
    note_advice(model)
    return Session.of(model), tokenizer


def find_prior(
    args: argparse.Namespace,
    session: Session,
    tokenizer: TokenizerWrapper,
    given: GlobalPrior | None,
    config: GlassConfig,
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior | None:
    """Find or measure the model's prior; None with `--no-prior` or `--dense`, or if none is needed.

    Args:
        args: the parsed flags.
        session: the model's session.
        tokenizer: its tokenizer.
        given: the prior of `--prior`, or None.
        config: how the model is sliced.
        report: called with a line for each place that was searched.

    Raises:
        OSError: if the user's cache cannot be written.
        ValueError: if the prior does not fit, or cannot be measured.
    """
    if args.dense or args.no_prior:
        return None
    return find_needed_prior(session, tokenizer, given, config, args.model, report)
