"""Compare ways to rank the neurons of experts, on a dense model upcycled into a mixture of experts.

What an upcycled model computes is known (see `upcycling`), but its experts did not learn to differ.
Every way is scored with the engine's slices on the dense model's continuations of the development
prompts, against the mixture itself.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.mixture import MeasuredRecipe, Mixture
from glass_mlx.calibration.moments import SequenceMoments
from glass_mlx.calibration.sequence_scores import measure_sequences
from glass_mlx.calibration.texts import Recipe, Sequence, chat_frame, make_source
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import continue_all, read_prompts
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.models import weight_bytes
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.ranking import expert_prior_weights, fuse, ranks
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selection, Selector, select
from glass_mlx.session import Session
from glass_mlx.statistics import LocalStatistics
from glass_mlx.writing import Writer

import continuations
import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm
from upcycling import KINDS, upcycle

_POOLED = "default, pooled"
_STATIC = {"warmup": 1, "refresh": 0, "dense_every": 0}


@dataclass(frozen=True)
class Way:
    """A way to rank the neurons of experts.

    Attributes:
        options: options of `GlassConfig`.
        has_prior: whether there is a prior.
        scores: scores (experts, m) by path, from the selector and the local statistics. Default:
            the selector's.
    """

    options: dict[str, Any] = field(default_factory=dict)
    has_prior: bool = True
    scores: Callable[[Selector, LocalStatistics], dict[str, np.ndarray]] | None = None


def _constant(selector: Selector, local: LocalStatistics) -> dict[str, np.ndarray]:
    """Fuse every expert's rankings with the same weight of the prior."""
    return _weighted(selector, local, lambda tokens, prior: selector.config.prior_weight)


def _typical(typical: int) -> Callable[[Selector, LocalStatistics], dict[str, np.ndarray]]:
    """Return a fusion by the rule with another number of typical tokens."""

    def scores(selector: Selector, local: LocalStatistics) -> dict[str, np.ndarray]:
        weight = selector.config.prior_weight
        return _weighted(
            selector,
            local,
            lambda tokens, prior: expert_prior_weights(weight, tokens, prior, typical)[:, None],
        )

    return scores


def _weighted(
    selector: Selector,
    local: LocalStatistics,
    weight: Callable[[np.ndarray, np.ndarray], float | np.ndarray],
) -> dict[str, np.ndarray]:
    assert selector.prior is not None
    prior_ranks = selector.prior.ranks(selector.config.prior_statistic)
    fused = {}
    for path, scores in local.scores(selector.config.statistic).items():
        tokens = local.routed(path)
        assert tokens is not None
        prior_tokens = selector.prior.routed[path]
        fused[path] = fuse(ranks(scores), prior_ranks[path], weight(tokens, prior_tokens))
    return fused


def _pooled(selector: Selector, local: LocalStatistics) -> dict[str, np.ndarray]:
    """Rank the neurons of all experts alike, by the evidence of all of them together.

    Neuron j of one expert has to do with neuron j of another in copies alone.
    """
    assert selector.prior is not None
    config, fused = selector.config, {}
    for path, sums in local.basis.sums.items():
        total = np.array(sums[config.statistic]).sum((0, 1))
        shares = selector.prior.routed[path] / selector.prior.routed[path].sum()
        prior = shares @ np.square(selector.prior.scores[config.prior_statistic][path])
        scores = fuse(ranks(total), ranks(prior), config.prior_weight)
        fused[path] = np.broadcast_to(scores, selector.prior.scores["griffin"][path].shape)
    return fused


WAYS = {
    "prompt-only": Way(_STATIC, has_prior=False),
    "prior-only": Way(_STATIC | {"prior_weight": 1.0}),
    "fused": Way(_STATIC),
    "default": Way(),
    "default, refresh 32": Way({"refresh": 32}),
    "default, no prior": Way(has_prior=False),
    "default, constant λ": Way(scores=_constant),
    "default, n = 2": Way(scores=_typical(2)),
    "default, n = 8": Way(scores=_typical(8)),
    "default, n = 32": Way(scores=_typical(32)),
    "default, n = 128": Way(scores=_typical(128)),
    _POOLED: Way(scores=_pooled),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    continuations.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=3, help="Number of prompts (%(default)s).")
    parser.add_argument("--kind", choices=KINDS, default="copies", help="(%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="Experts a layer (%(default)s).")
    parser.add_argument("--per-token", type=int, default=2, help="Experts a token (%(default)s).")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5], help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument(
        "--sequences", type=int, default=16, help="Texts for the prior (%(default)s)."
    )
    parser.add_argument("--length", type=int, default=96, help="Tokens of each (%(default)s).")
    parser.add_argument("--prior", type=Path, help="The prior's file, written if it is missing.")
    add_load_arguments(parser)
    return parser


def write_sequences(
    session: Session, tokenizer: TokenizerWrapper, args: argparse.Namespace
) -> list[Sequence]:
    """Have the dense model write the texts that the routers and the prior are measured on."""
    writer = Writer(session.model, 1.0, [args.seed, 0], lambda count: None)
    if tokenizer.has_chat_template:
        recipe, frame = Recipe("chat"), chat_frame(tokenizer)
    else:
        recipe, frame = Recipe("bos"), None
    return make_source(recipe, writer, tokenizer, args.length, frame)(args.sequences, 0)


def measure_prior(
    session: Session, sequences: list[Sequence], file: Path | None, name: str
) -> GlobalPrior:
    """Measure the mixture's prior, or read it from a file."""
    if file is not None and file.is_file():
        return session.find_prior(file)
    moments = SequenceMoments(session.shapes, ("griffin",), session.vocabulary_size)
    for start in tqdm(range(0, len(sequences), 4), desc="prior"):
        measure_sequences(session, sequences[start : start + 4], ("griffin",), moments)
    recipe = MeasuredRecipe(Recipe("bos"), {"recipe": "bos"}, moments, None)
    mixture = Mixture([recipe], ("griffin",))
    scores = {path: mixture.mean("griffin", path).astype(np.float32) for path in session.shapes}
    routed = {path: mixture.routed(path).astype(np.float32) for path in moments.routed}
    about = {"model": name, "tokens": mixture.tokens}
    prior = GlobalPrior({"griffin": scores}, session.fingerprint, about, routed=routed)
    if file is not None:
        prior.save(file)
    return prior


def _select(way: Way, selector: Selector) -> Callable[[LocalStatistics], Selection]:
    """Return the function that selects neurons in a way."""

    def choose(local: LocalStatistics) -> Selection:
        assert way.scores is not None
        scores = way.scores(selector, local)
        return select(scores, selector.config.shares.density, session_multiples)

    session_multiples = selector.multiples
    return selector.select if way.scores is None else choose


def compare(args: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the table: way, density, KL, its error, bytes, and log KL with its error.

    The logarithm of KL is taken against that of the first way on the same text.
    """
    dense, tokenizer = continuations.load_session(args)
    prompts = read_prompts(args.prompts)[: args.limit]
    written = continue_all(dense.model, tokenizer, prompts, continuations.writing_settings(args))
    sequences = write_sequences(dense, tokenizer, args)
    model = upcycle(
        dense.model, [s.tokens for s in sequences], args.kind, args.experts, args.per_token
    )
    session = Session(model)
    prior = measure_prior(session, sequences, args.prior, args.kind)
    counts = np.concatenate([*prior.routed.values()])
    print(
        f"{args.kind}: {args.experts} experts, {args.per_token} a token, "
        f"{session.weight_bytes / 1e6:.0f} MB a token (dense model "
        f"{weight_bytes(dense.model, dense.head) / 1e6:.0f}); the prior's experts have seen "
        f"{counts.min():.0f} to {counts.max():.0f} tokens"
    )
    results: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for text in tqdm([text for text in written if len(text.written) > 40], unit="text"):
        reading = DenseReading(session, text, [1, GlassConfig.warmup])
        for name in args.ways:
            if name == _POOLED and args.kind != "copies":
                continue
            way = WAYS[name]
            for density in args.density:
                config = GlassConfig(density=density, uniform=True, **way.options)
                selector = session.selector(config, prior if way.has_prior else None)
                scores = score(reading, selector, _select(way, selector))
                pair = float(scores.kl.mean()), float(scores.bytes.mean())
                results.setdefault((name, density), []).append(pair)
                mx.clear_cache()
    rows = []
    for (name, density), pairs in results.items():
        kl, read = np.array(pairs).T
        reference = np.array(results[args.ways[0], density])[:, 0]
        ratio = np.log(kl / reference)
        kl_error, ratio_error = (continuations.standard_error(values) for values in (kl, ratio))
        cells = [f"{kl.mean():.4f}", f"{kl_error:.4f}", f"{read.mean():.3f}"]
        rows.append([name, f"{density:g}", *cells, f"{ratio.mean():+.3f}", f"{ratio_error:.3f}"])
    return rows


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_expert_evidence"):
        rows = compare(setup_arg_parser().parse_args())
        columns = ["way", "density", "KL", "± s.e.", "bytes", "log KL against first", "± s.e."]
        print(markdown_table(columns, rows, left=("way",)))


if __name__ == "__main__":
    main()
