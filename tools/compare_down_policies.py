"""Compare the ways to slice a quantized down projection: what they cost, read and take.

Groups of inputs share a scale, so that single columns of a quantized matrix cannot be taken as they
are. Two tables come out. One is of a single random layer: error of its output, bytes read per
token, time to slice. The other is of a model: the dense one continues some prompts, and each way is
scored on these tokens. There slices are turned into floats after slicing: the numbers are the same,
and a CPU computes them much faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import continuations
from glass_mlx import Selection, load, resolve_prior
from glass_mlx.checkpoints import DEFAULT_MODEL
from glass_mlx.command import ending
from glass_mlx.fidelity import Reading, divergence
from glass_mlx.models import FFN, find_ffns, with_modules
from glass_mlx.models.linear import NeuronMajor, dense_weight, take_inputs
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import select
from glass_mlx.slicing import DEFAULT_PRIOR_STATISTIC, slice_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

_MIX = 0.5


def _requantized(layer: nn.QuantizedLinear, kept: np.ndarray, bits: int) -> nn.Module:
    exact = take_inputs(_floating(layer), kept)
    return exact.to_quantized(layer.group_size, bits, layer.mode)


def _floating(layer: nn.QuantizedLinear) -> nn.Linear:
    """A linear layer with a quantized one's numbers, in the precision of its scales."""
    floating = nn.Linear(1, 1, bias=False)
    floating.weight = dense_weight(layer)
    if layer.get("bias") is not None:
        floating.bias = layer.bias
    return floating


def _members(groups: np.ndarray, size: int) -> np.ndarray:
    """The numbers of what is in some groups."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)


def _whole_groups(layer: nn.QuantizedLinear, kept: np.ndarray) -> nn.Module:
    """Groups of neurons that stand together, which can be taken as they are."""
    groups = kept[:: layer.group_size] // layer.group_size
    words = layer.group_size * layer.bits // 32
    sliced = nn.QuantizedLinear(32, 1, False, 32)
    sliced.group_size, sliced.bits, sliced.mode = layer.group_size, layer.bits, layer.mode
    sliced.weight = layer.weight[:, mx.array(_members(groups, words))]
    for name in ("scales", "biases", "bias"):
        if layer.get(name) is not None:
            sliced[name] = layer[name] if name == "bias" else layer[name][:, mx.array(groups)]
    return sliced


# From a quantized layer and the inputs to keep to a layer that projects these.
Policy = Callable[[nn.QuantizedLinear, np.ndarray], nn.Module]
POLICIES: dict[str, Policy] = {
    "requantize": lambda layer, kept: take_inputs(layer, kept, "requantize"),
    "neuron-major": lambda layer, kept: take_inputs(layer, kept, "neuron-major"),
    "requantize, 8 bits": lambda layer, kept: _requantized(layer, kept, 8),
    "float": lambda layer, kept: take_inputs(_floating(layer), kept),
    "whole groups": _whole_groups,
    "scatter": lambda layer, kept: take_inputs(layer, kept, "scatter"),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"a quantized model. Default: {DEFAULT_MODEL}")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=(4096, 14336),
        help="outputs and inputs of the random layer (%(default)s)",
    )
    parser.add_argument("--group-size", type=int, default=64, help="of that layer (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="of that layer (%(default)s)")
    parser.add_argument("--layer-only", action="store_true", help="leave out the model")
    continuations.add_arguments(parser)
    return parser


def effective(policy: str, layer: nn.QuantizedLinear, kept: np.ndarray) -> nn.Linear:
    """A float layer with the numbers that a sliced one has."""
    if policy == "scatter":
        return take_inputs(_floating(layer), kept)
    sliced = POLICIES[policy](layer, kept)
    if isinstance(sliced, NeuronMajor):
        made = _floating(sliced)
        made.weight = made.weight.T
        return made
    return _floating(sliced)


def in_groups(scores: np.ndarray, density: float, group: int) -> np.ndarray:
    """The neurons of the groups with the largest sums of scores, (k,) sorted."""
    sums = {"groups": scores.reshape(-1, group).sum(1)}
    chosen = select(sums, density, {"groups": 1}).indices["groups"]
    return _members(chosen, group)


def _median_ms(work: Callable[[], mx.array | nn.Module], times: int = 3) -> float:
    """Milliseconds that something takes, the median of some times."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        done = work()
        mx.eval(done.parameters() if isinstance(done, nn.Module) else done)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def layer_table(args: argparse.Namespace, density: float) -> list[str]:
    """Error, bytes and times of each way on one random layer, which computes in float32."""
    mx.random.seed(args.seed)
    outputs, width = args.shape
    linear = nn.Linear(width, outputs, bias=False)
    linear.weight = mx.random.normal((outputs, width)) * width**-0.5
    layer = linear.to_quantized(args.group_size, args.bits)
    mx.eval(layer.parameters())
    scores = np.random.default_rng(args.seed).random(width)
    anywhere = select({"": scores}, density, {"": 512}).indices[""]
    x = mx.random.normal((64, width))
    rows = []
    for policy, slice_layer in POLICIES.items():
        kept = anywhere
        if policy == "whole groups":
            kept = in_groups(scores, density, args.group_size)
        exact = x[:, mx.array(kept)] @ _floating(layer).weight[:, mx.array(kept)].T
        ours = x[:, mx.array(kept)] @ effective(policy, layer, kept).weight.T
        error = (mx.linalg.norm(ours - exact) / mx.linalg.norm(exact)).item()
        sliced = slice_layer(layer, kept)
        vector = x[:1, mx.array(kept)]
        mx.eval(vector, sliced.parameters())
        to_slice = _median_ms(lambda slice_layer=slice_layer, kept=kept: slice_layer(layer, kept))
        to_multiply = _median_ms(lambda sliced=sliced, vector=vector: sliced(vector), 20)
        size = sum(array.nbytes for _, array in tree_flatten(sliced.parameters()))
        rows.append(
            f"| {density:g} | {policy} | {error:.3f} | {size / 1e6:.1f} | "
            f"{to_slice:.0f} | {to_multiply:.1f} |"
        )
    return rows


def sliced_model(
    model: nn.Module,
    ffns: list[FFN],
    selection: Selection,
    policy: str,
    quantized: Mapping[str, nn.QuantizedLinear],
) -> nn.Module:
    """The float model with its FFNs sliced, the down projections in some way."""
    parts = {}
    for ffn in ffns:
        kept = selection.indices[ffn.path]
        name = ffn.contract[0]
        down = effective(policy, quantized[ffn.path], kept)
        parts[ffn.path] = ffn.sliced(kept, "requantize") | {name: down}
    return with_modules(model, parts)


Pair = tuple[float, float]


def model_results(args: argparse.Namespace) -> dict[tuple[float, str], list[Pair]]:
    """For each density and policy, KL(dense || sliced) and KL(exact slice || sliced) a prompt."""
    quantized, tokenizer = load(args.model, dtype="float32")
    model, _ = load(args.model, dtype="float32", dequantize=True)
    ffns = find_ffns(model)
    downs = {ffn.path: ffn.contract[1] for ffn in find_ffns(quantized)}
    multiples = {ffn.path: ffn.multiple for ffn in find_ffns(quantized)}
    prior = resolve_prior(model).scores[DEFAULT_PRIOR_STATISTIC]
    results: dict[tuple[float, str], list[Pair]] = {}
    for text in tqdm(continuations.write(model, tokenizer, args), unit="prompt"):
        reading = Reading(model, text)
        fused = {
            path: fuse(ranks(scores), ranks(prior[path]), _MIX)
            for path, scores in reading.evidence().prompt.scores("activation").items()
        }
        for density in args.density:
            selection = select(fused, density, multiples)
            exact = reading.follow(slice_model(model, selection, "requantize"))
            for policy in POLICIES:
                kept = selection
                if policy == "whole groups":
                    groups = {
                        path: in_groups(scores, density, downs[path].group_size)
                        for path, scores in fused.items()
                    }
                    kept = Selection(groups, selection.widths)
                ours = reading.follow(sliced_model(model, ffns, kept, policy, downs))
                pair = tuple(divergence(p, ours).mean().item() for p in (reading.dense, exact))
                results.setdefault((density, policy), []).append(pair)
    return results


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("compare_down_policies"):
        print("| density | down | error of the output | MB per token | ms to slice | ms a token |")
        print("| ---: | :--- | ---: | ---: | ---: | ---: |")
        for density in args.density:
            print("\n".join(layer_table(args, density)))
        if args.layer_only:
            return
        results = model_results(args)
        print("\n| density | down | KL(dense, sliced) | KL(exact slice, sliced) |")
        print("| ---: | :--- | ---: | ---: |")
        for (density, policy), pairs in results.items():
            kl, extra = np.mean(pairs, axis=0)
            print(f"| {density:g} | {policy} | {kl:.3f} | {extra:.4f} |")


if __name__ == "__main__":
    main()
