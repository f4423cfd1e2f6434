"""Measuring a prior: what it is, that nothing is lost, and what it takes."""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import glass_mlx.calibration as calibration
from glass_mlx.calibration import Settings, build, calibrate
from glass_mlx.files import locked
from glass_mlx.lookup import resolve_prior
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior import FILE_NAME, GlobalPrior
from glass_mlx.recipes import Recipe, Sequence
from glass_mlx.stability import overall
from glass_mlx.statistics import STATISTICS
from invariants import chat_tokenizer, snapshot, statistics_of
from test_checkpoints import save_tiny_folder

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.llama import MLP, ModelArgs

TOKENIZER = chat_tokenizer()
BOS = (Recipe("bos"),)
SETTINGS = Settings(recipes=BOS, tokens=96, length=24, batch_size=2, curve_texts=0)
TOOL = Path(__file__).parents[1] / "tools/build_priors.py"


def assert_identical(a, b):
    for name, scores in a.scores.items():
        for path, values in scores.items():
            assert np.array_equal(values, b.scores[name][path])
            assert np.array_equal(a.spread[name][path], b.spread[name][path])
    assert a.about == b.about


@pytest.fixture
def known(monkeypatch):
    """Let every recipe give the same known sequences, a batch at a time."""
    generator = np.random.default_rng(0)

    def sequence(length):
        counted = [0, 0, *[1] * (length - 3), 0]
        return Sequence(generator.integers(0, 256, length).tolist(), counted)

    sequences = [sequence(length) for length in (9, 12, 5, 20, 7, 12)]

    def source(recipe, writer, tokenizer, length, frame, field, done):
        left = iter(sequences[done:])
        return lambda size, batch: list(islice(left, size))

    monkeypatch.setattr(calibration, "source", source)
    return sequences


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


def test_mean_and_spread_are_those_of_the_sequences(known):
    model = tiny_model("llama")
    names = (*STATISTICS, "impact")
    prior = calibrate(model, TOKENIZER, replace(SETTINGS, statistics=names, sequences=6))
    single = [statistics_of(model, [mx.array(s.tokens[:-1])[None]], True) for s in known]
    first_two = [statistics_of(model, [mx.array(s.tokens[:2])[None]], True) for s in known]
    for path, values in prior.scores["activation"].items():
        each = [
            (whole["activation"][path] * (len(s.tokens) - 1) - start["activation"][path] * 2)
            / sum(s.counted)
            for s, whole, start in zip(known, single, first_two, strict=True)
        ]
        np.testing.assert_allclose(values, np.mean(each, axis=0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            prior.spread["activation"][path], np.std(each, axis=0), rtol=1e-2, atol=1e-5
        )
    assert prior.about["tokens"] == sum(sum(s.counted) for s in known)
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
    alone = replace(settings, recipes=recipes[:1], sequences=corpus["sequences"])
    alone = calibrate(model, TOKENIZER, alone)
    # the second recipe's text depends on its place, so that two of one kind differ
    swapped = replace(settings, recipes=(Recipe("corpus", 1e-9, file), Recipe("bos", 1.0)))
    swapped = replace(swapped, sequences=1 + bos["sequences"])
    other = calibrate(model, TOKENIZER, swapped)
    assert [r["sequences"] for r in other.about["recipes"]] == [1, bos["sequences"]]
    for path, values in mixture.scores["activation"].items():
        mean = 0.75 * alone.scores["activation"][path] + 0.25 * other.scores["activation"][path]
        np.testing.assert_allclose(values, mean, rtol=1e-4)


def test_equal_recipes_mix_to_themselves(known):
    model = tiny_model("llama")
    one = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=6))
    two = (Recipe("bos", 2.0), Recipe("chat", 0.5))
    both = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=12, recipes=two))
    for path, values in one.scores["griffin"].items():
        np.testing.assert_allclose(both.scores["griffin"][path], values, rtol=1e-6)
        np.testing.assert_allclose(both.spread["griffin"][path], one.spread["griffin"][path], 1e-4)


def test_halves_of_the_same_text_agree(known):
    model = tiny_model("llama")
    known[:] = [known[0]] * 4
    same = calibrate(model, TOKENIZER, replace(SETTINGS, sequences=4)).about["stability"]
    for measures in same.values():
        assert measures.keys() == {"spearman", "jaccard 0.25", "jaccard 0.5", "jaccard 0.75"}
        assert all(np.allclose([*measure.values()], 1) for measure in measures.values())
    assert overall(same) == pytest.approx(1)


def test_until_stable_stops_before_the_tokens_are_spent():
    model = tiny_model("llama")
    settings = replace(SETTINGS, tokens=4000)
    all_of_it = calibrate(model, TOKENIZER, settings).about
    goal = overall(all_of_it["stability"]) - 0.1
    stopped = calibrate(model, TOKENIZER, replace(settings, until_stable=goal)).about
    assert stopped["tokens"] < all_of_it["tokens"]
    assert overall(stopped["stability"]) >= goal


def test_the_seed_decides():
    model = tiny_model("llama")
    prior = calibrate(model, TOKENIZER, SETTINGS)
    assert_identical(prior, calibrate(model, TOKENIZER, SETTINGS))
    other = calibrate(model, TOKENIZER, replace(SETTINGS, seed=1))
    path = "model.layers.0.mlp"
    assert not np.array_equal(prior.scores["activation"][path], other.scores["activation"][path])


@pytest.mark.parametrize("recipes", [BOS, (Recipe("chat"), Recipe("bos", 0.5))])
def test_an_interrupted_calibration_goes_on_to_the_same_file(tmp_path, monkeypatch, recipes):
    model, settings = tiny_model("llama"), replace(SETTINGS, recipes=recipes)
    build(model, TOKENIZER, tmp_path / "whole", settings)
    measure, calls = calibration._measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(*args)

    monkeypatch.setattr(calibration, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(model, TOKENIZER, tmp_path / "parts", settings)
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "parts.partial"}
    build(model, TOKENIZER, tmp_path / "parts", settings)
    in_parts = len(calls) - 1  # the third batch was measured twice, the first two once
    calls[:] = [None] * 3
    build(model, TOKENIZER, tmp_path / "again", settings)
    assert len(calls) - 3 == in_parts
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "parts", "again"}


def command(folder, output, *arguments, **options):
    arguments = ["--model", str(folder), "--output", str(output), *map(str, arguments)]
    arguments += ["--recipe", "bos", "--tokens", "4000", "--length", "40", "--batch-size", "4"]
    arguments += ["--curve-texts", "1"]
    return subprocess.Popen(
        [sys.executable, str(TOOL), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "tiny")


def wait_for(file, process):
    while not file.exists() and process.poll() is None:
        time.sleep(0.01)
    assert file.exists(), process.communicate()


def test_killed_or_without_disk_the_command_goes_on_to_the_same_file(folder, tmp_path):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    done = command(folder, whole)
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert out.startswith(f"Wrote {whole}: ")
    assert "Peak memory: " in out

    partial = tmp_path / "parts.safetensors.partial"
    killed = command(folder, parts)
    wait_for(partial, killed)
    refused = command(folder, parts)
    assert "another run is writing" in refused.communicate()[1]
    assert refused.returncode == 2
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not parts.exists()
    (tmp_path / ".parts.safetensors.partial.glass-x").mkdir()  # as if killed while writing
    (tmp_path / ".parts.safetensors.mine").mkdir()

    interrupted = command(folder, parts)
    before = partial.stat().st_mtime_ns
    while partial.stat().st_mtime_ns == before and interrupted.poll() is None:
        time.sleep(0.01)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate()
    assert interrupted.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    stuck = command(folder, parts, preexec_fn=full_disk)
    _, err = stuck.communicate()
    assert stuck.returncode == 2
    assert err.splitlines()[-1].startswith("build_priors: error: ")
    assert "cannot be written" in err
    assert "Traceback" not in err

    done = command(folder, parts)
    _, err = done.communicate()
    assert done.returncode == 0, err
    assert parts.read_bytes() == whole.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {
        *("tiny", whole.name, parts.name, ".parts.safetensors.mine")
    }


def test_two_runs_on_one_output_refuse_each_other(tmp_path):
    with locked(tmp_path / "prior"), pytest.raises(ValueError, match="another run is writing"):
        build(tiny_model("llama"), TOKENIZER, tmp_path / "prior", SETTINGS)
    build(tiny_model("llama"), TOKENIZER, tmp_path / "prior", SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, file = tiny_model("llama"), tmp_path / "partial"
    calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, TOKENIZER, replace(SETTINGS, seed=1), checkpoint=file)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="delete it to begin again"):
        calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)


def test_the_peak_of_memory_does_not_grow_with_the_tokens():
    model = tiny_model("llama")

    def peak(sequences):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        statistics = ("activation", "impact")
        calibrate(model, TOKENIZER, replace(SETTINGS, sequences=sequences, statistics=statistics))
        return mx.get_peak_memory()

    gc.disable()  # nothing may wait for it
    try:
        peak(4)
        few, many = peak(4), peak(40)
    finally:
        gc.enable()
    assert many <= 1.02 * few


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_models_are_measured_and_left_as_they_were(architecture):
    model = tiny_model(architecture)
    before = snapshot(model)
    statistics = (*STATISTICS, "impact")
    prior = calibrate(model, TOKENIZER, replace(SETTINGS, statistics=statistics))
    assert prior.scores.keys() == {*statistics}
    assert snapshot(model) == before
    assert not any(module.training for module in model.modules())


def test_quantized_and_lazy_models_and_layers_of_different_widths(tmp_path):
    from glass_mlx import load

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
    assert (
        GlobalPrior.load(tmp_path / "prior").mismatch(
            {ffn.path: ffn.width for ffn in find_ffns(mixed)}, prior.fingerprint
        )
        is None
    )


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["build_priors.py", *map(str, arguments)])
    code = 0
    try:
        calibration.main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()[-1] if captured.err else ""


def test_the_command_writes_a_prior_that_the_model_finds_and_shows_it(
    folder, tmp_path, monkeypatch, capsys
):
    output = folder / FILE_NAME
    arguments = ["--model", folder, "--output", output, "--tokens", 90, "--length", 24]
    arguments += ["--recipe", "bos=2", "--statistic", "griffin", "--statistic", "impact"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    prior = resolve_prior(tiny_model("llama"), folder=folder)
    assert out.startswith(f"Wrote {output}: {prior.about['tokens']} tokens in ")
    assert prior.about["model"] == folder.name
    assert prior.scores.keys() == {"griffin", "impact"}
    assert not list(folder.glob("*.partial")) + list(folder.glob("*.lock"))

    monkeypatch.chdir(tmp_path)
    code, out, _ = run(monkeypatch, capsys, "--show", output)
    assert code == 0
    for part in (folder.name, "bos, weight 2.0", "griffin, impact", "stability of impact", "mean"):
        assert part in out
    picture = tmp_path / "glass_prior.png"
    assert str(picture.name) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 0], "must be positive"),
        (["--sequences", 0], "must be positive"),
        (["--length", -1], "must be positive"),
        (["--length", 16], "the length must be above 16"),
        (["--batch-size", 0], "must be positive"),
        (["--temp", 0], "must be positive"),
        (["--temp", "nan"], "must be positive"),
        (["--seed", -1], "the seed must not be negative"),
        (["--until-stable", 2], "--until-stable must be between 0 and 1"),
        (["--recipe", "poem"], "'poem' is not a recipe"),
        (["--recipe", "corpus"], "'corpus' is not a recipe"),
        (["--recipe", "bos=-1"], "must be positive"),
        (["--recipe", "chat"], "no chat template; use the recipe bos"),
        (["--recipe", "corpus:missing.txt"], "there is no corpus at missing.txt"),
        (["--statistic", "variance"], "invalid choice"),
        (["--model", "missing.gguf"], "there is no model at missing.gguf"),
        (["--show", "x"], "not allowed with argument"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    folder, tmp_path, monkeypatch, capsys, arguments, message
):
    before = ["--model", folder, "--output", tmp_path / "out"]
    code, out, err = run(monkeypatch, capsys, *before, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(
        "build_priors.py: error: " if "argument" in err else "build_priors: error: "
    )
    assert message in err
    assert not list(tmp_path.glob("*out*"))


def test_an_output_that_is_a_folder_is_refused_at_once(folder, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "--model", folder, "--output", folder)
    assert code == 2
    assert err.endswith("is a folder; give the name of a file")


def test_values_that_are_not_finite_are_refused_at_once(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight *= 1e30
    model.model.layers[1].mlp.gate_proj.weight *= 1e30
    for statistics in (("activation",), ("impact",)):
        with pytest.raises(ValueError, match="not finite in this precision"):
            calibrate(model, TOKENIZER, replace(SETTINGS, statistics=statistics))


def test_until_stable_waits_for_every_recipe(known):
    known[:] = [known[0]] * 6
    recipes = (Recipe("bos"), Recipe("chat", 0.1))
    settings = replace(SETTINGS, recipes=recipes, until_stable=0.5)
    about = calibrate(tiny_model("llama"), TOKENIZER, settings).about
    assert all(recipe["sequences"] >= 2 for recipe in about["recipes"])


def test_an_interrupted_chat_goes_on_with_the_frame_that_it_began_with(tmp_path, monkeypatch):
    """As when a template writes the date, and the run goes on after midnight."""
    model, settings = tiny_model("llama"), replace(SETTINGS, recipes=(Recipe("chat"),))
    frame = calibration.chat_frame(TOKENIZER)
    build(model, TOKENIZER, tmp_path / "whole", settings)
    save = calibration._save

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        build(model, TOKENIZER, tmp_path / "parts", settings)
    monkeypatch.setattr(calibration, "_save", save)
    tomorrow = replace(frame, before=[*frame.before, 7])
    monkeypatch.setattr(calibration, "chat_frame", lambda tokenizer: tomorrow)
    build(model, TOKENIZER, tmp_path / "parts", settings)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_checkpoint_of_the_same_model_with_other_weights_in_memory_is_refused(tmp_path):
    model, file = tiny_model("llama"), tmp_path / "partial"
    nn.quantize(model, 32, 8)
    calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, TOKENIZER, SETTINGS, checkpoint=file)


def test_a_damaged_prior_is_not_shown(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    code, out, err = run(monkeypatch, capsys, "--show", tmp_path / "x.safetensors")
    assert (code, out) == (2, "")
    assert "not a complete safetensors file" in err


def test_the_module_is_the_tool(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "glass_mlx.calibration", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert "--recipe" in done.stdout
    assert json.dumps(done.stderr) == '""'
