import gc

from glass_mlx.models import (
    DOWN_POLICIES,
    Rest,
    find_ffns,
    fingerprint,
    linear,
    weight_bytes,
    with_modules,
)
from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.linear import dense_weight, fill, take_inputs, take_outputs
from invariants import check_invariants, snapshot

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21], [5, 4, 3, 2, 1, 0, 255]])
MODES = [
    *(("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)),
    ("mxfp4", 32, 4),
    ("nvfp4", 16, 4),
    ("mxfp8", 32, 8),
]


@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
def test_invariants_of_a_quantized_model(mode, group, bits):
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    nn.quantize(model, group, bits, mode=mode)
    check_invariants(model, lambda m: m(TOKENS))


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_invariants_of_a_model_of_mixed_precision(recipe):
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    model, _ = quantize_model(model, {}, 32, 4, quant_predicate=predicate)
    bits = {ffn.contract[1].bits for ffn in find_ffns(model)}
    assert bits == {int(n) for n in recipe.removeprefix("mixed_").split("_")}
    check_invariants(model, lambda m: m(TOKENS))


def quantized(mode, group, bits, bias=False):
    mx.random.seed(0)
    layer = nn.Linear(256, 384, bias=bias)
    return layer.to_quantized(group, bits, mode)


@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
def test_outputs_are_taken_exactly(mode, group, bits):
    layer = quantized(mode, group, bits, bias=True)
    layer.bias = mx.arange(384.0)
    rows = np.array([0, 3, 4, 50, 95])
    x = mx.random.normal((3, 256))
    taken = take_outputs(layer, rows)
    assert mx.array_equal(dense_weight(taken), dense_weight(layer)[mx.array(rows)])
    assert mx.allclose(taken(x), layer(x)[:, mx.array(rows)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
def test_inputs_are_taken_within_the_error_of_the_format(mode, group, bits):
    layer = quantized(mode, group, bits, bias=True)
    layer.bias = mx.arange(384.0)
    kept = np.sort(np.random.default_rng(0).choice(256, 128, replace=False))
    x = mx.random.normal((3, 128))
    exact = x @ dense_weight(layer)[:, mx.array(kept)].T + layer.bias
    assert mx.allclose(take_inputs(layer, kept, "scatter")(x), exact, rtol=1e-4, atol=1e-4)
    rest = mx.random.normal((256,))
    full = mx.repeat(rest[None], 3, axis=0)
    full[:, mx.array(kept)] = x
    filled = take_inputs(layer, kept, "scatter")
    fill(layer, filled, kept, Rest(rest))
    assert mx.allclose(filled(x), layer(full), rtol=1e-4, atol=1e-4)
    known = take_inputs(layer, kept, "scatter")
    fill(layer, known, kept, Rest(rest, layer(rest[None])[0] - layer.bias))
    assert mx.allclose(known.bias, filled.bias, atol=1e-3)
    layer.bias = layer.bias.astype(mx.bfloat16)
    for policy in DOWN_POLICIES:
        half = take_inputs(layer, kept, policy)
        fill(layer, half, kept, Rest(rest.astype(mx.bfloat16)))
        assert half(x.astype(mx.bfloat16)).dtype == mx.bfloat16 or mode == "affine"
    for policy in ("requantize", "neuron-major"):
        again = take_inputs(layer, kept, policy)
        assert (again.bits, again.group_size, again.mode) == (bits, group, mode)
        columns = dense_weight(layer)[:, mx.array(kept)]
        weight = dense_weight(again) if policy == "requantize" else dense_weight(again).T
        error = mx.linalg.norm(weight - columns) / mx.linalg.norm(columns)
        assert error < {2: 0.6, 3: 0.3}.get(bits, 0.15)


def test_the_other_way_round_a_layer_is_held_once_and_not_longer_than_it():
    held = len(linear._turned)
    layer = quantized("affine", 32, 4)
    one, two = (take_inputs(layer, np.arange(n), "neuron-major") for n in (7, 90))
    assert len(linear._turned) == held + 1
    whole = linear._turned[id(layer)][1]
    assert mx.array_equal(one.weight, whole.weight[:7])
    assert mx.array_equal(two.scales, whole.scales[:90])
    layer.weight = layer.weight + 0  # as when weights are loaded anew
    take_inputs(layer, np.arange(7), "neuron-major")
    assert linear._turned[id(layer)][1] is not whole
    del layer, whole
    gc.collect()
    assert len(linear._turned) == held


def test_outputs_that_fill_no_group_cannot_be_held_the_other_way_round():
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


def test_a_part_of_a_group_cannot_be_requantized():
    with pytest.raises(ValueError, match="groups of 64"):
        take_inputs(quantized("affine", 64, 4), np.arange(40))


def test_replacing_modules_copies_only_the_way_to_them():
    model = tiny_model("llama")
    before = snapshot(model)
    down = nn.Linear(128, 64, bias=False)
    other = with_modules(model, {"model.layers.1.mlp": {"down_proj": down}})
    assert other.model.layers[1].mlp.down_proj is down
    assert other.model.layers[1].mlp.up_proj is model.model.layers[1].mlp.up_proj
    assert other.model.layers[0] is model.model.layers[0]
    assert other.model.embed_tokens is model.model.embed_tokens
    assert snapshot(model) == before


def test_ffns_come_in_the_order_of_layers():
    mx.random.seed(0)
    paths = [ffn.path for ffn in find_ffns(tiny_model("llama"))]
    assert paths == [f"model.layers.{i}.mlp" for i in range(4)]


def test_models_that_cannot_be_sliced_are_refused_with_the_reason():
    model = tiny_model("llama")
    model.model_type = "gemma3n"
    with pytest.raises(ValueError, match="mean over all neurons"):
        find_ffns(model)
    with pytest.raises(ValueError, match="no feed-forward network"):
        find_ffns(nn.Linear(2, 2))


def test_fingerprints_survive_quantization_and_differ_between_models():
    def cosine(a, b):
        a, b = (np.concatenate([x.ravel() for x in f.values()]) for f in (a, b))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    original = fingerprint(model)
    nn.quantize(model, group_size=32, bits=4)
    assert cosine(original, fingerprint(model)) > 0.99
    assert abs(cosine(original, fingerprint(other))) < 0.2


def test_weight_bytes_leave_out_an_embedding_that_is_only_looked_up():
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("llama")
    every = [sum(a.nbytes for _, a in tree_flatten(m.parameters())) for m in (tied, untied)]
    assert weight_bytes(tied) == every[0]
    assert weight_bytes(untied) == every[1] - 256 * 64 * 4
