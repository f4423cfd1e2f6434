from dataclasses import replace

from glass_mlx import stream_generate
from glass_mlx.curve import DENSITIES, expected_density, measure_curve
from glass_mlx.describe import describe
from glass_mlx.prior import GlobalPrior
from invariants import chat_tokenizer, letter_tokenizer, tiny_model
from test_prior import made_prior

import numpy as np
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


@pytest.mark.parametrize("wrapped", [chat_tokenizer, lambda: TokenizerWrapper(letter_tokenizer())])
def test_the_curve_is_measured_on_own_text_the_same_every_time(model, wrapped, tmp_path):
    prior, texts = made_prior(model), []
    curve = measure_curve(model, wrapped(), prior, 3, 60, seed=1, progress=texts.append)
    assert curve == measure_curve(model, wrapped(), prior, 3, 60, seed=1)
    assert curve["kl"] != measure_curve(model, wrapped(), prior, 3, 60, seed=2)["kl"]
    assert curve["densities"] == list(DENSITIES)
    assert len(texts) == 3
    assert np.all(np.array(curve["kl"])[:-1] > 0)  # 0.9 of 128 neurons are rounded to all
    assert curve["kl"][0] > curve["kl"][-2]
    replace(prior, about=prior.about | {"curve": curve}).save(tmp_path / "prior.safetensors")
    loaded = GlobalPrior.load(tmp_path / "prior.safetensors")
    assert loaded.about["curve"] == curve
    assert f"{curve['kl'][0]:.3f} at 0.3" in describe(loaded)


def test_a_template_that_fails_and_texts_that_are_short(model):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert measure_curve(model, tokenizer, made_prior(model), 2, 60)["recipe"] == "bos"
    with pytest.raises(ValueError, match="long enough"):
        measure_curve(model, tokenizer, made_prior(model), 2, 31)


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
    with pytest.raises(ValueError, match="does not say in order"):
        GlobalPrior.load(file)


def test_generation_takes_the_density_from_the_bound(model):
    tokenizer = TokenizerWrapper(letter_tokenizer())
    options = {"max_tokens": 20, "prior": with_curve(model)}
    *_, last = stream_generate(model, tokenizer, [1, 2, 3], density="auto", max_kl=1.0, **options)
    assert last.glass.density == 0.5
    assert last.glass.density_got == 0.5
    for wrong in ({"density": "auto"}, {"max_kl": 1.0}, {"density": "auto", "max_kl": -1}):
        with pytest.raises(ValueError, match="KL"):
            stream_generate(model, tokenizer, [1, 2, 3], **options, **wrong)
    with pytest.raises(ValueError, match="density curve"):
        stream_generate(
            model, tokenizer, [1, 2, 3], density="auto", max_kl=1.0, prior=made_prior(model)
        )
