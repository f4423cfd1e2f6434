"""What the tools that measure fidelity share: prompts, and the dense model's continuations."""

import argparse
from pathlib import Path

from glass_mlx.fidelity import Continuation, continue_densely, read_prompts

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

PROMPTS = Path(__file__).with_name("development_prompts.txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which texts a model is scored on."""
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens a prompt")
    parser.add_argument("--temp", type=float, default=0.7, help="temperature of sampling")
    parser.add_argument("--seed", type=int, default=0)


def write(
    model: nn.Module, tokenizer: TokenizerWrapper, args: argparse.Namespace
) -> list[Continuation]:
    """Have the dense model continue the prompts; those with nothing to score are left out."""
    prompts = read_prompts(args.prompts)
    texts = continue_densely(model, tokenizer, prompts, args.tokens, args.temp, args.seed)
    return [text for text in texts if len(text.written) > 1]
