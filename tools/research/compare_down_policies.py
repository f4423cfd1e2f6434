"""Compare the ways to slice a quantized down projection by error, bytes and time.

Groups of inputs share a scale, so single columns of a quantized matrix cannot be copied. The first
table is about a single random layer: the error of its output, the bytes read per token, and the
time to slice and to multiply. The second table is about a model: the dense model continues some
prompts, and each policy is scored on these continuations. For this table, slices are converted to
floats, which changes no number and is much faster on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from glass_mlx import GlassConfig, Selection, Session, load
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import divergence
from glass_mlx.models import with_modules
from glass_mlx.models.down import NeuronMajorLinear, take_inputs, take_transposed
from glass_mlx.models.linear import dense_weight
from glass_mlx.ranking import fuse, ranks
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import select

import continuations
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_PRIOR_WEIGHT = 0.5

# The policy that can keep only complete groups of inputs.
_WHOLE_GROUPS = "whole groups"

# A policy prepares a quantized layer, and returns a function that slices it to the inputs to keep.
Slicer = Callable[[np.ndarray], nn.Module]
Policy = Callable[[nn.Module], Slicer]


def to_floats(layer: nn.Module) -> nn.Linear:
    """Return a linear layer with the numbers of a quantized one, in the dtype of its scales."""
    floats = nn.Linear(1, 1, bias=False)
    floats.weight = dense_weight(layer)
    if layer.get("bias") is not None:
        floats.bias = layer.bias
    return floats


def _members(groups: np.ndarray, size: int) -> np.ndarray:
    """Return the indices of the members of some groups."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)


def _take_groups(layer: nn.Module, kept: np.ndarray) -> nn.Module:
    """Copy whole groups of neighboring inputs, which needs no rounding."""
    groups = kept[:: layer.group_size] // layer.group_size
    words = layer.group_size * layer.bits // 32
    sliced = nn.QuantizedLinear(32, 1, False, 32)
    sliced.group_size, sliced.bits, sliced.mode = layer.group_size, layer.bits, layer.mode
    sliced.weight = layer.weight[:, mx.array(_members(groups, words))]
    for name in ("scales", "biases", "bias"):
        if layer.get(name) is not None:
            sliced[name] = layer[name] if name == "bias" else layer[name][:, mx.array(groups)]
    return sliced


def _take_floats(layer: nn.Module, kept: np.ndarray) -> nn.Module:
    return take_inputs(to_floats(layer), kept)


def _take_8_bits(layer: nn.Module, kept: np.ndarray) -> nn.Module:
    return _take_floats(layer, kept).to_quantized(layer.group_size, 8, layer.mode)


def _prepare_neuron_major(layer: nn.Module) -> Slicer:
    transposed = NeuronMajorLinear(layer)
    mx.eval(transposed.parameters())
    return lambda kept: take_transposed(layer, kept, transposed)


POLICIES: dict[str, Policy] = {
    "requantize": lambda layer: partial(take_inputs, layer, policy="requantize"),
    "neuron-major": _prepare_neuron_major,
    "requantize, 8 bits": lambda layer: partial(_take_8_bits, layer),
    "float": lambda layer: partial(_take_floats, layer),
    _WHOLE_GROUPS: lambda layer: partial(_take_groups, layer),
    "scatter": lambda layer: partial(take_inputs, layer, policy="scatter"),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"A quantized model. Default: {DEFAULT_MODEL}.")
    parser.add_argument(
        "--density", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="(%(default)s)"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=(4096, 14336),
        help="Outputs and inputs of the random layer (%(default)s).",
    )
    parser.add_argument(
        "--group-size", type=int, default=64, help="Group size of the random layer (%(default)s)."
    )
    parser.add_argument(
        "--bits", type=int, default=4, help="Bits per weight of the random layer (%(default)s)."
    )
    parser.add_argument("--layer-only", action="store_true", help="Leave out the model.")
    continuations.add_arguments(parser)
    return parser


def slice_to_floats(policy: str, layer: nn.Module, kept: np.ndarray) -> nn.Module:
    """Return a float layer with the numbers of a policy's slice."""
    if policy == "scatter":
        return _take_floats(layer, kept)
    sliced = POLICIES[policy](layer)(kept)
    floats = to_floats(sliced)
    if isinstance(sliced, NeuronMajorLinear):
        floats.weight = floats.weight.T
    return floats


def best_groups(scores: np.ndarray, density: float, size: int) -> np.ndarray:
    """Return the members (k,) of the groups with the largest sums of scores, sorted."""
    sums = {"groups": scores.reshape(-1, size).sum(1)}
    groups = select(sums, density, {"groups": 1}).indices["groups"]
    return _members(groups, size)


def _median_ms(work: Callable[[], mx.array | nn.Module], times: int = 3) -> float:
    """Return the median time of some work in milliseconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        mx.eval(result.parameters() if isinstance(result, nn.Module) else result)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def measure_layer(args: argparse.Namespace, density: float) -> list[list[str]]:
    """Measure each policy on one random layer, which computes in float32.

    Returns:
        A row of the table for each policy: density, policy, error, bytes and times.
    """
    mx.random.seed(args.seed)
    outputs, width = args.shape
    linear = nn.Linear(width, outputs, bias=False)
    linear.weight = mx.random.normal((outputs, width)) * width**-0.5
    layer = linear.to_quantized(args.group_size, args.bits)
    mx.eval(layer.parameters())
    scores = np.random.default_rng(args.seed).random(width)
    best = select({"": scores}, density, {"": 512}).indices[""]
    x = mx.random.normal((64, width))
    rows = []
    for policy in POLICIES:
        grouped = policy == _WHOLE_GROUPS
        kept = best_groups(scores, density, args.group_size) if grouped else best
        rows.append([f"{density:g}", policy, *_measure_policy(policy, layer, kept, x)])
    return rows


def _measure_policy(policy: str, layer: nn.Module, kept: np.ndarray, x: mx.array) -> list[str]:
    """Return the cells of a policy for inputs x (n, in): error, MB, ms to slice, ms per token."""
    kept_x = x[:, mx.array(kept)]
    exact = kept_x @ to_floats(layer).weight[:, mx.array(kept)].T
    approximate = kept_x @ slice_to_floats(policy, layer, kept).weight.T
    error = float(mx.linalg.norm(approximate - exact) / mx.linalg.norm(exact))
    slicer = POLICIES[policy](layer)
    sliced, vector = slicer(kept), x[:1, mx.array(kept)]
    mx.eval(vector, sliced.parameters())
    slice_ms = _median_ms(lambda: slicer(kept))
    multiply_ms = _median_ms(lambda: sliced(vector), 20)
    size = sum(array.nbytes for _, array in tree_flatten(sliced.parameters()))
    return [f"{error:.3f}", f"{size / 1e6:.1f}", f"{slice_ms:.0f}", f"{multiply_ms:.1f}"]


def slice_with_policy(
    session: Session, selection: Selection, policy: str, downs: Mapping[str, nn.Module]
) -> nn.Module:
    """Slice the FFNs of a float model, with down projections that have a policy's numbers.

    Args:
        session: the float model's session.
        selection: the neurons to keep.
        policy: a key of `POLICIES`.
        downs: the quantized down projections, by FFN path.
    """
    modules = {}
    for ffn in session.ffns:
        kept = selection.indices[ffn.path]
        down = slice_to_floats(policy, downs[ffn.path], kept)
        modules[ffn.path] = ffn.sliced(kept, "requantize") | {ffn.contract[0]: down}
    return with_modules(session.model, modules)


def select_for(
    policy: str,
    scores: Mapping[str, np.ndarray],
    density: float,
    session: Session,
    downs: Mapping[str, nn.Module],
) -> Selection:
    """Select neurons: the best ones or, if the policy needs that, the best whole groups.

    Args:
        policy: a key of `POLICIES`.
        scores: (m,) scores of each FFN's neurons.
        density: the share to keep.
        session: the quantized model's session.
        downs: its down projections, by FFN path.
    """
    if policy != _WHOLE_GROUPS:
        return select(scores, density, session.multiples)
    groups = {
        path: best_groups(values, density, downs[path].group_size)
        for path, values in scores.items()
    }
    return Selection(groups, session.widths)


Pair = tuple[float, float]


def measure_model(args: argparse.Namespace) -> dict[tuple[float, str], list[Pair]]:
    """Compute KL(dense || sliced) and KL(exact slice || sliced) for each prompt.

    Returns:
        Pairs of both, by density and policy.
    """
    quantized_model, tokenizer = load(args.model, dtype="float32")
    model, _ = load(args.model, dtype="float32", dequantize=True)
    session, quantized = Session.of(model), Session.of(quantized_model)
    downs = {ffn.path: ffn.contract[1] for ffn in quantized.ffns}
    prior_ranks = session.find_prior().ranks(GlassConfig.prior_statistic)
    results: dict[tuple[float, str], list[Pair]] = {}
    for reading in continuations.read_continuations(session, tokenizer, args):
        scores = {
            path: fuse(ranks(values), prior_ranks[path], _PRIOR_WEIGHT)
            for path, values in reading.statistics().prompt.scores("activation").items()
        }
        for density in args.density:
            selection = select(scores, density, quantized.multiples)
            exact = reading.follow(session.slice(selection, "requantize"))
            for policy in POLICIES:
                kept = select_for(policy, scores, density, quantized, downs)
                sliced = reading.follow(slice_with_policy(session, kept, policy, downs))
                dense_kl, exact_kl = (
                    float(divergence(p, sliced).mean()) for p in (reading.dense, exact)
                )
                results.setdefault((density, policy), []).append((dense_kl, exact_kl))
    return results


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_down_policies"):
        args = setup_arg_parser().parse_args()
        columns = [
            "density", "down", "error of the output", "MB per token", "ms to slice", "ms per token",
        ]  # fmt: skip
        rows = [row for density in args.density for row in measure_layer(args, density)]
        print(markdown_table(columns, rows, left=("down",), padded=False))
        if args.layer_only:
            return
        columns = ["density", "down", "KL(dense, sliced)", "KL(exact slice, sliced)"]
        rows = [
            [f"{density:g}", policy, *(f"{kl:.{3 + n}f}" for n, kl in enumerate(means))]
            for (density, policy), pairs in measure_model(args).items()
            for means in [np.mean(pairs, axis=0)]
        ]
        print()
        print(markdown_table(columns, rows, left=("down",), padded=False))


if __name__ == "__main__":
    main()
