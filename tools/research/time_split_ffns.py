"""Time a decode step through FFNs in one quantized part, and in two parts of as many bytes."""

import argparse
import time

from glass_mlx.reporting.tables import markdown_table

import mlx.core as mx
import mlx.nn as nn

_GROUP = 64

# For each case, the parts of each FFN: the share of the neurons, and the bits.
CASES: dict[str, list[tuple[float, int]]] = {
    "4 bits, all neurons": [(1.0, 4)],
    "3 bits, all neurons": [(1.0, 3)],
    "4 bits, 0.736": [(0.736, 4)],
    "4 bits, 0.25 + 0.486": [(0.25, 4), (0.486, 4)],
    "4 bits 0.25 + 3 bits 0.625": [(0.25, 4), (0.625, 3)],
}


class Part(nn.Module):
    """Some neurons of a gated FFN, with quantized random weights."""

    def __init__(self, hidden: int, neurons: int, bits: int, neuron_major: bool) -> None:
        super().__init__()
        rows, columns = (neurons, hidden) if neuron_major else (hidden, neurons)
        self.gate, self.up = (
            mx.quantize(mx.random.normal((neurons, hidden)), _GROUP, bits) for _ in range(2)
        )
        self.down = mx.quantize(mx.random.normal((rows, columns)), _GROUP, bits)
        self._bits, self._transpose = bits, not neuron_major

    def __call__(self, x: mx.array) -> mx.array:
        """Project (1, hidden) to (1, hidden)."""
        gate, up = (
            mx.quantized_matmul(x, *w, True, _GROUP, self._bits) for w in (self.gate, self.up)
        )
        hidden = nn.silu(gate) * up
        return mx.quantized_matmul(hidden, *self.down, self._transpose, _GROUP, self._bits)


def main() -> None:
    """Time each case, in turns, and print the fastest step of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--neurons", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--neuron-major", action="store_true")
    args = parser.parse_args()

    models, megabytes = {}, {}
    for name, parts in CASES.items():
        models[name] = [
            [
                Part(args.hidden, _GROUP * round(share * args.neurons / _GROUP), bits,
                     args.neuron_major)
                for share, bits in parts
            ]
            for _ in range(args.layers)
        ]  # fmt: skip
        arrays = [[p.gate, p.up, p.down] for layer in models[name] for p in layer]
        mx.eval(arrays)
        megabytes[name] = sum(a.nbytes for p in arrays for w in p for a in w) / 1e6
    x = mx.random.normal((1, args.hidden))
    fastest = dict.fromkeys(CASES, float("inf"))
    for _ in range(args.steps):
        for name, layers in models.items():
            start = time.perf_counter()
            y = x
            for layer in layers:
                total = layer[0](y)
                for part in layer[1:]:
                    total = total + part(y)
                y = y + total / mx.linalg.norm(total)
            mx.eval(y)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    rows = [[name, f"{megabytes[name]:.1f}", f"{fastest[name] * 1e3:.1f}"] for name in CASES]
    print(markdown_table(["FFNs", "MB", "ms"], rows))


if __name__ == "__main__":
    main()
