"""Fingerprints: equal for a model in every precision, different for every other model."""

from glass_mlx.models import find_ffns, fingerprint
from glass_mlx.models.architectures import tiny_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", hidden_size=128, intermediate_size=512)


def permute(model, order, path="model.layers"):
    """Permute the neurons of the FFNs below a path, which does not change what they compute."""
    for ffn in find_ffns(model):
        if ffn.path.startswith(path):
            for layer in ffn.expand.values():
                layer.weight = layer.weight[mx.array(order)]
            down = ffn.contract[1]
            down.weight = down.weight[:, mx.array(order)]
    return model


@pytest.mark.parametrize(
    ("bits", "mode"),
    [(2, "affine"), (3, "affine"), (4, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8")],
)
def test_quantization_is_recognized_as_rounding(model, bits, mode):
    original = fingerprint(model)
    nn.quantize(model, bits=bits, mode=mode)
    assert fingerprint(model).similarity(original) > 0.9
    assert fingerprint(model).is_same_model(original)
    assert original.is_same_model(fingerprint(model))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_recognized_as_rounding(model, dtype):
    original = fingerprint(model)
    model.set_dtype(dtype)
    assert fingerprint(model).is_same_model(original)


@pytest.mark.parametrize(("noise", "is_related"), [(0.01, True), (0.2, True), (0.7, False)])
def test_other_weights_are_related_or_foreign(model, noise, is_related):
    mx.random.seed(0)
    original = fingerprint(model)
    for ffn in find_ffns(model):
        for layer in ffn.expand.values():
            layer.weight += noise * mx.std(layer.weight) * mx.random.normal(layer.weight.shape)
    assert not fingerprint(model).is_same_model(original)
    assert (fingerprint(model).similarity(original) > 0) == is_related


def test_models_trained_separately_are_foreign(model):
    other = tiny_model("llama", seed=1, hidden_size=128, intermediate_size=512)
    assert fingerprint(other).similarity(fingerprint(model)) == 0
    wider = tiny_model("llama", hidden_size=128, intermediate_size=576)
    assert fingerprint(wider).similarity(fingerprint(model)) == 0


@pytest.mark.parametrize("path", ["model.layers", "model.layers.2"])
def test_permuted_neurons_are_foreign(model, path):
    original, orders = fingerprint(model), np.random.default_rng(0)
    reversed_order = np.arange(512)[::-1].copy()
    rotated = np.roll(np.arange(512), 1)
    beyond_the_first = np.concatenate([np.arange(64), 64 + orders.permutation(448)])
    for order in (reversed_order, rotated, beyond_the_first):
        permuted = permute(tiny_model("llama", hidden_size=128, intermediate_size=512), order, path)
        assert fingerprint(permuted).similarity(original) == 0
    assert fingerprint(model).similarity(original) == pytest.approx(1)
