"""Slices of layers with adapters, compared with the layers of mlx-lm."""

from glass_mlx.models import (
    MeanCompensation,
    find_ffns,
    find_head,
    fingerprint,
    tapped,
    weight_bytes,
)
from glass_mlx.models.adapters import AdaptedLinear, bias_of
from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.down import add_mean_compensation, put_inputs, take_inputs
from glass_mlx.models.linear import (
    dense_weight,
    inputs,
    leading_columns,
    outputs,
    put_outputs,
    take_outputs,
)
from glass_mlx.slicing import SlicedModel
from helpers import add_adapters, check_invariants, masked_model, random_selection

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21]])
CASES = pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        *((kind, q) for kind in (LoRALinear, DoRALinear) for q in (None, (32, 4, "affine"))),
        (LoRALinear, (32, 4, "mxfp4")),
    ],
)


def adapted(kind, quantization, bias=True):
    """Return a layer of 256 inputs and 384 outputs with a random adapter."""
    mx.random.seed(0)
    base = nn.Linear(256, 384, bias=bias)
    if quantization:
        base = base.to_quantized(*quantization)
    if bias:
        base.bias = mx.random.normal((384,))
    layer = kind.from_base(base, r=4, scale=10.0)
    layer.lora_b = 0.1 * mx.random.normal((4, 384))
    if kind is DoRALinear:
        layer.m = layer.m * mx.random.uniform(0.5, 1.5, (384,))
    return layer.eval()


def close(a, b):
    return mx.allclose(a, b, rtol=1e-4, atol=1e-4).item()


@CASES
def test_the_weight_with_its_adapter_computes_what_mlx_lm_does(kind, quantization):
    layer, x = adapted(kind, quantization), mx.random.normal((3, 256))
    tolerance = 2e-2 if quantization and quantization[2] == "mxfp4" else 1e-4  # bfloat16 weights
    y = x @ dense_weight(layer).astype(mx.float32).T + bias_of(layer)
    assert mx.abs(y - layer(x)).max() < tolerance * mx.abs(y).max()
    assert close(leading_columns(layer, 40), dense_weight(layer)[:, :40])
    assert (outputs(layer), inputs(layer)) == (384, 256)


@CASES
def test_slices_of_outputs_are_exact_and_keep_the_quantized_weights(kind, quantization):
    layer, x = adapted(kind, quantization), mx.random.normal((3, 256))
    rows, others = np.array([0, 3, 4, 50, 95, 383]), np.array([1, 2, 7])
    sliced = take_outputs(layer, rows)
    assert close(sliced(x), layer(x)[:, mx.array(rows)])
    assert mx.array_equal(sliced.base.weight, layer.linear.weight[mx.array(rows)])
    before = sliced(x)
    shared = take_outputs(layer, rows)
    put_outputs(layer, sliced, np.array([1, 4, 5]), others)
    assert close(sliced(x), layer(x)[:, mx.array([0, 1, 4, 50, 2, 7])])
    assert mx.array_equal(shared(x), before)


@CASES
def test_slices_of_inputs_equal_the_layer_with_zeros(kind, quantization):
    layer = adapted(kind, quantization)
    kept = np.sort(np.random.default_rng(0).choice(256, 128, replace=False))
    x, means = mx.random.normal((3, 128)), mx.random.normal((256,))

    def full(others):
        values = mx.repeat(others[None], 3, axis=0)
        values[:, mx.array(kept)] = x
        return values

    sliced = take_inputs(layer, kept, "scatter")
    with_zeros = layer(full(mx.zeros((256,))))
    assert close(sliced(x), with_zeros)
    add_mean_compensation(layer, sliced, kept, MeanCompensation(means))
    assert close(sliced(x), layer(full(means)))
    # The other policies round the base layer as they do without an adapter, and nothing else.
    exact = take_inputs(layer.linear, kept, "scatter")(x)
    for policy in ("requantize", "neuron-major") if quantization else ():
        again, rounded = take_inputs(layer, kept, policy), take_inputs(layer.linear, kept, policy)
        assert mx.array_equal(again.base.weight, rounded.weight)
        error = again.get("magnitude", 1) * (rounded(x) - exact)
        assert close(again(x), with_zeros + error)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_inputs_of_float_slices_are_replaced_in_place(kind):
    layer, x = adapted(kind, None), mx.random.normal((3, 4))
    sliced = take_inputs(layer, np.array([0, 3, 9, 200]))
    shared, rows = sliced.lora_a, layer.lora_a[mx.array([0, 3, 9, 200])]
    put_inputs(layer, sliced, np.array([0, 5, 9, 6]), np.array([1, 3]))
    assert mx.array_equal(shared, rows)
    expected = take_inputs(layer, np.array([0, 5, 6, 9]))
    assert close(sliced(x), expected(x[:, mx.array([0, 1, 3, 2])]))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_invariants_of_an_adapted_model(kind, bits):
    model = tiny_model("llama")
    if bits:
        nn.quantize(model, 32, bits)
    add_adapters(model, kind)
    check_invariants(model, lambda m: m(TOKENS))


@pytest.mark.parametrize("architecture", ["phi3", "nemotron", "deepseek_v3"])
def test_adapters_of_fused_plain_and_expert_layers(architecture):
    model = tiny_model(architecture)
    add_adapters(model, "lora")
    check_invariants(model, lambda m: m(TOKENS))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_of_routed_experts(architecture, bits):
    model = tiny_model(architecture)
    if bits:
        nn.quantize(model, 32, bits)
    add_adapters(model, "lora")
    ffn = find_ffns(model)[0]
    assert {type(layer) for layer in ffn.layers.values()} == {LoRASwitchLinear}
    for tokens in (TOKENS, mx.broadcast_to(TOKENS, (6, 7))):  # in order, and sorted by expert
        check_invariants(model, lambda m, tokens=tokens: m(tokens))
    layer = next(iter(ffn.expand.values()))
    x, experts = mx.random.normal((4, 1, 64)), mx.arange(4)
    y, bias = layer(x, experts), bias_of(layer)
    product = x @ dense_weight(layer).swapaxes(-1, -2)
    assert close(product if bias is None else product + bias[:, None], y)
    assert close(leading_columns(layer, 20), dense_weight(layer)[..., :20])
    plain = tiny_model(architecture)
    if bits:
        nn.quantize(plain, 32, bits)
    samples = [fingerprint(m).samples[ffn.path] for m in (model, plain)]
    assert not np.allclose(*samples)


@pytest.mark.parametrize(
    ("policy", "bits"),
    [("neuron-major", None), ("neuron-major", 4), ("scatter", 4), ("requantize", 4)],
)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_moved_slices_of_adapted_experts_equal_new_slices(policy, bits, architecture):
    model = tiny_model(architecture)
    if bits:
        nn.quantize(model, 32, bits)
    add_adapters(model, "lora")
    ffns, selections = find_ffns(model), [random_selection(model, seed) for seed in (0, 1)]
    means = {f.path: MeanCompensation(0.1 * mx.random.normal(f.shape)) for f in ffns}
    moved, new = (SlicedModel(model, ffns, policy) for _ in range(2))
    for selection in selections:
        moved.update(selection, means)
    new.update(selections[1], means)
    expected = new.model(TOKENS)
    error = mx.linalg.norm(moved.model(TOKENS) - expected) / mx.linalg.norm(expected)
    assert error < (0.1 if policy == "requantize" else 1e-4)


@pytest.mark.parametrize(
    ("policy", "bits"),
    [("neuron-major", None), ("neuron-major", 4), ("scatter", 4), ("requantize", 4)],
)
def test_moved_slices_equal_new_slices(policy, bits):
    model = tiny_model("llama")
    if bits:
        nn.quantize(model, 32, bits)
    add_adapters(model, "dora")
    ffns, selections = find_ffns(model), [random_selection(model, seed) for seed in (0, 1)]
    moved, new = (SlicedModel(model, ffns, policy) for _ in range(2))
    for selection in selections:
        moved.update(selection)
    new.update(selections[1])
    expected = new.model(TOKENS)
    error = mx.linalg.norm(moved.model(TOKENS) - expected) / mx.linalg.norm(expected)
    # Requantized columns that are in another order are in other groups.
    assert error < (0.1 if policy == "requantize" else 1e-4)
    assert not close(moved.model(TOKENS), masked_model(model, selections[0])(TOKENS))


def test_outputs_with_a_bias_below_an_adapter_are_not_observed():
    model = tiny_model("gpt2")  # whose FFNs have biases
    add_adapters(model, "lora")
    (ffn, *_) = find_ffns(model)
    assert bias_of(ffn.contract[1]) is not None
    observed = tapped(
        model, {ffn.path: ffn}, lambda path, x: x, lambda path, y: pytest.fail("observed")
    )
    down = dict(observed.named_modules())[f"{ffn.path}.{ffn.contract[0]}"]
    down(mx.zeros((1, 1, ffn.width)))


def test_bytes_count_adapters_and_fingerprints_see_them():
    model, plain = tiny_model("llama"), tiny_model("llama")
    add_adapters(model, "lora")
    rank, hidden, width = 4, 64, 128
    ffn_bytes = 3 * rank * (hidden + width) * 4
    attention_bytes = rank * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64) * 4
    adapted, without = (weight_bytes(m, find_head(m)) for m in (model, plain))
    assert adapted - without == 4 * (ffn_bytes + attention_bytes)
    selection = random_selection(model)
    sliced = SlicedModel(model, find_ffns(model), "scatter")
    sliced.update(selection)
    kept = len(next(iter(selection.indices.values())))
    dropped = 4 * 3 * (width - kept) * (hidden + rank) * 4
    assert weight_bytes(sliced.model, None) == weight_bytes(model, None) - dropped
    path = find_ffns(model)[0].path
    samples = (fingerprint(m).samples[path] for m in (model, plain))
    assert not np.allclose(*samples)
    assert isinstance(dict(sliced.model.named_modules())[f"{path}.up_proj"], AdaptedLinear)
