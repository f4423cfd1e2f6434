"""The model to measure: its command-line flags, its weights and its prior."""

import argparse

from glass_mlx.arguments import (
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    check_minimums,
    division_options,
)
from glass_mlx.calibration.first_use import find_needed_prior, make_selector
from glass_mlx.checkpoints.loading import DTYPES, load, model_name
from glass_mlx.config import GlassConfig, Setting
from glass_mlx.latency.shapes import SHAPES, numbers_tokenizer, random_model, random_prior
from glass_mlx.models import DOWN_POLICIES, default_down_policy, divide, named_arrays, world
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

_GROUP_SIZE = 64
_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model; see `load_model`."""
    source = parser.add_mutually_exclusive_group()
    add_model_argument(source)
    source.add_argument(
        "--shape", choices=SHAPES, help="Use random weights in the sizes of this model instead."
    )
    parser.add_argument(
        "--down-policy",
        choices=DOWN_POLICIES,
        default=default_down_policy(),
        help="How to slice a quantized down projection (%(default)s).",
    )
    group = parser.add_argument_group("random weights")
    group.add_argument(
        "--layers", type=int, help="Use this many of the model's layers. Default: all."
    )
    group.add_argument("--bits", type=int, help="Quantize to this many bits. Default: floats.")
    group.add_argument(
        "--group-size", type=int, help=f"Weights per quantization group ({_GROUP_SIZE})."
    )
    group.add_argument("--mode", choices=_MODES, help=f"Quantization mode ({_MODES[0]}).")
    add_load_arguments(parser)
    add_pipeline_argument(parser)


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag of random weights that has no effect."""
    given = (args.layers, args.bits, args.group_size, args.mode)
    if args.shape is None and given != (None, None, None, None):
        raise ValueError(
            "--layers, --bits, --group-size and --mode are for random weights; give --shape"
        )
    check_minimums(args, layers=1)
    if args.bits is None and (args.group_size, args.mode) != (None, None):
        raise ValueError("--group-size and --mode are for quantized weights; give --bits")


def load_model(args: argparse.Namespace, lazy: bool = False) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the model and its tokenizer.

    Args:
        args: the values of the flags of `add_model_arguments`.
        lazy: whether to load each weight when it is first used.
    """
    if args.shape:
        dtype = args.dtype or DTYPES[0]
        group_size, mode = args.group_size or _GROUP_SIZE, args.mode or _MODES[0]
        is_lazy = lazy or world().size > 1
        model = random_model(args.shape, dtype, args.bits, group_size, mode, is_lazy, args.layers)
        if world().size > 1:
            divide(model, world(), args.pipeline)
            for _, array in () if lazy else named_arrays(model):
                mx.eval(array)
        return model, numbers_tokenizer(SHAPES[args.shape].vocab_size)
    options = division_options(args)
    return load(args.model, lazy=lazy, dtype=args.dtype, dequantize=args.dequantize, **options)


def load_prior(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    args: argparse.Namespace,
    settings: list[Setting],
) -> GlobalPrior | None:
    """Find the model's prior, or measure one if the settings need it; random for random weights.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        args: the values of the flags of `add_model_arguments`.
        settings: how much of the model is kept.
    """
    if args.shape:
        return random_prior(model, args.down_policy)
    session, configs = Session.of(model), [GlassConfig(**kept._asdict()) for kept in settings]
    needing = next((config for config in configs if not config.is_exact), GlassConfig())
    return find_needed_prior(session, tokenizer, config=needing, model=args.model)


def model_title(args: argparse.Namespace) -> str:
    """Return the name of the model for records, such as "llama-3.2-1b (random) 4 bits"."""
    if not args.shape:
        return model_name(args.model)
    layers = "" if args.layers is None else f" {args.layers} layers"
    return f"{args.shape} (random){layers}{'' if args.bits is None else f' {args.bits} bits'}"


def fix_densities(
    settings: list[Setting],
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
) -> list[Setting]:
    """Replace bounds on KL by the densities that they decide.

    They say nothing about random weights, whose curve is another model's.
    """
    fixed = []
    for setting in settings:
        config = GlassConfig(**setting._asdict())
        if config.bound:
            selector = make_selector(session, tokenizer, prior, config)
            density = selector.config.density
            setting = Setting(max_kl=0.0) if density is None else Setting(density=density)
        fixed.append(setting)
    return fixed
