"""Show where the time of a decode step goes, dense and sliced, alternating in one process.

The feed-forward networks and the head are also run by themselves; what they leave of a whole step
is attention, norms and everything else. Building is the part of a step in which Python makes the
graph; in a generation that goes on while the step before is computed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from glass_mlx.command import ending
from glass_mlx.models import find_ffns, weight_bytes
from glass_mlx.models.linear import is_linear
from glass_mlx.slicing import Evidence, Slicing, slice_model
from measure_latency import add_model_arguments, load_model, prior_of

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

_WHOLE, _BUILDING, _FFNS, _HEAD, _REST = "whole step", "building", "FFNs", "head", "rest"


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--density", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=64, help="tokens read (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=40, help="(%(default)s)")
    return parser


def _size(modules: list[nn.Module]) -> int:
    return sum(array.nbytes for m in modules for _, array in tree_flatten(m.parameters()))


def _seconds(build: Callable[[], Any]) -> tuple[float, float]:
    """How long it takes to build a graph, and to build and compute it."""
    start = time.perf_counter()
    graph = build()
    built = time.perf_counter() - start
    mx.eval(graph)
    return built, time.perf_counter() - start


class Parts:
    """The parts of a decode step.

    Args:
        model: the model, dense or sliced.
        paths: of its FFNs.
        context: how many tokens its cache holds.
    """

    def __init__(self, model: nn.Module, paths: list[str], context: int) -> None:
        modules = dict(model.named_modules())
        self._model, self._ffns = model, [modules[path] for path in paths]
        heads = [m for m in modules.values() if is_linear(m) or hasattr(m, "as_linear")]
        self._head = max(heads, key=lambda layer: (layer.weight.shape[0], is_linear(layer)))
        self._cache, tokens = make_prompt_cache(model), mx.zeros((1, context), mx.uint32)
        mx.eval(model(tokens, cache=self._cache)[:, -1])
        kinds = (nn.Embedding, nn.QuantizedEmbedding)
        embed = next(m for m in modules.values() if isinstance(m, kinds))
        self._x = embed(mx.array([[0]], mx.uint32))
        mx.eval(self._x)
        whole = weight_bytes(model)
        parts = {_WHOLE: whole, _FFNS: _size(self._ffns), _HEAD: _size([self._head])}
        self.bytes = parts | {_REST: 2 * whole - sum(parts.values())}

    def measure(self) -> dict[str, float]:
        """Seconds of each part, once."""
        head = getattr(self._head, "as_linear", self._head)
        token = mx.array([[0]], mx.uint32)
        built, whole = _seconds(lambda: self._model(token, cache=self._cache))
        _, ffns = _seconds(lambda: [ffn(self._x) for ffn in self._ffns])
        _, last = _seconds(lambda: head(self._x))
        rest = whole - ffns - last
        return {_WHOLE: whole, _BUILDING: built, _FFNS: ffns, _HEAD: last, _REST: rest}


def run(args: argparse.Namespace) -> None:
    """Measure and print a table."""
    model, _ = load_model(args)
    prior = prior_of(model, args)
    ffns = find_ffns(model)
    slicing = Slicing(density=args.density, prior=prior, mix=1.0)
    selection = slicing.select(ffns, Evidence.of(model))
    models = {"dense": model, "sliced": slice_model(model, selection, args.down_policy)}
    parts = {name: Parts(m, [ffn.path for ffn in ffns], args.context) for name, m in models.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for _ in tqdm(range(args.repetitions), file=sys.stderr, leave=False):
        for name, timed in parts.items():
            times[name].append(timed.measure())
    print(
        f"density {selection.density:.3f}, {args.context} tokens of context, medians of "
        f"{args.repetitions}"
    )
    print("| part | dense ms | MB | GB/s | sliced ms | MB | GB/s | faster | ceiling |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for part in (_WHOLE, _FFNS, _HEAD, _REST, _BUILDING):
        cells, ms = [], [1e3 * median(t[part] for t in times[name]) for name in parts]
        for name, spent in zip(parts, ms, strict=True):
            size = parts[name].bytes.get(part)
            known = ("", "") if size is None else (f"{size / 1e6:.1f}", f"{size / spent / 1e6:.1f}")
            cells += [f"{spent:.2f}", *known]
        both = [parts[name].bytes.get(part) for name in parts]
        ceiling = "" if both[0] is None else f"{both[0] / both[1]:.2f}"
        print(f"| {' | '.join([part, *cells, f'{ms[0] / ms[1]:.2f}', ceiling])} |")


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("profile_decode"):
        run(args)


if __name__ == "__main__":
    main()
