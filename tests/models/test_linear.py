"""Slices of linear layers in every quantization mode."""

from glass_mlx.models import DOWN_POLICIES, MeanCompensation
from glass_mlx.models.down import add_mean_compensation, put_inputs, take_inputs
from glass_mlx.models.linear import dense_weight, take_outputs
from helpers import QUANTIZATION_MODES

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


def quantized(mode, group, bits, bias=False):
    mx.random.seed(0)
    layer = nn.Linear(256, 384, bias=bias)
    return layer.to_quantized(group, bits, mode)


@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
def test_outputs_are_taken_exactly(mode, group, bits):
    layer = quantized(mode, group, bits, bias=True)
    layer.bias = mx.arange(384.0)
    rows = np.array([0, 3, 4, 50, 95])
    x = mx.random.normal((3, 256))
    sliced = take_outputs(layer, rows)
    assert mx.array_equal(dense_weight(sliced), dense_weight(layer)[mx.array(rows)])
    assert mx.allclose(sliced(x), layer(x)[:, mx.array(rows)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
def test_inputs_are_taken_within_the_quantization_error(mode, group, bits):
    layer = quantized(mode, group, bits, bias=True)
    layer.bias = mx.arange(384.0)
    kept = np.sort(np.random.default_rng(0).choice(256, 128, replace=False))
    x = mx.random.normal((3, 128))
    exact = x @ dense_weight(layer)[:, mx.array(kept)].T + layer.bias
    assert mx.allclose(take_inputs(layer, kept, "scatter")(x), exact, rtol=1e-4, atol=1e-4)
    means = mx.random.normal((256,))
    full = mx.repeat(means[None], 3, axis=0)
    full[:, mx.array(kept)] = x
    sliced = take_inputs(layer, kept, "scatter")
    add_mean_compensation(layer, sliced, kept, MeanCompensation(means))
    assert mx.allclose(sliced(x), layer(full), rtol=1e-4, atol=1e-4)
    with_output = take_inputs(layer, kept, "scatter")
    output = layer(means[None])[0] - layer.bias
    add_mean_compensation(layer, with_output, kept, MeanCompensation(means, output))
    assert mx.allclose(with_output.bias, sliced.bias, atol=1e-3)
    layer.bias = layer.bias.astype(mx.bfloat16)
    for policy in DOWN_POLICIES:
        half = take_inputs(layer, kept, policy)
        add_mean_compensation(layer, half, kept, MeanCompensation(means.astype(mx.bfloat16)))
        assert half(x.astype(mx.bfloat16)).dtype == mx.bfloat16 or mode == "affine"
    for policy in ("requantize", "neuron-major"):
        again = take_inputs(layer, kept, policy)
        assert (again.bits, again.group_size, again.mode) == (bits, group, mode)
        columns = dense_weight(layer)[:, mx.array(kept)]
        weight = dense_weight(again) if policy == "requantize" else dense_weight(again).T
        error = mx.linalg.norm(weight - columns) / mx.linalg.norm(columns)
        assert error < {2: 0.6, 3: 0.3}.get(bits, 0.15)


@pytest.mark.parametrize("policy", DOWN_POLICIES)
@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
def test_inputs_are_replaced_in_place_in_the_order_of_the_slice(mode, group, bits, policy):
    layer = quantized(mode, group, bits, bias=True)
    before, after = np.arange(128), np.arange(128)
    places = np.array([0, 5, 127])
    after[places] = [200, 131, 255]
    sliced, x = take_inputs(layer, before, policy), mx.random.normal((3, 128))
    add_mean_compensation(layer, sliced, before, MeanCompensation(mx.ones(256)))
    put_inputs(layer, sliced, after, places)
    full = mx.zeros((3, 256))
    full[:, mx.array(after)] = x
    error = mx.linalg.norm(sliced(x) - layer(full)) / mx.linalg.norm(layer(full))
    rounding = 1e-4 if policy == "scatter" else {2: 0.6, 3: 0.3}.get(bits, 0.15)
    assert error < rounding


@pytest.mark.parametrize("wrong", [-1, 256, 3], ids=["negative", "too large", "duplicate"])
@pytest.mark.parametrize("policy", [None, *DOWN_POLICIES])
def test_bad_inputs_are_not_put_into_a_slice(policy, wrong):
    layer = quantized("affine", 64, 4) if policy else nn.Linear(256, 384)
    sliced, kept = take_inputs(layer, np.arange(64), policy or "requantize"), np.arange(64)
    kept[5] = wrong
    with pytest.raises(ValueError, match="neuron indices"):
        put_inputs(layer, sliced, kept, np.array([5]))


def test_outputs_that_do_not_fill_groups_cannot_be_transposed():
    layer = nn.Linear(256, 96, bias=False).to_quantized(64, 4)
    with pytest.raises(ValueError, match="96 outputs in groups of 64"):
        take_inputs(layer, np.arange(64), "neuron-major")


@pytest.mark.parametrize(
    "indices",
    [[], [3, 2], [2, 2], [-1, 2], [0, 256], [[0, 1]], [0.0, 1.0]],
    ids=["empty", "unsorted", "duplicate", "negative", "too large", "matrix", "floats"],
)
def test_bad_indices_are_refused(indices):
    layer = nn.Linear(256, 256)
    for take in (take_outputs, take_inputs):
        with pytest.raises(ValueError, match="neuron indices"):
            take(layer, np.array(indices))


def test_partial_groups_cannot_be_requantized():
    with pytest.raises(ValueError, match="groups of 64"):
        take_inputs(quantized("affine", 64, 4), np.arange(40))
