"""Compare FFNs in three levels with slices at equal bytes.

The neurons that rank highest have the model's own 4 bits, the next ones come from a 3-bit copy, and
the last ones are dropped. The reference is the model with FFNs rounded to 4 bits. All products are
computed in float32.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from glass_mlx import Session
from glass_mlx.models import FFN, with_modules
from glass_mlx.selection import Selector, densities

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from cuts import (
    CONFIG,
    MIN_OVERLAP,
    Decoder,
    Masked,
    Reference,
    development_texts,
    means,
    open_model,
    row,
    score,
)

_GROUP = 64
_HIGH, _LOW, _DROPPED = 2, 1, 0
_LOW_COST = 3.5 / 4.5

# FFN bytes as a share of the dense model's, and the shares of dropped neurons to try. At 0, the
# 4-bit and 3-bit neurons share the bytes.
TRIALS: dict[float, tuple[float, ...]] = {
    0.889: (0.0, 0.05, 0.08),
    0.833: (0.0, 0.1, 0.13),
    0.778: (0.0, 0.1, 0.16),
    0.736: (0.055, 0.125, 0.2, 0.23),
    0.6: (0.25, 0.32),
}
_CONTROLS_AT = 0.833


def rounded(weight: mx.array, bits: int) -> mx.array:
    """Round a matrix to some bits, in groups along its rows."""
    return mx.dequantize(*mx.quantize(weight, _GROUP, bits), _GROUP, bits)


def linear(layer: nn.Module, weight: mx.array, bias: mx.array | None = None) -> nn.Module:
    """Return a linear layer with other weights."""
    out = nn.Linear(1, 1, bias=False)
    out.weight = weight
    if bias is not None:
        out.bias = bias
    return out


def four_bit(session: Session) -> Session:
    """Return the model with FFNs rounded to 4 bits."""
    modules = {
        ffn.path: {n: linear(layer, rounded(layer.weight, 4)) for n, layer in ffn.layers.items()}
        for ffn in session.ffns
    }
    mx.eval([layer.parameters() for parts in modules.values() for layer in parts.values()])
    return Session(with_modules(session.model, modules))


def three_bit(session: Session) -> dict[str, dict[str, mx.array]]:
    """Return the 3-bit copies, with a neuron's weights in rows, as slices need them."""
    out = {}
    for ffn in session.ffns:
        name, down = ffn.contract
        out[ffn.path] = {n: rounded(layer.weight, 3) for n, layer in ffn.expand.items()}
        out[ffn.path][name] = mx.contiguous(rounded(mx.contiguous(down.weight.T), 3).T)
    mx.eval(out)
    return out


class LevelCut:
    """FFNs in three levels, by fused scores.

    Args:
        text: the text.
        fuse: returns the scores of each FFN's neurons after some generated tokens.
        copies: the 3-bit copies.
        numbers: for each FFN, how many neurons have 4 bits, and how many have 3.
    """

    def __init__(
        self,
        text: Reference,
        fuse: Callable[[Reference, int], Mapping[str, np.ndarray]],
        copies: Mapping[str, Mapping[str, mx.array]],
        numbers: Mapping[str, tuple[int, int]],
    ) -> None:
        self._text, self._fuse, self._copies, self._numbers = text, fuse, copies, numbers
        self._levels: dict[str, np.ndarray] = {}
        self._modules: dict[str, dict[str, nn.Module]] = {}

    def __call__(self, generated: int) -> nn.Module:
        """Return the model that decodes after some generated tokens."""
        scores = self._fuse(self._text, generated)
        constants = means(self._text.statistics(generated))
        for ffn in self._text.session.ffns:
            high, low = self._numbers[ffn.path]
            order = np.argsort(-scores[ffn.path], kind="stable")
            levels = np.full(ffn.width, _DROPPED)
            levels[order[:high]], levels[order[high : high + low]] = _HIGH, _LOW
            before = self._levels.get(ffn.path)
            if before is not None:
                same = ((levels == before) & (levels != _DROPPED)).sum()
                if same >= MIN_OVERLAP * (high + low):
                    continue
            self._levels[ffn.path] = levels
            self._modules[ffn.path] = self._mixed(ffn, levels, constants[ffn.path])
        return with_modules(self._text.session.model, self._modules)

    def _mixed(self, ffn: FFN, levels: np.ndarray, constants: np.ndarray) -> dict[str, nn.Module]:
        copies, is_low = self._copies[ffn.path], mx.array(levels == _LOW)
        name, down = ffn.contract
        kept = levels != _DROPPED
        if not (levels == _LOW).any():
            return {name: Masked(down, kept, constants)}
        parts = {
            n: linear(layer, mx.where(is_low[:, None], copies[n], layer.weight))
            for n, layer in ffn.expand.items()
        }
        weight = mx.where(is_low[None], copies[name], down.weight)
        # The engine's compensation replaces the constant part of every difference of down.
        bias = (down.weight - weight) @ mx.array(constants.astype(np.float32))
        parts[name] = Masked(linear(down, weight, bias), kept, constants)
        mx.eval([part.parameters() for part in parts.values()])
        return parts


def level_numbers(
    selector: Selector, widths: Mapping[str, int], share: float, dropped: float | None
) -> dict[str, tuple[int, int]]:
    """Return how many neurons of each FFN have 4 bits, and how many have 3.

    Args:
        selector: says which FFNs stay as they are.
        widths: the number of neurons of each FFN.
        share: the bytes, as a share of all neurons at 4 bits.
        dropped: the share of dropped neurons, or None to use 4 bits alone.
    """
    kept_dense = selector.prior.kept_dense if selector.prior else ()
    numbers = {}
    for path, rest in densities(widths, share, kept_dense).items():
        m = widths[path]
        if rest == 1 or dropped is None:
            numbers[path] = round(rest * m), 0
            continue
        kept = round((1 - dropped) * m)
        high = max(0, round((rest * m - _LOW_COST * kept) / (1 - _LOW_COST)))
        low = min(kept - high, round((rest * m - high) / _LOW_COST))
        numbers[path] = high, low
    return numbers


def main() -> None:
    """Score slices and levels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=12, help="Development prompts.")
    parser.add_argument("--texts", type=Path, help="Folder to keep the texts in.")
    args = parser.parse_args()

    full, tokenizer, selector = open_model(args.model)
    session = four_bit(full)
    copies, widths = three_bit(session), session.widths
    file = args.texts and args.texts / "development_4bit.json"
    texts = development_texts(session, tokenizer, args.prompts, file)[: args.prompts]
    noise = {path: np.random.default_rng(0).permutation(m) for path, m in widths.items()}

    def by_weight(weight: float) -> Callable[[Reference, int], Mapping[str, np.ndarray]]:
        chosen = Selector(replace(CONFIG, prior_weight=weight), {}, selector.prior, "")
        return lambda text, generated: chosen.fuse(text.statistics(generated))

    def run(
        numbers: Mapping[str, tuple[int, int]],
        fuse: Callable[[Reference, int], Mapping[str, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        def make(text: Reference) -> Decoder:
            return LevelCut(text, fuse, copies, numbers)

        return score(texts, make)

    default = by_weight(CONFIG.prior_weight)
    total = sum(widths.values())
    for share, trials in TRIALS.items():
        numbers = level_numbers(selector, widths, share, None)
        base, tokens = run(numbers, default)
        real = sum(high for high, _ in numbers.values()) / total
        print(row(f"slices, bytes {real:.4f}", base, None, tokens), flush=True)
        for dropped in trials:
            numbers = level_numbers(selector, widths, share, dropped)
            parts = np.array([*numbers.values()]).sum(0) / total
            real = parts[0] + _LOW_COST * parts[1]
            name = f"{parts[0]:.3f} at 4 bits, {parts[1]:.3f} at 3 bits, bytes {real:.4f}"
            ours, _ = run(numbers, default)
            print(row(name, ours, base, tokens), flush=True)
            if share == _CONTROLS_AT and dropped == 0:
                controls = {
                    "by the prior alone": by_weight(1.0),
                    "by the text alone": by_weight(0.0),
                    "at random": lambda text, generated: noise,
                }
                for label, fuse in controls.items():
                    other, _ = run(numbers, fuse)
                    print(row(f"the same {label}, vs ranked", other, ours, tokens), flush=True)


if __name__ == "__main__":
    main()
