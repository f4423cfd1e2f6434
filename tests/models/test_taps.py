"""Observing hidden vectors and outputs of FFNs."""

from glass_mlx.models import with_taps
from helpers import Network, OneFFN

import mlx.core as mx
import mlx.nn as nn
import pytest


@pytest.mark.parametrize(
    ("shape", "samples"), [((1, 3), 3), ((1, 4), 4), ((1, 9), 3), ((2, 8), 8), ((9,), 9)]
)
def test_taps_sample_long_inputs_of_the_last_ffn(shape, samples):
    mx.random.seed(0)
    model, seen = OneFFN(Network("gated", 32, nn.silu, (False, True))), []

    def observe(path, hidden):
        seen.append(hidden)
        return hidden

    x = mx.random.normal((*shape, 32))
    assert mx.array_equal(with_taps(model, observe, max_samples=4)(x), model(x))
    (hidden,) = seen
    assert hidden.size == samples * Network.WIDTH
    step = -(-shape[-1] // (samples // shape[0])) if len(shape) == 2 else 1
    with_taps(model, observe)(x[:, ::step] if len(shape) == 2 else x)
    assert mx.allclose(seen[1], hidden, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_are_observed_only_without_a_bias(has_bias):
    """The mean output must be that of W_down h: a bias would count twice."""
    model, outputs = OneFFN(Network("gated", 32, nn.silu, (False, has_bias))), []

    def keep(path, hidden):
        return hidden

    def observe_output(path, output):
        outputs.append(output)
        return output

    y = with_taps(model, keep, observe_output)(mx.random.normal((1, 3, 32)))
    assert len(outputs) == (not has_bias)
    assert has_bias or mx.array_equal(outputs[0], y)
