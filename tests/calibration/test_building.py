"""Measuring a prior: its values, interrupted runs, and memory."""

import gc
from dataclasses import replace
from itertools import islice
from pathlib import Path

from glass_mlx import load, resolve_prior
from glass_mlx.calibration import building
from glass_mlx.calibration.building import CalibrationSettings, build, calibrate
from glass_mlx.calibration.stability import overall_stability
from glass_mlx.calibration.texts import Recipe, Sequence
from glass_mlx.files import locked
from glass_mlx.models.architectures import tiny_model
from glass_mlx.statistics import STATISTICS
from helpers import chat_tokenizer, save_tiny_folder, snapshot, statistics_of

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.llama import MLP, ModelArgs

TOKENIZER = chat_tokenizer()
BOS = (Recipe("bos"),)
SETTINGS = CalibrationSettings(recipes=BOS, tokens=96, length=24, batch_size=2, curve_texts=0)


def assert_identical(a, b):
    for name, scores in a.scores.items():
        for path, values in scores.items():
            assert np.array_equal(values, b.scores[name][path])
            assert np.array_equal(a.spread[name][path], b.spread[name][path])
    assert a.about == b.about


@pytest.fixture
def sequences(monkeypatch):
    """Replace the texts of every recipe with the same sequences and return them."""
    generator = np.random.default_rng(0)

    def random_sequence(length):
        mask = [0, 0, *[1] * (length - 3), 0]
        return Sequence(generator.integers(0, 256, length).tolist(), mask)

    texts = [random_sequence(length) for length in (9, 12, 5, 20, 7, 12)]

    def make_source(recipe, writer, tokenizer, length, frame, field, done):
        remaining = iter(texts[done:])
        return lambda size, batch: list(islice(remaining, size))

    monkeypatch.setattr(building, "make_source", make_source)
    return texts


def test_a_prior_has_finite_positive_scores_and_its_recipe():
    model = tiny_model("llama")
    prior = calibrate(model, TOKENIZER, SETTINGS, name="tiny")
    assert prior.scores.keys() == prior.spread.keys() == {"activation", "griffin"}
    for values in (prior.scores, prior.spread):
        for scores in values.values():
            assert len(scores) == 4
            assert all(np.isfinite(v).all() and (v > 0).any() for v in scores.values())
            assert {v.dtype for v in scores.values()} == {np.dtype("float32")}
    about = prior.about
    assert about["tokens"] >= 96
    assert about["recipes"] == [
        {"recipe": "bos", "weight": 1.0, "tokens": about["tokens"], "sequences": 11}
    ]
    assert (about["dtype"], about["model"]) == ("float32", "tiny")
    assert about["settings"]["seed"] == 0
    assert resolve_prior(model, prior) is prior


def test_mean_and_spread_are_taken_over_sequences(sequences):
    model = tiny_model("llama")
    names = (*STATISTICS, "impact")
    prior = calibrate(model, TOKENIZER, replace(SETTINGS, statistics=names, sequences=6))
    single = [statistics_of(model, [mx.array(s.tokens[:-1])[None]], True) for s in sequences]
    first_two = [statistics_of(model, [mx.array(s.tokens[:2])[None]], True) for s in sequences]
    for path, values in prior.scores["activation"].items():
        each = [
            (whole["activation"][path] * (len(s.tokens) - 1) - start["activation"][path] * 2)
            / sum(s.mask)
            for s, whole, start in zip(sequences, single, first_two, strict=True)
        ]
        np.testing.assert_allclose(values, np.mean(each, axis=0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            prior.spread["activation"][path], np.std(each, axis=0), rtol=1e-2, atol=1e-5
        )
    assert prior.about["tokens"] == sum(sum(s.mask) for s in sequences)
    assert prior.about["sequences"] == 6


def test_a_mixture_is_the_weighted_mean_of_its_recipes(tmp_path):
    model = tiny_model("llama")
    file = tmp_path / "corpus.txt"
    file.write_text("丁七丄丆丈" * 2000)
    recipes = (Recipe("corpus", 3.0, file), Recipe("bos", 1.0))
    settings = replace(SETTINGS, tokens=400, batch_size=1)
    mixture = calibrate(model, TOKENIZER, replace(settings, recipes=recipes))
    corpus, bos = mixture.about["recipes"]
    assert corpus["tokens"] / bos["tokens"] == pytest.approx(3, rel=0.1)
    corpus_only = replace(settings, recipes=recipes[:1], sequences=corpus["sequences"])
    corpus_only = calibrate(model, TOKENIZER, corpus_only)
    # A recipe's text depends on its position, so two recipes of one kind differ.
    swapped = replace(settings, recipes=(Recipe("corpus", 1e-9, file), Recipe("bos", 1.0)))
    swapped = replace(swapped, sequences=1 + bos["sequences"])
    bos_only = calibrate(model, TOKENIZER, swapped)
    assert [r["sequences"] for r in bos_only.about["recipes"]] == [1, bos["sequences"]]
    for path, values in mixture.scores["activation"].items():
        mean = (
            0.75 * corpus_only.scores["activation"][path]
            + 0.25 * bos_only.scores["activation"][path]
        )
        np.testing.assert_allclose(values, mean, rtol=1e-4)


def test_a_mixture_of_equal_recipes_equals_each(sequences):
    model = tiny_model("llama")
    one = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=6))
    two = (Recipe("bos", 2.0), Recipe("chat", 0.5))
    both = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=12, recipes=two))
    for path, values in one.scores["griffin"].items():
        np.testing.assert_allclose(both.scores["griffin"][path], values, rtol=1e-6)
        np.testing.assert_allclose(both.spread["griffin"][path], one.spread["griffin"][path], 1e-4)


def test_halves_of_the_same_text_agree(sequences):
    model = tiny_model("llama")
    sequences[:] = [sequences[0]] * 4
    stability = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=4)).about["stability"]
    for measures in stability.values():
        assert measures.keys() == {"spearman", "jaccard 0.25", "jaccard 0.5", "jaccard 0.75"}
        assert all(np.allclose([*measure.values()], 1) for measure in measures.values())
    assert overall_stability(stability) == pytest.approx(1)


@pytest.mark.slow
def test_until_stable_stops_before_the_token_limit():
    model = tiny_model("llama")
    settings = replace(SETTINGS, tokens=1500)
    full_run = calibrate(model, TOKENIZER, settings).about
    goal = overall_stability(full_run["stability"]) - 0.1
    short_run = calibrate(model, TOKENIZER, replace(settings, until_stable=goal)).about
    assert short_run["tokens"] < full_run["tokens"]
    assert overall_stability(short_run["stability"]) >= goal


def test_the_prior_depends_on_the_seed():
    model = tiny_model("llama")
    prior = calibrate(model, TOKENIZER, SETTINGS)
    assert_identical(prior, calibrate(model, TOKENIZER, SETTINGS))
    other = calibrate(model, TOKENIZER, replace(SETTINGS, seed=1))
    path = "model.layers.0.mlp"
    assert not np.array_equal(prior.scores["activation"][path], other.scores["activation"][path])


@pytest.mark.parametrize("recipes", [BOS, (Recipe("chat"), Recipe("bos", 0.5))])
def test_an_interrupted_calibration_resumes_to_the_same_file(tmp_path, monkeypatch, recipes):
    model, settings = tiny_model("llama"), replace(SETTINGS, recipes=recipes)
    build(model, TOKENIZER, tmp_path / "whole", settings)
    measure, calls = building.measure_sequences, []

    def measure_or_interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(*args)

    monkeypatch.setattr(building, "measure_sequences", measure_or_interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(model, TOKENIZER, tmp_path / "parts", settings)
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "parts.partial"}
    build(model, TOKENIZER, tmp_path / "parts", settings)
    resumed_calls = len(calls) - 1  # the third batch was measured twice
    calls[:] = [None] * 3
    build(model, TOKENIZER, tmp_path / "again", settings)
    assert len(calls) - 3 == resumed_calls
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "parts", "again"}


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    with locked(tmp_path / "prior"), pytest.raises(ValueError, match="another run is writing"):
        build(tiny_model("llama"), TOKENIZER, tmp_path / "prior", SETTINGS)
    build(tiny_model("llama"), TOKENIZER, tmp_path / "prior", SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path):
    model, file = tiny_model("llama"), tmp_path / "partial"
    calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, TOKENIZER, replace(SETTINGS, seed=1), checkpoint=file)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="delete it to begin again"):
        calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_tokens():
    model = tiny_model("llama")

    def peak(sequences):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        statistics = ("activation", "impact")
        calibrate(model, TOKENIZER, replace(SETTINGS, sequences=sequences, statistics=statistics))
        return mx.get_peak_memory()

    gc.disable()  # memory must not depend on the garbage collector
    try:
        peak(4)
        few, many = peak(4), peak(40)
    finally:
        gc.enable()
    assert many <= 1.1 * few  # what runs at the same time differs by a few percent


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_measuring_does_not_change_the_model(architecture):
    model = tiny_model(architecture)
    before = snapshot(model)
    statistics = (*STATISTICS, "impact")
    prior = calibrate(model, TOKENIZER, replace(SETTINGS, statistics=statistics))
    assert prior.scores.keys() == {*statistics}
    assert snapshot(model) == before
    assert not any(module.training for module in model.modules())


def test_quantized_and_lazy_models_and_layers_of_different_widths(tmp_path):
    statistics = (*STATISTICS, "impact")
    model, tokenizer = load(str(save_tiny_folder(tmp_path / "tiny")), lazy=True)
    settings = replace(SETTINGS, recipes=BOS, statistics=statistics)
    lazy = calibrate(model, tokenizer, settings)
    assert_identical(lazy, calibrate(tiny_model("llama"), tokenizer, settings))

    arguments = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4}
    arguments |= {"hidden_size": 64, "intermediate_size": 64, "rms_norm_eps": 1e-5}
    mixed = tiny_model("llama")
    mixed.model.layers[1].mlp = MLP(ModelArgs(vocab_size=256, **arguments))
    nn.quantize(mixed, 32, 4)
    prior = calibrate(mixed, TOKENIZER, settings)
    for scores in (*prior.scores.values(), *prior.spread.values()):
        assert [len(scores[f"model.layers.{n}.mlp"]) for n in range(3)] == [128, 64, 128]
        assert all(np.isfinite(values).all() for values in scores.values())
    prior.save(tmp_path / "prior")
    assert resolve_prior(mixed, tmp_path / "prior").title == str(tmp_path / "prior")


def test_non_finite_values_are_refused_at_once(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight *= 1e30
    model.model.layers[1].mlp.gate_proj.weight *= 1e30
    for statistics in (("activation",), ("impact",)):
        with pytest.raises(ValueError, match="not finite in this precision"):
            calibrate(model, TOKENIZER, replace(SETTINGS, statistics=statistics))


def test_a_device_as_output_is_written_to_and_nothing_is_left_beside_it():
    files = {*Path("/dev").iterdir()}
    build(tiny_model("llama"), TOKENIZER, Path("/dev/null"), SETTINGS)
    assert Path("/dev/null").is_char_device()
    assert {*Path("/dev").iterdir()} == files


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight[3, 5] = value
    with pytest.raises(
        ValueError, match=r"weights model\.layers\.1\.self_attn\.q_proj\.weight are"
    ):
        build(model, TOKENIZER, tmp_path / "prior", SETTINGS)
    assert not (tmp_path / "prior").exists()


def test_until_stable_waits_for_every_recipe(sequences):
    sequences[:] = [sequences[0]] * 6
    recipes = (Recipe("bos"), Recipe("chat", 0.1))
    settings = replace(SETTINGS, recipes=recipes, until_stable=0.5)
    about = calibrate(tiny_model("llama"), TOKENIZER, settings).about
    assert all(recipe["sequences"] >= 2 for recipe in about["recipes"])


def test_an_interrupted_chat_resumes_with_its_original_frame(tmp_path, monkeypatch):
    """A template may contain the date, and a run may resume after midnight."""
    model, settings = tiny_model("llama"), replace(SETTINGS, recipes=(Recipe("chat"),))
    frame = building.chat_frame(TOKENIZER)
    build(model, TOKENIZER, tmp_path / "whole", settings)
    save = building.save_checkpoint

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        build(model, TOKENIZER, tmp_path / "parts", settings)
    monkeypatch.setattr(building, "save_checkpoint", save)
    tomorrow = replace(frame, before=[*frame.before, 7])
    monkeypatch.setattr(building, "chat_frame", lambda tokenizer: tomorrow)
    build(model, TOKENIZER, tmp_path / "parts", settings)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_checkpoint_of_a_model_in_another_precision_is_refused(tmp_path):
    model, file = tiny_model("llama"), tmp_path / "partial"
    nn.quantize(model, 32, 8)
    calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)
