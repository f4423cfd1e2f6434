"""Compare priors by how close the sliced model stays to the dense one.

The dense model continues the prompts; for each prior, statistic and density the sliced model is
scored on these tokens. Selection by the prompt alone, and by the continuation itself (the oracle),
stand beside them.
"""

import argparse
import json
from pathlib import Path

import continuations
from glass_mlx import GlobalPrior, Selection, load, resolve_prior
from glass_mlx.checkpoints import DEFAULT_MODEL, add_load_arguments, model_name
from glass_mlx.command import ending
from glass_mlx.fidelity import Reading, divergence
from glass_mlx.models import find_ffns
from glass_mlx.provenance import made_with
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import jaccard, select
from glass_mlx.slicing import slice_model

import mlx.core as mx
import numpy as np
from tqdm import tqdm


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"Default: the built-in {DEFAULT_MODEL}")
    parser.add_argument("--prior", type=Path, nargs="+", required=True, help="files to compare")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--mix", type=float, nargs="+", default=[0.5], help="λ (%(default)s)")
    continuations.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="append one JSON line a row to this file")
    add_load_arguments(parser)
    return parser


def selections(
    reading: Reading, priors: dict[str, GlobalPrior], args: argparse.Namespace, multiples: dict
) -> dict[tuple[str, float], Selection]:
    """What every method keeps, by the method's name and density."""
    local = reading.evidence().prompt.scores("activation")
    ranked = {path: ranks(scores) for path, scores in local.items()}
    methods = {"prompt alone": local, "oracle": reading.oracle.scores("activation")}
    for name, prior in priors.items():
        for statistic, scores in prior.scores.items():
            for mix in args.mix:
                methods[f"{name}, {statistic}, λ {mix:g}"] = {
                    path: fuse(ranked[path], ranks(values), mix) for path, values in scores.items()
                }
    return {
        (method, density): select(scores, density, multiples)
        for method, scores in methods.items()
        for density in args.density
    }


def compare(args: argparse.Namespace) -> dict[tuple[str, float], np.ndarray]:
    """By method and density: sums of KL, -log p, agreeing top tokens, tokens; Jaccard, prompts."""
    model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
    priors = {str(file): resolve_prior(model, file) for file in args.prior}
    multiples = {ffn.path: ffn.multiple for ffn in find_ffns(model)}
    totals: dict[tuple[str, float], np.ndarray] = {}
    for text in tqdm(continuations.write(model, tokenizer, args), unit="prompt"):
        reading = Reading(model, text)
        kept = selections(reading, priors, args, multiples)
        for (method, density), selection in kept.items():
            scored = reading.follow(slice_model(model, selection, "scatter"))
            agree = mx.argmax(scored, -1) == mx.argmax(reading.dense, -1)
            sums = [
                divergence(reading.dense, scored).sum(),
                reading.negative_log_likelihood(scored).sum(),
                agree.sum(),
            ]
            overlap = np.mean([*jaccard(selection, kept["oracle", density]).values()])
            row = np.array([*(s.item() for s in sums), agree.size, overlap, 1])
            totals[method, density] = totals.get((method, density), 0) + row
    return totals


def report(args: argparse.Namespace, totals: dict[tuple[str, float], np.ndarray]) -> None:
    """Print a table, and write JSON lines if they were asked for."""
    print("| density | selection | KL | perplexity | same top token | Jaccard with oracle |")
    print("| ---: | :--- | ---: | ---: | ---: | ---: |")
    for (method, density), (kl, nll, agree, tokens, overlap, prompts) in sorted(
        totals.items(), key=lambda item: item[0][1]
    ):
        row = {
            "density": density,
            "method": method,
            "kl": kl / tokens,
            "perplexity": float(np.exp(nll / tokens)),
            "top1": agree / tokens,
            "jaccard": overlap / prompts,
        }
        print(
            f"| {density:g} | {method} | {row['kl']:.3f} | {row['perplexity']:.2f} | "
            f"{row['top1']:.3f} | {row['jaccard']:.3f} |"
        )
        if args.json:
            with args.json.open("a") as file:
                arguments = {key: str(value) for key, value in vars(args).items()}
                about = made_with() | {"model": model_name(args.model), "arguments": arguments}
                file.write(json.dumps(about | row | {"tokens": int(tokens)}) + "\n")


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("compare_priors"):
        report(args, compare(args))


if __name__ == "__main__":
    main()
