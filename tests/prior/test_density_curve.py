"""The density that a prior's curve gives for a bound on KL."""

from dataclasses import replace

from glass_mlx import stream_generate
from glass_mlx.config import GlassConfig
from glass_mlx.generation_report import summary
from glass_mlx.models import fingerprint
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.density_curve import conditions, expected_density
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.session import Session
from helpers import letter_tokenizer, made_prior

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

CURVE = {"densities": [0.3, 0.5, 0.7], "kl": [2.0, 1.0, 0.2], "tokens": 100}


@pytest.fixture
def model():
    return tiny_model("llama")


def with_curve(model, curve=CURVE):
    prior = made_prior(model)
    return replace(prior, about=prior.about | {"curve": curve})


@pytest.mark.parametrize(
    ("max_kl", "density"),
    [(5, 0.3), (2, 0.3), (1.5, 0.4), (1, 0.5), (0.6, 0.6), (0.2, 0.7), (0.1, 0.85), (0.02, 0.97)],
)
def test_the_expected_density_lies_on_the_curve(model, max_kl, density):
    assert expected_density(with_curve(model), max_kl) == pytest.approx(density, abs=1e-6)


def test_noise_in_the_curve_does_not_lower_the_density(model):
    curve = {"densities": [0.3, 0.5, 0.7], "kl": [0.9, 1.0, 0.2], "tokens": 100}
    assert expected_density(with_curve(model, curve), 0.95) > 0.5


def test_a_bound_needs_a_curve_and_a_positive_number(model):
    with pytest.raises(ValueError, match="needs a prior with a density curve"):
        expected_density(made_prior(model), 0.5)
    with pytest.raises(ValueError, match="must be positive"):
        expected_density(with_curve(model), 0)


@pytest.mark.parametrize("paths", ["model.layers.0.mlp", [1], ["model.layers.99.mlp"]])
def test_ffns_to_keep_dense_must_be_in_the_prior(model, paths, tmp_path):
    prior, file = made_prior(model), tmp_path / "prior.safetensors"
    replace(prior, about=prior.about | {"whole": paths}).save(file)
    with pytest.raises(ValueError, match="build it again"):
        GlobalPrior.load(file)


@pytest.mark.parametrize(
    "curve",
    [
        [],
        {},
        {"densities": [0.5], "kl": [], "tokens": 1},
        {"densities": [0.5, 0.5], "kl": [1, 1], "tokens": 1},
        {"densities": [0.5], "kl": ["a"], "tokens": 1},
        {"densities": [0.5], "kl": [1.0]},
    ],
)
def test_a_malformed_curve_is_refused(model, curve, tmp_path):
    file = tmp_path / "prior.safetensors"
    with_curve(model, curve).save(file)
    with pytest.raises(ValueError, match="its description is malformed"):
        GlobalPrior.load(file)


def test_generation_takes_the_density_from_the_bound(model):
    tokenizer = TokenizerWrapper(letter_tokenizer())
    options = {"max_tokens": 20, "prior": with_curve(model)}
    *_, last = stream_generate(model, tokenizer, [1, 2, 3], density="auto", max_kl=1.0, **options)
    assert last.glass.density == 0.5
    assert last.glass.density_got == 0.5
    for bounds in ({"density": "auto"}, {"max_kl": 1.0}, {"density": "auto", "max_kl": -1}):
        with pytest.raises(ValueError, match="KL"):
            stream_generate(model, tokenizer, [1, 2, 3], **options, **bounds)
    with pytest.raises(ValueError, match="density curve"):
        stream_generate(
            model, tokenizer, [1, 2, 3], density="auto", max_kl=1.0, prior=made_prior(model)
        )


def last_response(model, **options):
    tokenizer = TokenizerWrapper(letter_tokenizer())
    options = {"density": "auto", "max_kl": 1.0} | options
    *_, last = stream_generate(model, tokenizer, [1, 2, 3], 3, **options)
    return last


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prior_weight": 0.6}, "λ 0.45 (here 0.6)"),
        ({"warmup": 1}, "warm-up 16 (here 1)"),
        ({"refresh": 0}, "refresh 32 (here 0)"),
        ({"statistic": "activation"}, "statistic griffin (here activation)"),
        ({"prior_statistic": "activation"}, "prior statistic griffin (here activation)"),
        ({"uniform": True}, "uniform False (here True)"),
        ({"warmup": 1, "refresh": 0}, "warm-up 16 (here 1), refresh 32 (here 0)"),
    ],
)
def test_the_expectation_is_not_claimed_for_other_settings(model, changes, difference):
    last = last_response(model, prior=with_curve(model), **changes)
    assert last.glass.unmeasured == difference
    assert summary(last).splitlines()[-1] == (
        f"GLASS: the KL of this run is not known: the bound 1 was measured with {difference}"
    )


def test_the_expectation_is_not_claimed_for_other_weights(model):
    prior = with_curve(model)
    nn.quantize(model, 32, 4)
    last = last_response(model, prior=replace(prior, fingerprint=fingerprint(model)))
    assert last.glass.unmeasured == "float32 weights (here 4-bit)"
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    last = last_response(model, prior=replace(prior, fingerprint=fingerprint(model)))
    assert last.glass.unmeasured == "float32 weights (here bfloat16)"


def test_the_expectation_is_claimed_under_the_conditions_of_the_measurement(model):
    last = last_response(model, prior=with_curve(model))
    assert (last.glass.max_kl, last.glass.unmeasured) == (1.0, "")
    assert summary(last).splitlines()[-1] == "GLASS: KL is expected to stay within 1 nats per token"
    session = Session(model)
    measured = conditions(GlassConfig(warmup=3), session.weight_format)
    prior = with_curve(model, CURVE | {"conditions": measured})
    assert last_response(model, prior=prior, warmup=3).glass.unmeasured == ""
    assert last_response(model, prior=prior).glass.unmeasured == "warm-up 3 (here 16)"
    last = last_response(model, prior=prior, density=0.5, max_kl=None)
    assert last.glass.max_kl is None
    assert "KL" not in summary(last)
