"""The density curve of a prior, and the FFNs that are kept dense."""

from dataclasses import replace

from glass_mlx import Session
from glass_mlx.calibration import curve
from glass_mlx.calibration.curve import DENSITIES, READINGS_PER_TEXT, measure_curve
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.display import describe
from glass_mlx.prior.file import GlobalPrior
from helpers import chat_tokenizer, letter_tokenizer, made_prior

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.mark.parametrize(
    "make_tokenizer", [chat_tokenizer, lambda: TokenizerWrapper(letter_tokenizer())]
)
def test_the_curve_depends_only_on_the_seed(model, make_tokenizer, tmp_path):
    prior, steps = made_prior(model), []
    result = measure_curve(model, make_tokenizer(), prior, 3, 60, seed=1, progress=steps.append)
    assert result == measure_curve(model, make_tokenizer(), prior, 3, 60, seed=1)
    curve = result["curve"]
    other = measure_curve(model, make_tokenizer(), prior, 3, 60, seed=2)
    assert curve["kl"] != other["curve"]["kl"]
    assert curve["densities"] == list(DENSITIES)
    assert sum(steps) == 3 * READINGS_PER_TEXT
    assert np.all(np.array(curve["kl"])[:-1] > 0)  # 0.9 of 128 neurons rounds to all
    assert curve["kl"][0] > curve["kl"][-2]
    replace(prior, about=prior.about | result).save(tmp_path / "prior.safetensors")
    loaded = GlobalPrior.load(tmp_path / "prior.safetensors")
    assert loaded.about["curve"] == curve
    assert f"{curve['kl'][0]:.3f} at 0.3" in describe(loaded)


def test_failing_templates_fall_back_to_bos_and_short_texts_are_refused(model):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert measure_curve(model, tokenizer, made_prior(model), 2, 60)["curve"]["recipe"] == "bos"
    with pytest.raises(ValueError, match="long enough"):
        measure_curve(model, tokenizer, made_prior(model), 2, 31)


def test_ffns_are_kept_dense_if_that_lowers_kl(model, monkeypatch):
    paths = [ffn.path for ffn in find_ffns(model)]
    kls = {(): 1.0, (paths[0],): 0.8, (paths[0], paths[1]): 0.9, (paths[0], paths[-1]): 0.7}

    def kl(session, prior, texts, configs, progress):
        return np.array([kls[prior.kept_dense] for _ in configs])

    monkeypatch.setattr(curve, "_kl", kl)

    def choose():
        return curve._choose_kept_dense(Session.of(model), made_prior(model), [], print)

    assert choose() == [paths[0], paths[-1]]
    kls[paths[0],] = 1.1
    kls[paths[1],] = kls[paths[-1],] = 1.2
    assert choose() == []
