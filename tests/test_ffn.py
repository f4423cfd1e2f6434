"""Properties of slices, over random shapes, biases, types, quantization modes and index sets."""

from itertools import pairwise

from glass_mlx.models import find_ffns, with_modules, with_taps
from glass_mlx.models.ffn import LAYOUTS
from glass_mlx.models.linear import dense_weight, take_inputs, take_outputs

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MODES = [
    None,
    *(("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)),
    *(("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)),
]
WIDTH = 256


class Network(nn.Module):
    """A feed-forward network as some model might write it, under names of its own."""

    def __init__(self, layout, hidden, activation, biases):
        super().__init__()
        self._layout, self._activation = layout, activation
        rows = WIDTH if layout in ("plain", "gated") else 2 * WIDTH
        self.into = nn.Linear(hidden, rows, bias=biases[0])
        if layout == "gated":
            self.beside = nn.Linear(hidden, WIDTH, bias=biases[0])
        self.back = nn.Linear(WIDTH, hidden, bias=biases[1])
        for layer in self.children().values():
            if "bias" in layer:
                layer.bias = mx.random.normal(layer.bias.shape)

    def __call__(self, x):
        h = self.into(x)
        if self._layout == "plain":
            return self.back(self._activation(h))
        if self._layout == "gated":
            return self.back(self._activation(h) * self.beside(x))
        if self._layout == "halves":
            gate, up = mx.split(h, 2, axis=-1)
        else:
            gate, up = h[..., ::2], h[..., 1::2]
        return self.back(self._activation(gate) * up)


class Model(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.layers = [network]

    def __call__(self, x):
        return self.layers[0](x)


@st.composite
def cases(draw):
    mode = draw(st.sampled_from(MODES))
    layout = draw(st.sampled_from(["plain", "gated", "halves", "interleaved"]))
    activation = draw(st.sampled_from([nn.silu, nn.relu2, nn.gelu_approx]))
    mx.random.seed(draw(st.integers(0, 99)))
    network = Network(
        layout,
        draw(st.sampled_from([128, 384])),
        activation,
        draw(st.tuples(st.booleans(), st.booleans())),
    )
    dtype = mx.float32
    if mode is None:
        dtype = draw(st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
        network.set_dtype(dtype)
    else:
        kind, group, bits = mode
        nn.quantize(network, group, bits, mode=kind)
    kept = draw(st.sets(st.integers(0, WIDTH - 1), min_size=1, max_size=WIDTH - 1))
    return network, dtype, layout, np.array(sorted(kept), np.int32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_a_slice_computes_what_zeroed_neurons_leave(case):
    network, dtype, layout, kept = case
    model = Model(network)
    (ffn,) = find_ffns(model)
    assert ffn.layout == {"plain": "single", "gated": "single"}.get(layout, layout)
    assert (len(ffn.expand) == 2) == (layout == "gated")
    x = mx.random.normal((2, 3, network.back.weight.shape[0])).astype(dtype)
    sliced = with_modules(model, {ffn.path: ffn.sliced(kept, "scatter")})

    def zeroed(path, hidden):
        mask = np.zeros(WIDTH, np.float32)
        mask[kept] = 1
        return hidden * mx.array(mask).astype(hidden.dtype)

    masked, got = with_modules(model, {ffn.path: ffn.tapped(zeroed)})(x), sliced(x)
    scale = mx.abs(masked).max().item() + 1e-3
    tolerance = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}[dtype]
    assert mx.abs(got - masked).max().item() <= tolerance * scale
    rows = mx.array(LAYOUTS[ffn.layout](kept, WIDTH))
    parts = ffn.sliced(kept, "scatter")
    for name, layer in ffn.expand.items():
        assert mx.array_equal(dense_weight(parts[name]), dense_weight(layer)[rows])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 63), max_size=70),
    st.sampled_from([take_inputs, take_outputs]),
)
def test_bad_indices_are_refused_and_good_ones_taken(numbers, take):
    layer = nn.Linear(64, 64)
    good = (
        len(numbers) > 0
        and all(a < b for a, b in pairwise(numbers))
        and numbers[0] >= 0
        and numbers[-1] < 64
    )
    if not good:
        with pytest.raises(ValueError, match="neuron indices"):
            take(layer, np.array(numbers))
        return
    axis = 1 if take is take_inputs else 0
    wanted = mx.take(layer.weight, mx.array(numbers), axis=axis)
    assert mx.array_equal(take(layer, np.array(numbers)).weight, wanted)


@pytest.mark.parametrize(
    ("shape", "shown"), [((1, 3), 3), ((1, 4), 4), ((1, 9), 3), ((2, 8), 8), ((9,), 9)]
)
def test_of_the_last_of_many_tokens_few_are_shown(shape, shown):
    mx.random.seed(0)
    model, seen = Model(Network("gated", 32, nn.silu, (False, True))), []

    def watch(path, hidden):
        seen.append(hidden)
        return hidden

    x = mx.random.normal((*shape, 32))
    assert mx.array_equal(with_taps(model, watch, few=4)(x), model(x))
    (hidden,) = seen
    assert hidden.size == shown * WIDTH
    every = -(-shape[-1] // (shown // shape[0])) if len(shape) == 2 else 1
    with_taps(model, watch)(x[:, ::every] if len(shape) == 2 else x)
    assert mx.allclose(seen[1], hidden, atol=1e-5)
