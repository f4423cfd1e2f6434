"""Measure the global prior of a model and write it to a file."""

import argparse
import sys
from pathlib import Path

from glass_mlx import calibrate, load
from glass_mlx.checkpoints import DEFAULT_MODEL
from glass_mlx.generate import add_load_arguments


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens to generate and measure (%(default)s)"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="sequences at once (%(default)s)"
    )
    parser.add_argument(
        "--temp", type=float, default=1.0, help="sampling temperature (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    add_load_arguments(parser)
    return parser


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    partial = args.output.with_name(f"{args.output.name}.partial")
    try:
        model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
        prior = calibrate(
            model,
            tokenizer,
            name=args.model or DEFAULT_MODEL,
            tokens=args.tokens,
            length=args.length,
            batch_size=args.batch_size,
            temperature=args.temp,
            seed=args.seed,
            checkpoint=partial,
        )
        prior.save(args.output)
    except (ValueError, OSError) as error:
        print(f"build_priors: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command goes on from {partial}", file=sys.stderr)
        sys.exit(130)
    partial.unlink(missing_ok=True)
    print(f"Wrote {args.output}: {prior.about['tokens']} tokens")


if __name__ == "__main__":
    main()
