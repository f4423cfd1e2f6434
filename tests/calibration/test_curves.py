"""Measuring what slicing costs, and choosing the FFNs that are kept dense."""

import json
from dataclasses import replace

from glass_mlx import Session
from glass_mlx.calibration.curves import (
    DENSITIES,
    CurveMeasurement,
    CurveSettings,
)
from glass_mlx.config import GlassConfig
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.display import describe
from glass_mlx.prior.file import GlobalPrior
from helpers import chat_tokenizer, letter_tokenizer, made_prior

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

SETTINGS = CurveSettings(texts=5, length=60, seed=1)


@pytest.fixture
def model():
    return tiny_model("llama")


def measure(model, tokenizer=None, settings=SETTINGS, **options):
    measurement = CurveMeasurement(
        Session(model), tokenizer or chat_tokenizer(), settings, **options
    )
    return measurement.measure(made_prior(model), GlassConfig())


@pytest.mark.parametrize(
    "make_tokenizer", [chat_tokenizer, lambda: TokenizerWrapper(letter_tokenizer())]
)
def test_curves_depend_only_on_the_seed(model, make_tokenizer, tmp_path):
    steps = []
    record = measure(model, make_tokenizer(), progress=steps.append)
    assert record == measure(model, make_tokenizer())
    other = measure(model, make_tokenizer(), replace(SETTINGS, seed=2))
    assert record["density"]["kl"] != other["density"]["kl"]
    assert record["density"]["shares"] == list(DENSITIES)
    assert sum(steps) == record["texts"] >= 2
    assert CurveSettings(texts=3).trial_readings == 4 * 3
    assert record["density"]["kl"][0] > record["density"]["kl"][-1]
    prior = made_prior(model)
    replace(prior, about=prior.about | {"curves": [record]}).save(tmp_path / "prior.safetensors")
    loaded = GlobalPrior.load(tmp_path / "prior.safetensors")
    curve = loaded.curve(Session(model).conditions(GlassConfig()))
    assert list(curve.kl) == record["density"]["kl"]
    assert list(curve.standard_error) == record["density"]["standard_error"]
    kl, error = curve.kl[0], curve.standard_error[0]
    assert f"KL by density    {kl:.3f} ± {error:.3f} at 0.5" in describe(loaded)


class Interrupted(Exception):
    """Stands for an interrupt in the middle of a measurement."""


def test_an_interrupted_measurement_continues(model, tmp_path):
    partial, steps = tmp_path / "curves.partial", []

    def interrupt(count):
        steps.append(count)
        if len(steps) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure(model, partial=partial, progress=interrupt)
    texts = json.loads(partial.read_text())["texts"]
    steps.clear()
    resumed = measure(model, partial=partial, progress=lambda count: steps.append(count))
    assert resumed == measure(model)
    assert len(steps) == len(texts) - 2


@pytest.mark.parametrize("contents", ["", "{}", "[]", '{"identity": 1}', '{"texts": [1]}'])
def test_a_damaged_or_foreign_partial_file_is_not_used(model, contents, tmp_path):
    partial = tmp_path / "curves.partial"
    partial.write_text(contents)
    assert measure(model, partial=partial) == measure(model)
    assert measure(model, partial=partial, identity="other") == measure(model)


def test_prompts_do_without_a_failing_template_and_short_texts_are_refused(model):
    tokenizer, plain = chat_tokenizer(), chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    plain.chat_template = None
    assert measure(model, tokenizer) == measure(model, plain)
    with pytest.raises(ValueError, match="long enough"):
        measure(model, tokenizer, replace(SETTINGS, length=31))


def test_ffns_are_kept_dense_if_that_lowers_kl(model, monkeypatch):
    paths = [ffn.path for ffn in find_ffns(model)]
    kls = {(): 1.0, (paths[0],): 0.8, (paths[0], paths[1]): 0.9, (paths[0], paths[-1]): 0.7}

    def kl(self, kind, number, prior, configs):
        return [kls[prior.kept_dense]]

    monkeypatch.setattr(CurveMeasurement, "_measure", kl)
    measurement = CurveMeasurement(Session(model), chat_tokenizer(), SETTINGS)

    def choose():
        return measurement.choose_kept_dense(made_prior(model))

    assert choose() == [paths[0], paths[-1]]
    kls[paths[0],] = 0.99  # within the noise
    kls[paths[1],] = kls[paths[-1],] = 1.2
    assert choose() == []


@pytest.mark.parametrize(("noise", "least", "most"), [(0.01, 4, 4), (1.0, 5, 8)])
def test_the_density_is_measured_until_its_curve_is_clear(model, monkeypatch, noise, least, most):
    rng, kinds = np.random.default_rng(0), []

    def kl(self, kind, number, prior, configs):
        kinds.append(kind)
        return (1 + noise * rng.normal(size=len(configs))).tolist()

    monkeypatch.setattr(CurveMeasurement, "_measure", kl)
    record = measure(model, settings=replace(SETTINGS, texts=8))
    assert least <= len(kinds) == record["texts"] <= most
