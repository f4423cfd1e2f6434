"""Compare the ways to slice a quantized down projection by what they cost in fidelity.

The dense model continues some prompts; each policy is scored on these tokens. Slices are turned
into floats after slicing: the numbers are the same, and a CPU computes them much faster.
"""

import argparse
import sys
from collections.abc import Iterable

import continuations
from glass_mlx import Selection, load, resolve_prior
from glass_mlx.checkpoints import DEFAULT_MODEL
from glass_mlx.fidelity import Reading, divergence
from glass_mlx.models import FFN, find_ffns, with_modules
from glass_mlx.models.linear import dense_weight
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import select
from glass_mlx.slicing import DEFAULT_PRIOR_STATISTIC, slice_model

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

_MIX = 0.5


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"a quantized model. Default: {DEFAULT_MODEL}")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    continuations.add_arguments(parser)
    return parser


def as_float(layer: nn.Module) -> nn.Linear:
    """A linear layer with a quantized one's numbers."""
    dense = nn.Linear(1, 1, bias=False)
    dense.weight = dense_weight(layer)
    if layer.get("bias") is not None:
        dense.bias = layer.bias
    return dense


def sliced(model: nn.Module, ffns: list[FFN], selection: Selection, policy: str) -> nn.Module:
    """The float model with its FFNs replaced by slices of the quantized ones."""
    parts = {f.path: f.sliced(selection.indices[f.path], policy) for f in ffns}
    return with_modules(
        model, {path: {n: as_float(m) for n, m in p.items()} for path, p in parts.items()}
    )


def compare(
    args: argparse.Namespace, policies: Iterable[str]
) -> dict[tuple[float, str], list[tuple[float, float]]]:
    """For each density and policy, KL(dense || sliced) and KL(exact slice || sliced) a prompt."""
    quantized, tokenizer = load(args.model, dtype="float32")
    model, _ = load(args.model, dtype="float32", dequantize=True)
    ffns = find_ffns(quantized)
    prior = resolve_prior(model).scores[DEFAULT_PRIOR_STATISTIC]
    results: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for text in tqdm(continuations.write(model, tokenizer, args), unit="prompt"):
        reading = Reading(model, text)
        fused = {
            path: fuse(ranks(scores), ranks(prior[path]), _MIX)
            for path, scores in reading.evidence().prompt.scores("activation").items()
        }
        for density in args.density:
            selection = select(fused, density, {f.path: f.multiple for f in ffns})
            exact = reading.follow(slice_model(model, selection, "requantize"))
            scored = {"exact": exact} | {
                policy: reading.follow(sliced(model, ffns, selection, policy))
                for policy in policies
            }
            for policy, ours in scored.items():
                pair = tuple(divergence(p, ours).mean().item() for p in (reading.dense, exact))
                results.setdefault((density, policy), []).append(pair)
    return results


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    try:
        results = compare(args, ("requantize",))
    except (ValueError, OSError) as error:
        print(f"compare_down_policies: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("| density | down | KL(dense, sliced) | KL(exact slice, sliced) |")
    print("| ---: | :--- | ---: | ---: |")
    for (density, policy), pairs in results.items():
        kl, extra = np.mean(pairs, axis=0)
        print(f"| {density:g} | {policy} | {kl:.3f} | {extra:.4f} |")


if __name__ == "__main__":
    main()
