"""Sliced models and their updates."""

import copy
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

from glass_mlx import slicing
from glass_mlx.models import MeanCompensation, find_ffns, named_arrays
from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.linear import dense_weight
from glass_mlx.selection import Selection
from glass_mlx.session import Session
from glass_mlx.slicing import SlicedModel, mean_compensation, slice_model
from glass_mlx.statistics import MEAN
from helpers import local_statistics, masked_model, random_selection

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", intermediate_size=1280)


def test_slices_can_be_made_in_any_thread(model):
    mx.eval(model.parameters())
    selection = random_selection(model)

    def logits():
        return np.array(slice_model(model, selection, "requantize")(mx.array([[1, 2, 3]])))

    expected = logits()
    with ThreadPoolExecutor(1) as executor:
        assert np.array_equal(executor.submit(logits).result(), expected)


def test_any_number_of_ffns_is_sliced_on_several_streams():
    model = tiny_model("qwen3", num_hidden_layers=3)
    selection, tokens = random_selection(model), mx.array([[1, 2, 3]])
    masked = masked_model(model, selection)(tokens)
    logits = slice_model(model, selection, "requantize")(tokens)
    assert mx.allclose(logits, masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cores", "streams"), [(None, 1), (1, 1), (2, 2), (4, 4), (64, 4)])
def test_a_cpu_slices_with_at_most_four_threads(monkeypatch, cores, streams):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    slicing._extra_cpu_streams.cache_clear()
    with mx.stream(mx.cpu):
        assert len(slicing._streams()) == (streams if mx.default_device() == mx.cpu else 1)
    slicing._extra_cpu_streams.cache_clear()


def test_mean_compensation_shrinks_means_towards_zero(model):
    assert mean_compensation(local_statistics(model, 20, 7)) == {}
    statistics = Session(model).empty_statistics()
    path = find_ffns(model)[0].path
    hidden = np.random.default_rng(0).normal(2, 1, (1, 16, 1280)).astype(np.float32)
    for part in (hidden[:, :10], hidden[:, 10:]):
        statistics.text.update(path, mx.array(part))
    assert statistics.text.tokens == 16
    assert np.allclose(mean_compensation(statistics)[path].inputs, hidden[0].mean(0) / 2, atol=1e-5)
    assert mean_compensation(statistics)[path].output is None
    down = mx.random.normal((1280, 64))
    for part in (hidden[:, :10], hidden[:, 10:]):
        statistics.text.update_outputs(path, mx.array(part) @ down)
    means = mean_compensation(statistics.copy())[path]
    assert np.allclose(means.output, means.inputs @ down, atol=1e-3)


def exact_weight(layer):
    """Return a layer's weights, dequantized in float32."""
    layer = copy.copy(layer)
    for name in ("scales", "biases"):
        if name in layer:
            layer[name] = layer[name].astype(mx.float32)
    return np.array(dense_weight(layer).astype(mx.float32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("has_output", [True, False])
def test_compensation_is_computed_in_float32_and_stored_in_the_model_s_dtype(
    dtype, bits, has_output
):
    """It is a difference of nearly equal vectors: in bfloat16 it would be wrong by a tenth.

    Nor can it come from outputs that the model rounded, whatever they are summed in.
    """
    model = tiny_model("llama", intermediate_size=1280, mlp_bias=True)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    ffns, statistics = find_ffns(model), Session(model).empty_statistics()
    dense = {ffn.path: exact_weight(ffn.contract[1]) for ffn in ffns}
    generator, selection = np.random.default_rng(0), random_selection(model, share=0.9)
    for ffn in ffns:
        hidden = mx.array(generator.normal(2, 0.1, (1, 16, 1280))).astype(dtype)
        # As in real models, the first token has a massive activation.
        hidden[0, 0, int(selection.indices[ffn.path][0])] = 1e4
        statistics.text.update(ffn.path, hidden)
        if has_output:
            exact = hidden.astype(mx.float32) @ mx.array(dense[ffn.path].T)
            statistics.text.update_outputs(ffn.path, exact.astype(dtype))  # as the model rounds it
    sliced = SlicedModel(model, ffns, "scatter")
    sliced.update(selection, mean_compensation(statistics))
    modules = dict(sliced.model.named_modules())
    for ffn in ffns:
        mean = statistics.text.scores(MEAN)[ffn.path].astype(np.float64) / 2
        dropped = np.setdiff1d(np.arange(1280), selection.indices[ffn.path])
        expected = dense[ffn.path][:, dropped] @ mean[dropped]
        down = modules[f"{ffn.path}.down_proj"]
        assert down.bias.dtype == dtype
        old_bias = np.array(ffn.contract[1].bias.astype(mx.float32))
        bias = np.array(down.bias.astype(mx.float32))
        error = np.linalg.norm(bias - old_bias - expected) / np.linalg.norm(expected)
        assert error < {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 6e-3}[dtype]
    tokens = mx.array([[1, 2, 3]])
    assert sliced.model(tokens).dtype == model(tokens).dtype == dtype


def replace_neurons(selection, path, count, seed=0):
    """Return a selection with `count` neurons of one FFN replaced by others."""
    generator, current = np.random.default_rng(seed), selection.indices[path]
    others = np.setdiff1d(np.arange(selection.widths[path]), current)
    remaining = generator.permutation(current)[count:]
    kept = np.sort([*remaining, *generator.permutation(others)[:count]]).astype(np.int32)
    return Selection(selection.indices | {path: kept}, selection.widths)


def test_slices_that_would_hardly_change_are_kept(model):
    sliced, first = SlicedModel(model, find_ffns(model), "requantize"), random_selection(model)
    sliced.update(first)
    one, kept = sliced.model, sliced.selection
    assert all(np.array_equal(kept.indices[path], first.indices[path]) for path in first.indices)
    paths = [*first.indices]
    before = [mx.array(dict(one.named_modules())[f"{p}.gate_proj"].weight) for p in paths]
    # 97 %, 94 % and exactly 95 % of the 640 neurons stay.
    second = replace_neurons(replace_neurons(first, paths[0], 20), paths[1], 40)
    second = replace_neurons(second, paths[2], 32)
    sliced.update(second)
    two, kept = sliced.model, sliced.selection
    assert np.array_equal(kept.indices[paths[0]], first.indices[paths[0]])
    assert np.array_equal(kept.indices[paths[1]], second.indices[paths[1]])
    assert np.array_equal(kept.indices[paths[2]], first.indices[paths[2]])
    after = [dict(two.named_modules())[f"{p}.gate_proj"].weight for p in paths]
    assert mx.array_equal(before[0], after[0])
    assert (before[1] != after[1]).any(axis=1).sum() == 40  # rows; all others keep their places


def test_the_first_compensation_also_updates_slices_that_would_be_kept(model):
    sliced, selection = SlicedModel(model, find_ffns(model), "requantize"), random_selection(model)
    sliced.update(selection)
    bias = dict.fromkeys(selection.indices)
    for turn in range(2):
        means = {
            path: MeanCompensation(mx.random.normal((m,))) for path, m in selection.widths.items()
        }
        sliced.update(selection, means)
        modules = dict(sliced.model.named_modules())
        for path, before in bias.items():
            after = modules[f"{path}.down_proj"].bias
            assert (turn == 0) == (before is None)
            assert before is None or mx.array_equal(before, after)  # a kept slice keeps its bias
            bias[path] = after


@pytest.mark.parametrize("architecture", ["llama", "glm4", "phi3small", "gpt2", "starcoder2"])
@pytest.mark.parametrize(
    ("bits", "policy"),
    [
        (None, "requantize"),
        *((4, policy) for policy in ("neuron-major", "requantize", "scatter")),
        (8, "neuron-major"),
    ],
)
def test_an_updated_slice_computes_the_same_as_a_new_slice(architecture, bits, policy):
    model = tiny_model(architecture)
    if bits:
        nn.quantize(model, 32, bits)
    for ffn in find_ffns(model):
        for layer in (*ffn.expand.values(), ffn.contract[1]):
            if "bias" in layer:
                layer.bias = mx.random.normal(layer.bias.shape)
    ffns, selection = find_ffns(model), random_selection(model)
    sliced = SlicedModel(model, ffns, policy)
    sliced.update(selection)
    x = mx.random.normal((2, 64))
    for turn in range(3):
        for path in selection.indices:
            selection = replace_neurons(selection, path, 12 + 9 * turn, turn)
        widths = selection.widths.items()
        means = {path: MeanCompensation(mx.random.normal((m,))) for path, m in widths}
        fresh = SlicedModel(model, ffns, policy)
        for target in (sliced, fresh):
            target.update(selection, means)
        for path, indices in sliced.selection.indices.items():
            assert np.array_equal(indices, selection.indices[path])
            output, expected = (dict(m.model.named_modules())[path](x) for m in (sliced, fresh))
            error = mx.linalg.norm(output - expected) / mx.linalg.norm(expected)
            # Requantized columns that are in another order are in other groups.
            assert error < (0.1 if bits and policy == "requantize" else 1e-4)


@pytest.mark.parametrize("policy", ["neuron-major", "requantize", "scatter"])
def test_a_renewal_moves_neurons_in_place_under_every_policy(model, policy):
    nn.quantize(model, 64, 4)
    selection, path = random_selection(model), "model.layers.0.mlp"
    sliced = SlicedModel(model, find_ffns(model), policy)
    sliced.update(selection, {path: MeanCompensation(mx.ones(1280))})
    gate, up, down = (sliced.model.layers[0].mlp[f"{n}_proj"] for n in ("gate", "up", "down"))
    assert "bias" in down
    weights, previous = [mx.array(layer.weight) for layer in (gate, up)], weakref.ref(down)
    arrays = [weakref.ref(array) for _, array in named_arrays(down) if policy == "requantize"]
    renewed = replace_neurons(selection, path, 64)
    sliced.update(renewed)
    for layer, weight in zip((gate, up), weights, strict=True):
        assert (layer.weight != weight).any(axis=1).sum() == 64
    assert previous() is sliced.model.layers[0].mlp.down_proj
    assert all(array() is None for array in arrays)
    # The compensation belonged to the previous neurons.
    fresh = SlicedModel(model, find_ffns(model), policy)
    fresh.update(renewed)
    x = mx.random.normal((2, 64))
    output, expected = (m.model.layers[0].mlp(x) for m in (sliced, fresh))
    assert mx.linalg.norm(output - expected) < 0.1 * mx.linalg.norm(expected)


def test_a_slice_of_another_size_is_rebuilt(model):
    sliced = SlicedModel(model, find_ffns(model), "requantize")
    sliced.update(random_selection(model, share=0.5))
    wider = random_selection(model, share=0.75)
    sliced.update(wider)
    assert sliced.selection.density == wider.density
    assert dict(sliced.model.named_modules())["model.layers.0.mlp.up_proj"].weight.shape == (
        960,
        64,
    )
    narrower = random_selection(model, share=0.25)
    sliced.update(narrower)
    assert sliced.selection.density == narrower.density
    assert dict(sliced.model.named_modules())["model.layers.0.mlp.up_proj"].weight.shape[0] == 320
