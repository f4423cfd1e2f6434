"""Command-line flags that several commands share, and their values."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.checkpoints.loading import DTYPES
from glass_mlx.config import GlassConfig, Setting
from glass_mlx.files import expand_user
from glass_mlx.models import world

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# Flags with text, which may be empty.
_MAY_BE_EMPTY = ("prompt", "system_prompt", "prefill_response", "chat_template")


class CommandParser(argparse.ArgumentParser):
    """A parser of a command's flags, whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError, which `exit_on_error` prints."""
        raise ValueError(f"{message}; --help lists the flags")

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help. Unlike argparse's method, this one does not hide errors of the output."""
        print(self.format_help(), end="", file=file)

    def parse(self) -> argparse.Namespace:
        """Parse the command line.

        Raises:
            ValueError: for a wrong flag or value, or an empty name, as from an unset variable.
        """
        args = self.parse_args()
        for name, value in vars(args).items():
            if value == "" and name not in _MAY_BE_EMPTY:
                raise ValueError(f"--{name.replace('_', '-')} is empty")
        return args


def path(text: str) -> Path:
    """Return the path that a flag names, with the user's home folder in place of `~`."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return expand_user(text)


# The quantizations of the key-value cache that MLX has kernels for.
_KV_BITS = (2, 3, 4, 5, 6, 8)
_KV_GROUP_SIZES = (32, 64, 128)


def check_cache_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for the first of mlx-lm's cache flags whose value is of no use."""
    check_minimums(args, max_kv_size=1, quantized_kv_start=0)
    if args.kv_bits not in (None, *_KV_BITS):
        raise ValueError(f"--kv-bits must be one of {_listed(_KV_BITS)}, not {args.kv_bits}")
    if args.kv_group_size not in _KV_GROUP_SIZES:
        raise ValueError(
            f"--kv-group-size must be one of {_listed(_KV_GROUP_SIZES)}, not {args.kv_group_size}"
        )


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for the first of mlx-lm's sampling flags whose value is out of range."""
    for flag, low, high in (
        ("--temp", 0, math.inf),
        ("--top-p", 0, 1),
        ("--min-p", 0, 1),
        ("--top-k", 0, math.inf),
        ("--min-tokens-to-keep", 1, math.inf),
        ("--xtc-probability", 0, 1),
        ("--xtc-threshold", 0, 0.5),
    ):
        value = getattr(args, flag[2:].replace("-", "_"))
        if not low <= value <= high or value == math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            limit = f"at least {low}{finite}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{flag} must be {limit}, not {value}")


def check_minimums(args: argparse.Namespace, **minimums: int) -> None:
    """Raise ValueError for the first flag below its minimum. Flags without a value are not checked.

    Args:
        args: the parsed flags.
        **minimums: the least value of each flag, by its name in `args`.
    """
    for name, low in minimums.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")


def check_one_machine(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for the first given flag that several machines cannot honour.

    Args:
        args: the parsed flags.
        *names: the flags that work on one machine only, by their names in `args`.
    """
    for name in names if world().size > 1 else ():
        if getattr(args, name) not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} cannot be used with mlx.launch, which divides the model")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def add_model_argument(parser: "argparse._ActionsContainer") -> None:
    """Add the flag that names the model."""
    parser.add_argument(
        "--model",
        help="The hub id, folder or GGUF file of the model. "
        f"Default: the built-in {DEFAULT_MODEL}, downloaded once.",
    )


def add_prior_argument(parser: "argparse._ActionsContainer") -> None:
    """Add the flag that names the model's prior, for commands that search for one."""
    parser.add_argument("--prior", help="The model's prior. Default: searched for as by generate.")


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
    parser.add_argument(
        "--adapter-path", help="A folder with adapters (LoRA, DoRA or full) from mlx-lm."
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run Python code that comes with the model's files.",
    )


def add_draft_arguments(parser: "argparse._ActionsContainer") -> None:
    """Add mlx-lm's flags for speculative decoding."""
    parser.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="A small model with the same tokenizer, which drafts tokens for the sliced model.",
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        default=3,
        metavar="N",
        help="Number of tokens to draft at once (default: %(default)s).",
    )


def draft_options(args: argparse.Namespace) -> dict[str, Any]:
    """Turn parsed flags into keyword arguments of `load_draft`."""
    names = ("trust_remote_code", "dtype", "dequantize")
    options = {name: getattr(args, name) for name in names}
    return options | {"tokenizer_config": {"trust_remote_code": args.trust_remote_code}}


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """Add mlx-lm's flag for models that `mlx.launch` runs on several machines."""
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="With mlx.launch, give each machine some of the layers, and not some of the neurons.",
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
    } | division_options(args)


def division_options(args: argparse.Namespace) -> dict[str, Any]:
    """Turn the parsed flag of `add_pipeline_argument` into keyword arguments of `load`.

    Raises:
        ValueError: if there is only one process to divide the model over.
    """
    if not hasattr(args, "pipeline"):  # a command that runs on one machine
        return {}
    ranks = world()
    if args.pipeline and ranks.size == 1:
        raise ValueError("--pipeline needs several machines: start the command with mlx.launch")
    return {"ranks": ranks, "pipeline": args.pipeline}


def add_settings_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags that list how much of the model is kept; see `make_settings`.

    Args:
        parser: the parser.
        default: what is kept without these flags, for the help.
    """
    parser.add_argument(
        "--max-kl",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help=f"Bounds on KL, which decide the density. Without bounds and shares: {default}.",
    )
    parser.add_argument(
        "--density",
        type=float,
        nargs="+",
        default=[],
        help="Shares of the feed-forward neurons to keep, instead of bounds.",
    )
    parser.add_argument(
        "--vocabulary",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="Shares of the vocabulary that compute each token, without drafts, each with every "
        "density. Default: all of it.",
    )


def make_settings(args: argparse.Namespace, default: Setting) -> list[Setting]:
    """Return the settings to measure: every bound on KL, and every density with every share.

    Args:
        args: the values of the flags of `add_settings_arguments`.
        default: the setting without these flags.

    Raises:
        ValueError: for the first value that is out of range.
    """
    bounds = [Setting(max_kl=bound) for bound in args.max_kl]
    pairs = [
        Setting(density=density, vocabulary=share)
        for density in args.density or [1.0] * bool(args.vocabulary)
        for share in args.vocabulary or [1.0]
    ]
    settings = bounds + pairs or [default]
    for setting in settings:
        GlassConfig(**setting._asdict())
    return settings
