"""KL by the share that is kept, and the conditions under which it was measured."""

import math
from dataclasses import replace

from glass_mlx.config import GlassConfig
from glass_mlx.models import fingerprint
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.curves import Curve
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.session import Session
from helpers import curve_record, made_prior

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

CURVE = Curve((0.5, 0.75, 0.9), (0.8, 0.2, 0.05), (0.0, 0.0, 0.0))


@pytest.fixture
def model():
    return tiny_model("llama")


def test_a_curve_goes_through_its_points_and_falls_to_zero():
    for share, kl in zip(CURVE.shares, CURVE.kl, strict=True):
        assert CURVE.kl_at(share) == pytest.approx(kl)
    assert CURVE.kl_at(1) == 0
    assert CURVE.kl_at(0.95) == CURVE.kl_at(0.9)
    assert CURVE.kl_at(0.4) == math.inf


def test_between_two_points_a_curve_is_a_power_of_the_dropped_share():
    # Both points lie on KL = 3.2 (1 - share)^2.
    assert CURVE.kl_at(0.6) == pytest.approx(3.2 * 0.4**2)


def test_a_bound_is_spent_on_the_mean_and_a_standard_error_more():
    curve = Curve((0.5, 0.75, 0.9), (0.8, 0.16, 0.05), (0.1, 0.04, 0.0))
    assert curve.kl_at(0.75) == pytest.approx(0.2)
    assert curve.share_for(0.2) == pytest.approx(0.75, abs=2e-4)


def test_without_a_standard_error_the_mean_is_used(model):
    record = curve_record(model)
    assert "standard_error" not in record["density"]
    curve = Curve.parse(record)
    assert curve.kl_at(curve.shares[0]) == pytest.approx(curve.kl[0])


def test_noise_by_which_a_larger_share_costs_more_is_left_out():
    curve = Curve((0.5, 0.75, 0.9), (0.1, 0.2, 0.05), (0.0, 0.0, 0.0))
    assert curve.kl_at(0.5) == curve.kl_at(0.75) == pytest.approx(0.2)


@given(st.floats(1e-6, 2))
def test_the_smallest_share_within_a_bound(max_kl):
    share = CURVE.share_for(max_kl)
    assert CURVE.kl_at(share) <= max_kl
    if share > CURVE.shares[0]:
        assert CURVE.kl_at(share - 2e-4) > max_kl


def test_a_curve_of_zeros_allows_its_smallest_share():
    assert Curve((0.5, 0.9), (0.0, 0.0), (0.0, 0.0)).share_for(0.1) == 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"density": None},
        {"density": []},
        {"density": {"shares": [0.5], "kl": []}},
        {"density": {"shares": [0.5, 0.5], "kl": [1, 1]}},
        {"density": {"shares": [0.5, 1.0], "kl": [1, 1]}},
        {"density": {"shares": [0.5], "kl": ["a"]}},
        {"density": {"shares": [0.5], "kl": [-1.0]}},
        {"density": {"shares": [0.5], "kl": [1.0], "standard_error": []}},
        {"density": {"shares": [0.5], "kl": [1.0], "standard_error": [None]}},
        {"conditions": None},
    ],
)
def test_malformed_curves_are_refused(model, change, tmp_path):
    prior, file = made_prior(model), tmp_path / "prior.safetensors"
    record = curve_record(model) | change
    with pytest.raises(ValueError, match="curve"):
        Curve.parse(record)
    replace(prior, about=prior.about | {"curves": [record]}).save(file)
    with pytest.raises(ValueError, match="its description is malformed"):
        GlobalPrior.load(file)


@pytest.mark.parametrize("paths", ["model.layers.0.mlp", [1], ["model.layers.99.mlp"]])
def test_ffns_to_keep_dense_must_be_in_the_prior(model, paths, tmp_path):
    prior, file = made_prior(model), tmp_path / "prior.safetensors"
    replace(prior, about=prior.about | {"whole": paths}).save(file)
    with pytest.raises(ValueError, match="build it again"):
        GlobalPrior.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"prior_weight": 0.6},
        {"warmup": 1},
        {"refresh": 0},
        {"statistic": "activation"},
        {"prior_statistic": "activation"},
        {"uniform": True},
    ],
)
def test_curves_hold_for_the_settings_that_they_were_measured_with(model, change):
    session = Session(model)
    prior = made_prior(model)
    prior = replace(prior, about=prior.about | {"curves": [curve_record(model)]})
    assert prior.curve(session.conditions(GlassConfig(max_kl=0.3))) is not None
    assert prior.curve(session.conditions(GlassConfig(**change))) is None


def test_curves_hold_for_the_weights_that_they_were_measured_with(model):
    prior = made_prior(model)
    prior = replace(prior, about=prior.about | {"curves": [curve_record(model)]})
    quantized, half = tiny_model("llama"), tiny_model("llama")
    nn.quantize(quantized, 32, 4)
    half.set_dtype(mx.bfloat16)
    for other in (quantized, half):
        conditions = Session(other).conditions(GlassConfig())
        assert prior.curve(conditions) is None
    first, second = (
        Session(quantized).conditions(GlassConfig(down_policy=policy))
        for policy in ("requantize", "scatter")
    )
    assert first != second
    assert fingerprint(quantized)
