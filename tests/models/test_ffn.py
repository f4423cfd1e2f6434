"""Properties of slices over random shapes, biases, types, quantization modes and index sets."""

import gc
import weakref
from itertools import pairwise

from glass_mlx import stream_generate
from glass_mlx.models import find_ffns, tapped, with_modules
from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.down import take_inputs
from glass_mlx.models.ffn import LAYOUTS
from glass_mlx.models.linear import dense_weight, take_outputs
from glass_mlx.slicing import slice_model
from helpers import Network, OneFFN, letter_tokenizer, made_prior, random_selection

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

MODES = [
    None,
    *(("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)),
    *(("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)),
]
WIDTH = Network.WIDTH


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
def test_a_slice_computes_the_same_as_zeroed_neurons(case):
    network, dtype, layout, kept = case
    model = OneFFN(network)
    (ffn,) = find_ffns(model)
    assert ffn.layout == {"plain": "single", "gated": "single"}.get(layout, layout)
    assert (len(ffn.expand) == 2) == (layout == "gated")
    x = mx.random.normal((2, 3, network.back.weight.shape[0])).astype(dtype)
    sliced = with_modules(model, {ffn.path: ffn.sliced(kept, "scatter")})

    def zeroed(path, hidden):
        mask = np.zeros(WIDTH, np.float32)
        mask[kept] = 1
        return hidden * mx.array(mask).astype(hidden.dtype)

    masked, output = tapped(model, {ffn.path: ffn}, zeroed)(x), sliced(x)
    scale = mx.abs(masked).max().item() + 1e-3
    tolerance = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}[dtype]
    assert mx.abs(output - masked).max().item() <= tolerance * scale
    rows = mx.array(LAYOUTS[ffn.layout](kept, WIDTH))
    parts = ffn.sliced(kept, "scatter")
    for name, layer in ffn.expand.items():
        assert mx.array_equal(dense_weight(parts[name]), dense_weight(layer)[rows])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 63), max_size=70),
    st.sampled_from([take_inputs, take_outputs]),
)
def test_only_valid_indices_are_accepted(numbers, take):
    layer = nn.Linear(64, 64)
    valid = (
        len(numbers) > 0
        and all(a < b for a, b in pairwise(numbers))
        and numbers[0] >= 0
        and numbers[-1] < 64
    )
    if not valid:
        with pytest.raises(ValueError, match="neuron indices"):
            take(layer, np.array(numbers))
        return
    axis = 1 if take is take_inputs else 0
    expected = mx.take(layer.weight, mx.array(numbers), axis=axis)
    assert mx.array_equal(take(layer, np.array(numbers)).weight, expected)


def test_an_ffn_makes_its_transposed_copy_once_and_frees_it():
    model = OneFFN(Network("gated", 128, nn.silu, (False, False)))
    nn.quantize(model, 32, 4)
    (ffn,) = find_ffns(model)
    one, two = (ffn.sliced(np.arange(n), "neuron-major")["back"] for n in (7, 90))
    transposed = ffn.transposed_down()
    assert ffn.transposed_down() is transposed
    assert mx.array_equal(one.weight, transposed.weight[:7])
    assert mx.array_equal(two.scales, transposed.scales[:90])
    down = model.layers[0].back
    down.weight = down.weight + 0  # as when weights are loaded again
    ffn.sliced(np.arange(7), "neuron-major")
    assert ffn.transposed_down() is not transposed
    copy = weakref.ref(ffn.transposed_down().weight)
    del ffn, transposed
    gc.collect()
    assert copy() is None


def test_where_outputs_do_not_fill_groups_down_is_requantized_and_the_report_says_so():
    model = tiny_model("llama", hidden_size=96)
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: "down_proj" in path)
    selection = random_selection(model)
    expected = slice_model(model, selection, "requantize")(mx.array([[1, 2, 3]]))
    assert mx.array_equal(
        slice_model(model, selection, "neuron-major")(mx.array([[1, 2, 3]])), expected
    )
    tokenizer = TokenizerWrapper(letter_tokenizer())
    options = {"max_tokens": 12, "warmup": 2, "refresh": 4, "prior": made_prior(model)}

    def policy():
        steps = stream_generate(model, tokenizer, [1, 2, 3], down_policy="neuron-major", **options)
        return {step.glass.down_policy for step in steps}

    assert policy() == {"requantize"}
    layer = model.layers[0].mlp
    layer.down_proj = nn.Linear(128, 96).to_quantized(32, 4)  # whose groups are filled
    assert policy() == {"neuron-major, requantize"}


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_models_that_quantize_activations_are_refused_with_the_reason(mode):
    model = tiny_model("llama")
    nn.quantize(
        model,
        mode=mode,
        quantize_input=True,
        class_predicate=lambda _, module: isinstance(module, nn.Linear),
    )
    with pytest.raises(ValueError, match=r"share scales.*leave out --quantize-activations"):
        find_ffns(model)
