"""Measure what it costs that each of several machines chooses among its own neurons.

Tensor-parallel, each rank holds a part of each FFN's neurons and keeps the best of that part, the
same number on every rank. That is emulated here in one process, beside a choice over all neurons.
"""

import argparse
from itertools import product
from pathlib import Path

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.scoring import score
from glass_mlx.ranking import fuse, ranks
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selection, Selector, select
from glass_mlx.statistics import LocalStatistics

import continuations
import numpy as np


class SelectorInParts(Selector):
    """A selector that chooses among each part of an FFN's neurons by itself.

    Args:
        selector: the selector that it is like otherwise.
        parts: the number of parts, which are contiguous and of one size.
        same_count: whether all parts together keep as many neurons as the selector would, and not
            a multiple that suits the kernels in each part.
    """

    def __init__(self, selector: Selector, parts: int, same_count: bool = False) -> None:
        vars(self).update(vars(selector))
        self._parts = parts
        if same_count:
            self.multiples = {path: m // parts for path, m in selector.multiples.items()}

    def fuse(self, local: LocalStatistics) -> dict[str, np.ndarray]:
        """Return the fused scores (..., m) of each FFN's neurons, ranked within their parts."""
        statistic, prior = self.config.statistic, self.prior
        fused = {}
        for path, values in local.scores(statistic).items():
            scores = self._split(values)
            own = map(ranks, scores)
            if prior is not None:
                general = self._split(prior.scores[self.config.prior_statistic][path])
                weight = self._prior_weight_of(path, local)
                own = (fuse(a, ranks(b), weight) for a, b in zip(own, general, strict=True))
            fused[path] = np.concatenate([*own], axis=-1)
        return fused

    def select(self, local: LocalStatistics) -> Selection:
        """Choose the neurons to keep, as many of each part."""
        fused, density = self.fuse(local), self.config.shares.density
        split = {path: self._split(scores) for path, scores in fused.items()}
        chosen = [
            select(
                {path: scores[n] for path, scores in split.items()},
                density,
                self.multiples,
                self._kept_dense,
                self.read_shares,
            )
            for n in range(self._parts)
        ]
        widths = {path: scores.shape[-1] for path, scores in fused.items()}
        indices = {
            path: np.concatenate(
                [
                    part.indices[path] + np.int32(n * widths[path] // self._parts)
                    for n, part in enumerate(chosen)
                ],
                axis=-1,
            )
            for path in fused
        }
        return Selection(indices, widths)

    def _split(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, self._parts, axis=-1)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=8, help="Number of prompts (%(default)s).")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5], help="(%(default)s)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4], help="(%(default)s)")
    parser.add_argument(
        "--same-count", action="store_true", help="Keep as many neurons whatever the parts."
    )
    parser.add_argument("--prior", type=Path, help="The model's prior.")
    add_load_arguments(parser)
    return parser


def compare(args: argparse.Namespace) -> dict[tuple[float, int], np.ndarray]:
    """Return the mean KL and density of each text, (texts, 2), by density and number of parts."""
    session, tokenizer = continuations.load_session(args)
    prior = find_or_measure_prior(session, tokenizer, args.prior, GlassConfig(density=0.5))
    selectors = {
        (density, parts): SelectorInParts(
            make_selector(session, tokenizer, prior, GlassConfig(density=density)),
            parts,
            args.same_count,
        )
        for density, parts in product(args.density, args.parts)
    }
    results: dict[tuple[float, int], list[tuple[float, float]]] = {key: [] for key in selectors}
    points = [GlassConfig.warmup]
    for reading in continuations.read_continuations(session, tokenizer, args, points):
        if reading.tokens < points[0]:
            continue  # a text that ends before the first selection
        for key, selector in selectors.items():
            scores = score(reading, selector)
            kept = np.mean([selection.density for selection in scores.selections.values()])
            results[key].append((float(scores.kl.mean()), float(kept)))
    return {key: np.array(values) for key, values in results.items()}


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_parts"):
        args = setup_arg_parser().parse_args()
        results = compare(args)
        cells = []
        for (density, parts), values in results.items():
            kl, kept = values.T
            more = kl - results[density, args.parts[0]][:, 0]
            error = continuations.standard_error(more)
            row = [f"{density:g}", str(parts), f"{kept.mean():.3f}", f"{kl.mean():.4f}"]
            cells.append([*row, f"{more.mean():+.4f}", f"{error:.4f}"])
        print(markdown_table(["density", "parts", "kept", "KL", "more", "± s.e."], cells))


if __name__ == "__main__":
    main()
