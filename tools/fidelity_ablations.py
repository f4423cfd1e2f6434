"""What a referee would ask of the method beside its fidelity, on the same texts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from glass_mlx.fidelity import Continuation, Reading, places, score
from glass_mlx.models import with_taps
from glass_mlx.prior import GlobalPrior
from glass_mlx.ranking import ranks, spearman
from glass_mlx.slicing import Evidence, Slicing

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_REST = 64  # tokens at least of which the rest of a text must be, to be compared with
_EVIDENCE = (1, 9, 17, 33, 65, 129)
_AHEAD = (16, 32, 64, 128)


def _similarity(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Spearman's correlation of two rankings of neurons, mean over FFNs."""
    return float(np.mean([spearman(ranks(v), ranks(theirs[path])) for path, v in ours.items()]))


def rankings(
    model: nn.Module, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[dict[str, Any]]:
    """How well the first tokens of a text, and the prior, rank the neurons of the rest of it.

    The rest is what stands behind the longest beginning; Spearman's correlation, as a mean over
    FFNs and texts. It is bounded by how sure the ranking of the rest is.
    """
    name, found = Slicing.statistic, {}
    for text in texts:
        tokens = mx.array([*text.prompt, *text.written])
        lengths = [n for n in _LENGTHS if n + _REST <= tokens.size]
        evidence, cache = Evidence.of(model), make_prompt_cache(model)
        states = []
        for start, stop in zip([0, *lengths], [*lengths, tokens.size], strict=True):
            seen = evidence.prompt if stop < tokens.size else evidence.text
            with_taps(model, seen.update)(tokens[None, start:stop], cache=cache)
            mx.eval(seen.sums)
            states.append(seen.scores(name))
        rest = states.pop()
        by_prior = _similarity(prior.scores[Slicing.prior_statistic], rest)
        for length, state in zip(lengths, states, strict=True):
            found.setdefault(length, []).append((_similarity(state, rest), by_prior))
    return [
        {"tokens read": n, "their ranking": np.mean(v, 0)[0], "prior's": np.mean(v, 0)[1],
         "texts": len(v)}
        for n, v in sorted(found.items())
    ]  # fmt: skip


def margins(
    model: nn.Module, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[dict[str, Any]]:
    """How clear the cut between the last neuron kept and the first dropped is, by evidence.

    The gap between their fused scores, and the share of neurons within 1 % of the width of the
    cut: those that a little noise would move to the other side.
    """
    slicing = Slicing(density=density, prior=prior, refresh=0)
    found: dict[int, list[tuple[float, float]]] = {}
    for text in texts:
        reading = Reading(model, text, [n for n in _EVIDENCE if n < len(text.written)])
        for n in _EVIDENCE:
            if n >= len(text.written):
                continue
            for scores in slicing.fused(reading.evidence(n)).values():
                fused = np.sort(scores)[::-1]
                kept = min(round(density * len(fused)), len(fused) - 1)
                near = np.abs(fused - fused[kept - 1]) <= 0.01 * len(fused)
                gap = (fused[kept - 1] - fused[kept]) / len(fused)
                found.setdefault(n, []).append((gap, near.mean()))
    return [
        {"generated": n, "gap / width": np.mean(v, 0)[0], "within 1 %": np.mean(v, 0)[1]}
        for n, v in sorted(found.items())
    ]


def evidence(
    model: nn.Module, prior: GlobalPrior, texts: Iterable[Continuation], density: float
) -> list[dict[str, Any]]:
    """KL by how much was read before a selection that is kept, and how long it is kept for."""
    kinds = {"text alone": 0.0, "fused": Slicing.mix}
    found: dict[tuple[str, int, int], list[float]] = {}
    for text in texts:
        counts = [n for n in _EVIDENCE if n + min(_AHEAD) <= len(text.written)]
        base = Slicing(density=density, prior=prior, refresh=0, budgets=False)
        slicings = {
            (kind, n): replace(base, mix=mix, warmup=n)
            for kind, mix in kinds.items()
            for n in counts
        }
        reading = Reading(model, text, places(slicings.values(), len(text.written)))
        for (kind, n), slicing in slicings.items():
            kl = score(reading, slicing).kl[n - 1 :]
            for ahead in _AHEAD:
                if len(kl) >= ahead:
                    found.setdefault((kind, n, ahead), []).extend(kl[:ahead])
    return [
        {"selection by": kind, "generated": n}
        | {
            f"KL in {ahead}": np.mean(found[kind, n, ahead])
            for ahead in _AHEAD
            if (kind, n, ahead) in found
        }
        for kind, n in dict.fromkeys(key[:2] for key in found)
    ]


ABLATIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "rankings": rankings,
    "margins": margins,
    "evidence": evidence,
}


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    lines = [columns, [":---" if column == "selection by" else "---:" for column in columns]]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
