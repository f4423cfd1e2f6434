"""Impact, compared with directly computed gradients."""

import importlib

from glass_mlx.calibration.impact import measure_impact
from glass_mlx.models import find_ffns, with_taps
from glass_mlx.models.architectures import tiny_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
MASK = [0, 0, *[1] * 9, 0]


def plain_impact(model):
    """Compute impact from the gradients of zeros that are added to the hidden vectors."""
    hidden = {}

    def loss(addends):
        def observe(path, h):
            hidden[path] = mx.stop_gradient(h)
            return h + addends[path]

        logits = with_taps(model, observe)(mx.array(TOKENS)[None])[0, :-1]
        return nn.losses.cross_entropy(logits, mx.array(TOKENS[1:]), reduction="sum")

    shape = (1, len(TOKENS))
    zeros = {ffn.path: mx.zeros((*shape, ffn.width)) for ffn in find_ffns(model)}
    gradients = mx.grad(loss)(zeros)
    loss(zeros)  # once more outside mx.grad, so that `hidden` holds plain arrays
    mask = mx.array(MASK)[:, None]
    return {
        path: np.array((mx.abs(hidden[path] * gradients[path])[0] * mask).sum(0) / sum(MASK))
        for path in zeros
    }


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "glm4", "gpt2", "granite"]
)
def test_impact_is_the_gradient_times_the_activation(architecture, bits):
    model = tiny_model(architecture)
    if bits:
        nn.quantize(model, 32, bits)
    expected = plain_impact(model)
    measured = measure_impact(model, TOKENS, MASK)
    assert measured.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(np.array(measured[path]), values, rtol=1e-3, atol=1e-7)
        assert values.max() > 0


def test_removing_a_neuron_changes_the_loss_by_about_its_signed_impact():
    """Compare the first-order estimate with the loss when the neuron's activation is scaled."""
    model = tiny_model("llama")
    path = "model.layers.2.mlp"
    step = 0.2

    def loss(scale):
        def observe(ffn_path, h):
            return h * scale if ffn_path == path else h

        logits = with_taps(model, observe)(mx.array(TOKENS)[None])[0, :-1]
        return nn.losses.cross_entropy(logits, mx.array(TOKENS[1:]), reduction="sum")

    signed = mx.grad(loss)(mx.ones(128))
    for neuron in range(0, 128, 31):
        scale = np.ones(128, np.float32)
        scale[neuron] += step
        up = loss(mx.array(scale)).item()
        scale[neuron] -= 2 * step
        difference = (up - loss(mx.array(scale)).item()) / (2 * step)
        assert difference == pytest.approx(signed[neuron].item(), rel=0.1, abs=1e-4)
    measured = np.array(measure_impact(model, TOKENS, [1] * 12)[path]) * 11
    assert (measured >= np.abs(np.array(signed)) * 0.999 - 1e-7).all()


def test_layers_are_recomputed_instead_of_stored():
    """Eight layers need little more memory than two, because only their inputs are kept."""

    def peak(layers):
        model = tiny_model("llama", num_hidden_layers=layers, intermediate_size=4096)
        tokens = [1, 2, 3, 4] * 64
        measure_impact(model, tokens[:8], [1] * 8)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        measure_impact(model, tokens, [1] * 256)
        return mx.get_peak_memory() - before

    one_layer = 256 * 4096 * 4
    assert peak(8) - peak(2) < 2 * one_layer


def test_a_model_without_a_list_of_layers_is_measured():
    llama = importlib.import_module("mlx_lm.models.llama")
    inner = tiny_model("llama")

    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mlp = inner.model.embed_tokens, inner.model.layers[0].mlp

        def __call__(self, tokens):
            return self.embed.as_linear(self.mlp(self.embed(tokens)))

    assert isinstance(inner.model.layers[0].mlp, llama.MLP)
    assert np.array(measure_impact(OneLayer(), TOKENS, MASK)["mlp"]).max() > 0
