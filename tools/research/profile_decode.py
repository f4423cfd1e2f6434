"""Show where the time of a decode step goes, dense and sliced, alternating in one process.

The feed-forward networks and the output head are also run separately. The rest of a step is
attention, norms and everything else. Building is the time that Python takes to build the graph. In
a generation, Python does this while the previous step is computed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from glass_mlx.config import GlassConfig, Setting
from glass_mlx.errors import exit_on_error
from glass_mlx.latency.measured_model import add_model_arguments, load_model, load_prior
from glass_mlx.models import FFN, named_arrays
from glass_mlx.models.linear import is_linear
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

_WHOLE, _BUILDING, _FFNS, _HEAD, _REST = "whole step", "building", "FFNs", "head", "rest"


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--density", type=float, default=0.5, help="Share to keep (%(default)s).")
    parser.add_argument(
        "--context", type=int, default=64, help="Tokens in the cache (%(default)s)."
    )
    parser.add_argument("--repetitions", type=int, default=40, help="Timed steps (%(default)s).")
    return parser


def _size(modules: list[nn.Module]) -> int:
    return sum(array.nbytes for m in modules for _, array in named_arrays(m))


def _seconds(build: Callable[[], Any]) -> tuple[float, float]:
    """Time how long it takes to build a graph, and to build and compute it."""
    start = time.perf_counter()
    graph = build()
    built = time.perf_counter() - start
    mx.eval(graph)
    return built, time.perf_counter() - start


def _callable(
    modules: Mapping[str, nn.Module], ffn: FFN, read_shares: Mapping[str, float]
) -> Callable[[mx.array], mx.array]:
    """Return an FFN as a function of its input; a stack computes as many experts as for a token.

    Experts in a list are called by the module around them, which the time includes.
    """
    module: Any = modules[ffn.block_path]
    if ffn.experts is None or ffn.block_path != ffn.path:
        return module
    chosen = mx.arange(max(1, round(ffn.experts * read_shares[ffn.path])))[None, None]
    return lambda x: module(x, chosen)


class Parts:
    """The parts of a decode step.

    Args:
        model: the model, dense or sliced.
        session: the dense model's session.
        context: the number of tokens in its cache.
    """

    def __init__(self, model: nn.Module, session: Session, context: int) -> None:
        modules = dict(model.named_modules())
        self._model = model
        self._ffns = [_callable(modules, ffn, session.read_shares) for ffn in session.ffns]
        heads = [m for m in modules.values() if is_linear(m) or hasattr(m, "as_linear")]
        self._head = max(heads, key=lambda layer: (layer.weight.shape[0], is_linear(layer)))
        self._cache, tokens = make_prompt_cache(model), mx.zeros((1, context), mx.uint32)
        mx.eval(model(tokens, cache=self._cache)[:, -1])
        kinds = (nn.Embedding, nn.QuantizedEmbedding)
        embed = next(m for m in modules.values() if isinstance(m, kinds))
        self._x = embed(mx.array([[0]], mx.uint32))
        mx.eval(self._x)
        whole = session.bytes_of(model)
        arrays = named_arrays(model)
        ffns = sum(
            session.read_shares.get(ffn.path, 1.0) * array.nbytes
            for ffn in session.ffns
            for path, array in arrays
            if path.startswith(f"{ffn.path}.")
        )
        parts = {_WHOLE: whole, _FFNS: round(ffns), _HEAD: _size([self._head])}
        self.bytes = parts | {_REST: 2 * whole - sum(parts.values())}

    def measure(self) -> dict[str, float]:
        """Time each part once, in seconds."""
        head = getattr(self._head, "as_linear", self._head)
        token = mx.array([[0]], mx.uint32)
        built, whole = _seconds(lambda: self._model(token, cache=self._cache))
        _, ffns = _seconds(lambda: [ffn(self._x) for ffn in self._ffns])
        _, last = _seconds(lambda: head(self._x))
        rest = whole - ffns - last
        return {_WHOLE: whole, _BUILDING: built, _FFNS: ffns, _HEAD: last, _REST: rest}


Times = list[dict[str, float]]


def format_table(parts: dict[str, Parts], times: dict[str, Times]) -> str:
    """Format a Markdown table of the parts of dense and sliced steps: medians and bytes."""
    rows = []
    for part in (_WHOLE, _FFNS, _HEAD, _REST, _BUILDING):
        milliseconds = [1e3 * median(step[part] for step in times[name]) for name in parts]
        sizes = [parts[name].bytes.get(part) for name in parts]
        cells = [part]
        for size, ms in zip(sizes, milliseconds, strict=True):
            megabytes = "" if size is None else f"{size / 1e6:.1f}"
            bandwidth = "" if size is None else f"{size / ms / 1e6:.1f}"
            cells += [f"{ms:.2f}", megabytes, bandwidth]
        dense_size, sliced_size = sizes
        ceiling = f"{dense_size / sliced_size:.2f}" if dense_size and sliced_size else ""
        rows.append([*cells, f"{milliseconds[0] / milliseconds[1]:.2f}", ceiling])
    columns = ["part", "dense ms", "MB", "GB/s", "sliced ms", "MB", "GB/s", "faster", "ceiling"]
    return markdown_table(columns, rows, left=("part",), padded=False)


def run(args: argparse.Namespace) -> None:
    """Measure and print a table."""
    model, tokenizer = load_model(args)
    session = Session.of(model)
    prior = load_prior(model, tokenizer, args, [Setting(density=args.density)])
    selector = session.selector(GlassConfig(density=args.density, prior_weight=1.0), prior)
    selection = selector.select(session.empty_statistics())
    models = {"dense": model, "sliced": session.slice(selection, args.down_policy)}
    parts = {name: Parts(each, session, args.context) for name, each in models.items()}
    times: dict[str, Times] = {name: [] for name in parts}
    for _ in tqdm(range(args.repetitions), file=sys.stderr, leave=False):
        for name, timed in parts.items():
            times[name].append(timed.measure())
    print(
        f"density {selection.density:.3f}, {args.context} tokens of context, medians of "
        f"{args.repetitions}"
    )
    print(format_table(parts, times))


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("profile_decode"):
        args = setup_arg_parser().parse_args()
        run(args)


if __name__ == "__main__":
    main()
