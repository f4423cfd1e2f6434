"""Compare densities by group of layers with the same density everywhere.

The groups' sensitivities are measured at the operating point, on text that the model writes itself.
Budgets then depart from uniform by a few steps, with the same number of neurons in all.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cuts import (
    WRITTEN,
    FFNCut,
    Reference,
    counts,
    development_texts,
    open_model,
    own_texts,
    row,
    score,
)

_DELTA = 1 / 16
_LOWEST = 0.2
_BLOCK = 32

# The sum of KL, and the number of scored tokens, of each text.
Result = tuple[np.ndarray, np.ndarray]


def budgets(widths: Mapping[str, int], shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Round shares to blocks of neurons, so that the total stays the same.

    Args:
        widths: the number of neurons of each FFN.
        shares: the share that each FFN should keep.
        total: the number of neurons to keep in all.
    """
    exact = {path: share * widths[path] / _BLOCK for path, share in shares.items()}
    blocks = {path: int(value) for path, value in exact.items()}
    by_rest = sorted(exact, key=lambda path: blocks[path] - exact[path])
    missing = total // _BLOCK - sum(blocks.values())
    for path in by_rest[: max(missing, 0)]:
        blocks[path] += 1
    for path in by_rest[::-1][: max(-missing, 0)]:
        blocks[path] -= 1
    return {path: min(_BLOCK * n, widths[path]) for path, n in blocks.items()}


def main() -> None:
    """Measure the sensitivities, and score the budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--density", type=float, nargs="+", required=True)
    parser.add_argument("--step", type=float, nargs="+", default=[0.015, 0.03, 0.06])
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument(
        "--last", type=int, nargs="+", help="Instead, keep so many of the last FFNs dense."
    )
    parser.add_argument("--own", type=int, default=8, help="Texts of the model's own.")
    parser.add_argument("--prompts", type=int, default=12, help="Development prompts.")
    parser.add_argument("--texts", type=Path, help="Folder to keep the texts in.")
    args = parser.parse_args()

    session, tokenizer, selector = open_model(args.model)
    files = [args.texts and args.texts / f"{kind}.json" for kind in ("own", "development")]
    own = own_texts(session, tokenizer, WRITTEN, files[0])[: args.own]
    development = development_texts(session, tokenizer, WRITTEN, files[1])[: args.prompts]
    widths = session.widths

    def run(texts: list[Reference], budget: Mapping[str, int]) -> Result:
        return score(texts, lambda text: FFNCut(text, selector, budget))

    def compare(name: str, budget: Mapping[str, int], bases: Mapping[str, Result]) -> None:
        print(name, "neurons", sum(budget.values()))
        for kind, texts in {"own": own, "development": development}.items():
            sums, tokens = run(texts, budget)
            print(row(f"{name}, {kind}", sums, bases[kind][0], tokens), flush=True)

    for density in args.density:
        uniform = counts(selector, widths, density)
        total = sum(uniform.values())
        free = [path for path in widths if uniform[path] < widths[path]]
        print(f"density {density}: {total} neurons, {len(own)} own texts", flush=True)
        bases = {"own": run(own, uniform), "development": run(development, uniform)}
        base_own, own_tokens = bases["own"]
        for kind, (sums, tokens) in bases.items():
            print(row(f"uniform, {kind}", sums, None, tokens), flush=True)
        for last in args.last or ():
            dense = {*widths} - {*free[: len(free) - last]}
            others = [path for path in widths if path not in dense]
            rest = (total - sum(widths[path] for path in dense)) / sum(widths[p] for p in others)
            shares = dict.fromkeys(dense, 1.0) | dict.fromkeys(others, rest)
            compare(f"last {last} dense", budgets(widths, shares, total), bases)
        if args.last:
            continue
        groups = [[*group] for group in np.array_split(np.array(free), args.groups)]
        shares = {path: uniform[path] / widths[path] for path in widths}
        gains = []
        for group in groups:
            sums = []
            for sign in (1, -1):
                changed = uniform | {
                    path: min(
                        widths[path],
                        _BLOCK * round((shares[path] + sign * _DELTA) * widths[path] / _BLOCK),
                    )
                    for path in group
                }
                sums.append((run(own, changed)[0], sum(changed[p] - uniform[p] for p in group)))
            (more, added), (fewer, removed) = sums
            gain = (fewer - more) / (added - removed) * 1e4
            gains.append(gain.sum() / own_tokens.sum())
            error = np.std(gain / own_tokens) / np.sqrt(len(own))
            print(f"{len(group)} FFNs from {group[0]}")
            print(row("more", more, base_own, own_tokens))
            print(row("fewer", fewer, base_own, own_tokens))
            print(f"nats per 10000 neurons: {gains[-1]:.3f} +- {error:.3f}", flush=True)
        z = (np.array(gains) - np.mean(gains)) / np.std(gains)
        for step in args.step:
            mean = np.mean([shares[path] for path in free])
            values = np.repeat(mean + step * z, [len(group) for group in groups])
            for _ in range(50):
                values = np.clip(values + mean - values.mean(), _LOWEST, 1)
            budget = budgets(widths, shares | dict(zip(free, values, strict=True)), total)
            print([round(budget[group[0]] / widths[group[0]], 3) for group in groups])
            compare(f"step {step}", budget, bases)


if __name__ == "__main__":
    main()
