"""Quantize a model with mlx-lm's methods that look at data, to compare them with slices.

The methods are those of `mlx_lm.awq` (scales that protect large activations), `mlx_lm.dwq` (scales
and biases trained to the model's logits) and `mlx_lm.dynamic_quant` (more bits where the gradient
says so). Their own commands download texts; here the data are the model's answers to the prompts
that curves are measured on. The result is a checkpoint for `glass-mlx fidelity --checkpoints`, with
its cost in `quant-recipe.json`. All run on a CPU in float32, dwq slowly: MLX's quantized products
and their gradients are slow there, so that few steps are possible.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from glass_mlx.arguments import CommandParser, add_model_argument, check_minimums
from glass_mlx.calibration.curves import PROMPTS
from glass_mlx.checkpoints.loading import load
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import WritingSettings, continue_all, read_prompts
from glass_mlx.files import replacing
from glass_mlx.models.precision import set_dtype
from glass_mlx.prior.lookup import model_folder
from glass_mlx.session import Session
from glass_mlx.sliced_checkpoint import check_output, without_float_layers

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import quantize_model, save

_GRID = 20  # scales that awq tries, as in its command

Config = dict[str, Any]


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser."""
    parser = CommandParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="The folder to write.")
    parser.add_argument("--bits", type=int, default=4, help="For awq and dwq (%(default)s).")
    parser.add_argument(
        "--target-bits",
        type=float,
        default=4.0,
        help="Bits a weight of dynamic with scales, between those of 3 and 5 bits (%(default)s).",
    )
    parser.add_argument("--group-size", type=int, default=64, help="Default: %(default)s.")
    parser.add_argument(
        "--samples", type=int, default=16, help="Texts, and steps of dwq (%(default)s)."
    )
    parser.add_argument("--length", type=int, default=128, help="Tokens of each (%(default)s).")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="Of dwq (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    return parser


def write_texts(
    model: nn.Module, tokenizer: TokenizerWrapper, args: argparse.Namespace
) -> mx.array:
    """Return the model's answers to prompts, cut into (samples, length) tokens.

    Raises:
        ValueError: if the answers are too short.
    """
    prompts, tokens = read_prompts(PROMPTS), []
    for seed in range(args.seed, args.seed + 64):
        settings = WritingSettings(2 * args.length, 1.0, seed)
        for text in continue_all(model, tokenizer, prompts, settings):
            tokens += text.prompt + text.written
        if len(tokens) >= args.samples * args.length:
            return mx.array(tokens[: args.samples * args.length]).reshape(args.samples, -1)
    raise ValueError("the model's answers are too short to quantize by")


def awq(model: nn.Module, texts: mx.array, config: Config, args: argparse.Namespace) -> Config:
    """Quantize a model in place as `mlx_lm.awq` does, and return its configuration."""
    kind = config["model_type"]
    if kind not in AWQ_MODEL_CONFIGS:
        raise ValueError(f"mlx-lm has no awq for models of type {kind}")
    awq_quantize(
        model,
        texts,
        AWQ_MODEL_CONFIGS[kind],
        bits=args.bits,
        group_size=args.group_size,
        embed_bits=args.bits,
        embed_group_size=args.group_size,
        n_grid=_GRID,
    )
    return dict(update_config(model, config))


def dwq(model: nn.Module, texts: mx.array, config: Config, args: argparse.Namespace) -> Config:
    """Quantize a model in place and train scales as `mlx_lm.dwq` does; return its configuration."""
    teacher = copy.deepcopy(model)
    _, config = quantize_model(model, config, args.group_size, args.bits)
    data = [(text.tolist(), 0) for text in texts]
    dwq_quantize(
        model,
        lambda batch, number, split: teacher(batch),
        optimizers.Adam(learning_rate=args.learning_rate, bias_correction=True),
        data,
        data[:1],
        batch_size=1,
        max_seq_length=args.length,
        seed=args.seed,
        dtype=mx.float32,
    )
    model.eval()
    return dict(config)


def dynamic(model: nn.Module, texts: mx.array, config: Config, args: argparse.Namespace) -> Config:
    """Quantize a model in place as `mlx_lm.dynamic_quant` does, and return its configuration."""
    sizes = (3, args.group_size, 5, args.group_size)
    sensitivities = dict(estimate_sensitivities(model, texts, *sizes, batch_size=1))
    # Scales and biases have four bytes here, and two in the checkpoint.
    target_bits = args.target_bits + 2 * 16 / args.group_size
    threshold = estimate_threshold(model, sensitivities, target_bits, *sizes)

    def bits(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        is_sensitive = sensitivities[path] > threshold
        return {"bits": 5, "group_size": args.group_size} if is_sensitive else True

    _, config = quantize_model(model, config, args.group_size, 3, quant_predicate=bits)
    return dict(config)


METHODS = {"awq": awq, "dwq": dwq, "dynamic": dynamic}


def run(args: argparse.Namespace) -> str:
    """Quantize and write the checkpoint.

    Returns:
        A summary with the cost.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: for a bad value, or a model that the method does not suit.
    """
    check_output(args.output)
    check_minimums(args, samples=1, length=8, bits=2, group_size=1)
    model, tokenizer, config = load(
        args.model, dtype="float32", dequantize=True, return_config=True
    )
    folder = model_folder(tokenizer)
    assert folder is not None  # a model that was just loaded comes from one
    mx.random.seed(args.seed)
    texts, start = write_texts(model, tokenizer, args), time.perf_counter()
    config = METHODS[args.method](model, texts, without_float_layers(config, model), args)
    seconds = time.perf_counter() - start
    set_dtype(model, mx.bfloat16)  # scales take two bytes, as in published models
    recipe = {
        "method": args.method,
        "bits": args.target_bits if args.method == "dynamic" else args.bits,
        "group_size": args.group_size,
        "tokens": texts.size,
        "seconds": round(seconds, 1),
        "seed": args.seed,
    }
    with replacing(args.output, folder=True) as temporary:
        save(temporary, folder, model, tokenizer, config, donate_model=False)
        (temporary / "quant-recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    megabytes = Session.of(model).weight_bytes / 1e6
    return f"Wrote {args.output}: {megabytes:.1f} MB a token, {texts.size} tokens, {seconds:.0f} s"


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("quantize_with_data"):
        print(run(setup_arg_parser().parse()))


if __name__ == "__main__":
    main()
