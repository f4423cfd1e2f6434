"""Command-line flags that several commands share, all for loading the model."""

import argparse
from typing import Any

from glass_mlx.checkpoints.loading import DTYPES


def check_seed(seed: int) -> None:
    """Raise ValueError unless MLX and numpy accept a seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be from 0 to 2^64 - 1, not {seed}")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set how the model's weights are stored in memory."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Data type to compute in. Default: as stored; for GGUF files float16, or float32 on a "
        "CPU.",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="Convert quantized weights to floats: uses more memory, but is much faster on a CPU.",
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """Add mlx-lm's flags for adapters and for code that comes with the model's files."""
    parser.add_argument("--adapter-path", help="Adapters to fuse into the weights.")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run Python code that comes with the model's files.",
    )


def load_options(
    args: argparse.Namespace, tokenizer_config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Turn parsed flags into keyword arguments of `load`.

    Args:
        args: the parsed flags of `add_load_arguments` and `add_adapter_arguments`.
        tokenizer_config: further options for the tokenizer.
    """
    return {
        "tokenizer_config": (tokenizer_config or {})
        | {"trust_remote_code": args.trust_remote_code},
        "adapter_path": args.adapter_path,
        "trust_remote_code": args.trust_remote_code,
        "dtype": args.dtype,
        "dequantize": args.dequantize,
    }
