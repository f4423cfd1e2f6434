import sys
from types import SimpleNamespace

import glass_mlx.calibration as calibration
from glass_mlx.calibration import calibrate
from glass_mlx.engine import resolve_prior
from glass_mlx.prior import FILE_NAME
from invariants import tiny_model
from test_checkpoints import save_tiny_folder

import numpy as np
import pytest

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2)
OPTIONS = {"tokens": 48, "length": 8, "batch_size": 2, "name": "tiny"}


def assert_identical(a, b):
    for name, scores in a.scores.items():
        for path, values in scores.items():
            assert np.array_equal(values, b.scores[name][path])


def test_a_prior_has_finite_positive_scores_and_its_recipe():
    model = tiny_model("llama")
    prior = calibrate(model, TOKENIZER, **OPTIONS)
    assert prior.scores.keys() == {"activation", "griffin"}
    for scores in prior.scores.values():
        assert len(scores) == 3
        assert all(np.isfinite(v).all() and (v > 0).any() for v in scores.values())
    assert prior.about["tokens"] == 48
    assert prior.about["dtype"] == "mlx.core.float32"
    assert resolve_prior(model, prior) is prior


def test_the_seed_decides():
    model = tiny_model("llama")
    prior = calibrate(model, TOKENIZER, **OPTIONS)
    assert_identical(prior, calibrate(model, TOKENIZER, **OPTIONS))
    other = calibrate(model, TOKENIZER, **OPTIONS, seed=1)
    path = "model.layers.0.mlp"
    assert not np.array_equal(prior.scores["activation"][path], other.scores["activation"][path])


def test_an_interrupted_calibration_goes_on_to_the_same_prior(tmp_path, monkeypatch):
    model, file = tiny_model("llama"), tmp_path / "partial"
    whole = calibrate(model, TOKENIZER, **OPTIONS)
    measure, calls = calibration._measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(*args)

    monkeypatch.setattr(calibration, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, TOKENIZER, **OPTIONS, checkpoint=file)
    monkeypatch.setattr(calibration, "_measure", lambda *args: calls.append(0) or measure(*args))
    assert_identical(whole, calibrate(model, TOKENIZER, **OPTIONS, checkpoint=file))
    assert calls[3:] == [0]  # two of the three batches were not measured again


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, file = tiny_model("llama"), tmp_path / "partial"
    calibrate(model, TOKENIZER, **OPTIONS, checkpoint=file)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, TOKENIZER, **OPTIONS, seed=1, checkpoint=file)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        calibrate(model, TOKENIZER, **OPTIONS, checkpoint=file)


def test_the_command_writes_a_prior_that_the_model_finds(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny")
    output = folder / FILE_NAME
    monkeypatch.setattr(calibration, "_null_token", lambda _: 1)
    arguments = ["--model", folder, "--output", output, "--tokens", "16", "--length", "8"]
    monkeypatch.setattr(sys, "argv", ["build_priors.py", *map(str, arguments)])
    calibration.main()
    assert capsys.readouterr().out == f"Wrote {output}: 256 tokens\n"
    assert resolve_prior(tiny_model("llama"), folder=folder).about["model"] == str(folder)
    assert not list(folder.glob("*.partial"))

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tokens", "0"])
    with pytest.raises(SystemExit) as stop:
        calibration.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("build_priors: error: tokens, length")


def test_a_model_without_bos_begins_with_eos():
    assert calibration._null_token(SimpleNamespace(bos_token_id=None, eos_token_id=7)) == 7
    with pytest.raises(ValueError, match="neither"):
        calibration._null_token(SimpleNamespace(bos_token_id=None, eos_token_id=None))


@pytest.mark.parametrize("name", ["tokens", "length", "batch_size", "temperature"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match="positive"):
        calibrate(tiny_model("llama"), TOKENIZER, **{name: 0})
