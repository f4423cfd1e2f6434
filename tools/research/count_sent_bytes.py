"""Count the bytes that each of several machines gives to the others, dense and sliced.

Run it with `mlx.launch`. What MLX's functions are given is counted; how often a backend sends it
over a link depends on the backend.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from glass_mlx import GlassConfig, Session, load, stream_generate
from glass_mlx.arguments import (
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    division_options,
)
from glass_mlx.calibration.first_use import find_or_measure_prior
from glass_mlx.distributed import joined
from glass_mlx.errors import exit_on_error
from glass_mlx.models import world
from glass_mlx.reporting.tables import markdown_table

import mlx.core as mx
import mlx_lm

FUNCTIONS = ("all_sum", "all_gather", "send")


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--prompt", default="Why is the sky blue?", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="Generated tokens (%(default)s).")
    parser.add_argument("--density", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--warmup", type=int, default=16, help="(%(default)s)")
    add_load_arguments(parser)
    add_pipeline_argument(parser)
    return parser


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the bytes and calls of everything that this rank gives to others."""
    counts: Counter[str] = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(array: mx.array, *args: Any, **kwargs: Any) -> Any:
            counts["bytes"] += array.nbytes
            counts["calls"] += 1
            return function(array, *args, **kwargs)

        return call

    original = {name: getattr(mx.distributed, name) for name in FUNCTIONS}
    replaced = {name: counting(function) for name, function in original.items()}
    with patch.multiple(mx.distributed, **replaced):
        yield counts


def count(args: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the table."""
    options = {"dtype": args.dtype, "dequantize": args.dequantize, **division_options(args)}
    model, tokenizer = load(args.model, **options)
    session, tokens = Session.of(model), tokenizer.encode(args.prompt)
    config = GlassConfig(density=args.density, warmup=args.warmup)
    prior = find_or_measure_prior(session, tokenizer, None, config, args.model)
    tokenizer.eos_token_ids = []
    ways = {
        "dense": lambda: mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=args.tokens),
        "sliced": lambda: stream_generate(
            session, tokenizer, tokens, args.tokens, config=config, prior=prior
        ),
    }
    rows = []
    for name, generate in ways.items():
        with counted() as counts:
            responses = [*generate()]
        text = len(tokens) + len(responses)
        rows.append([name, str(text), str(counts["bytes"]), f"{counts['bytes'] / text:.0f}"])
        rows[-1].append(str(counts["calls"]))
    return rows


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("count_sent_bytes"), joined("generate", "count_sent_bytes"):
        rows = count(setup_arg_parser().parse_args())
        print(f"{world().size} ranks")
        print(markdown_table(["", "tokens", "bytes", "bytes per token", "calls"], rows))


if __name__ == "__main__":
    main()
