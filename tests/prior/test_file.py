"""Files of priors: round trips, damage, and the search for a prior."""

import json
import re
from dataclasses import replace

import glass_mlx.prior.file as prior_file
from glass_mlx import GlassConfig, NoPriorError, Session, resolve_prior
from glass_mlx.files import digest
from glass_mlx.models import Fingerprint, find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.display import describe, draw
from glass_mlx.prior.file import FILE_NAME, FORMAT, GlobalPrior
from glass_mlx.ranking import ranks
from helpers import curve_record, made_prior

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def file(model, tmp_path):
    made_prior(model).save(tmp_path / "prior.safetensors")
    return tmp_path / "prior.safetensors"


def test_a_loaded_prior_equals_the_saved_one(model, file):
    saved, loaded = made_prior(model), GlobalPrior.load(file)
    assert loaded.about == {"model": "tiny"}
    for path, values in saved.scores["activation"].items():
        assert np.array_equal(loaded.scores["activation"][path], values)
        spread = saved.spread["activation"][path]
        assert np.array_equal(loaded.spread["activation"][path], spread)
    assert resolve_prior(model, file).source == str(file)
    assert not list(file.parent.glob(".*"))


def test_ranks_are_computed_once(model, monkeypatch):
    prior, calls = made_prior(model), []

    def counted_ranks(scores):
        calls.append(scores)
        return ranks(scores)

    monkeypatch.setattr(prior_file, "ranks", counted_ranks)
    first = prior.ranks("griffin")
    assert first.keys() == prior.scores["griffin"].keys()
    for path, scores in prior.scores["griffin"].items():
        assert np.array_equal(first[path], ranks(scores))
    assert len(calls) == 4
    assert prior.ranks("griffin") is first
    assert len(calls) == 4
    assert prior.ranks("activation") is not first
    assert replace(prior).ranks("griffin") is not first


def test_equal_priors_give_equal_files(model, file, tmp_path):
    for name in "abcdef":
        made_prior(model).save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == file.read_bytes()


def test_a_prior_is_refused_for_another_model(file):
    for other, reason in (
        (tiny_model("llama", seed=1), "other weights"),
        (tiny_model("gemma3_text", seed=2), "other weights"),
    ):
        with pytest.raises(ValueError, match=reason):
            resolve_prior(other, file)


def test_a_prior_is_refused_for_other_widths_and_layers(model):
    prior = made_prior(model)
    scores = prior.scores["activation"]
    first = next(iter(scores))
    narrow = replace(prior, scores={"activation": scores | {first: scores[first][1:]}})
    with pytest.raises(ValueError, match="128 neurons in the model and 127 in it"):
        resolve_prior(model, narrow)
    fewer = replace(prior, scores={"activation": {p: s for p, s in scores.items() if p != first}})
    with pytest.raises(ValueError, match="3 FFNs are not the model's 4"):
        resolve_prior(model, fewer)


def test_a_truncated_file_is_refused(file):
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            GlobalPrior.load(file)


def test_an_edited_file_is_refused(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="changed after it was written"):
        GlobalPrior.load(file)


def test_another_safetensors_file_is_refused(file):
    save_file({"a": np.zeros(3)}, file)
    with pytest.raises(ValueError, match="not in the format glass-prior-4"):
        GlobalPrior.load(file)


def test_mutated_files_are_refused_in_one_sentence(file):
    content, generator = file.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for trial in range(500):
        mutated = bytearray(content)
        # Half of the trials change the header, which holds the structure.
        end = header if trial % 2 else len(content)
        for position in generator.integers(0, end, generator.integers(1, 5)):
            mutated[position] ^= generator.integers(1, 256)
        if trial % 5 == 0:
            mutated = mutated[: generator.integers(0, len(mutated))]
        file.write_bytes(mutated)
        with pytest.raises(ValueError, match=str(file)) as error:
            GlobalPrior.load(file)
        assert "\n" not in str(error.value)


def edit_metadata(metadata, generator):
    """Replace an entry of a prior's metadata with a value of any type, or remove the entry."""
    odd_values = [None, -1, 1e308, "", "x" * 1000, [], {}, [[[]]], {"a": None}, True]
    value = odd_values[generator.integers(len(odd_values))]
    keys = ["format", "about", "digest"]
    key = keys[generator.integers(3)]
    if generator.random() < 0.3:
        metadata.pop(key)
    else:
        metadata[key] = value


def edit_about(about, generator):
    """Replace parts of a prior's description with malformed values."""
    odd_values = [
        None,
        3,
        "x",
        [],
        [1],
        {},
        {"a": 1},
        {"a": {"b": []}},
        {"activation": {"spearman": 1}},
    ]
    keys = ["model", "recipes", "settings", "versions", "stability", "tokens", "machine"]
    for key in generator.choice(keys, 2):
        about[key] = odd_values[generator.integers(len(odd_values))]


def edit_tensors(tensors, generator):
    """Change a tensor's presence, name, type, shape or values."""
    key = [*tensors][generator.integers(len(tensors))]
    values = tensors[key]
    changes = [
        lambda: tensors.pop(key),
        lambda: tensors.update({f"{key}x": tensors.pop(key)}),
        lambda: tensors.update({key.replace(".", ""): tensors.pop(key)}),
        lambda: tensors.update({key: values.astype(np.int64)}),
        lambda: tensors.update({key: values.astype(np.float16)}),
        lambda: tensors.update({key: values[None]}),
        lambda: tensors.update({key: values[:0]}),
        lambda: tensors.update({key: values.ravel()[:3]}),
        lambda: tensors.update({key: values.ravel()[:1].reshape(())}),
        lambda: tensors.update({key: np.full_like(values, np.nan)}),
        lambda: tensors.update({"": values}),
        lambda: tensors.clear(),
    ]
    changes[generator.integers(len(changes))]()


@pytest.mark.slow
def test_forged_files_are_refused_or_used_but_never_crash(model, file):
    """Forge complete files with a correct digest, but with the wrong contents."""
    generator = np.random.default_rng(1)
    refusals = 0
    for _ in range(500):
        tensors = load_file(file)
        about = {"model": "tiny"}
        if generator.random() < 0.5:
            edit_tensors(tensors, generator)
        else:
            edit_about(about, generator)
        metadata = {"format": FORMAT, "about": about, "digest": digest(tensors, about)}
        if generator.random() < 0.3:
            edit_metadata(metadata, generator)
        forged = file.with_name("forged")
        save_file(tensors, forged, {"glass": json.dumps(metadata)})
        try:
            prior = resolve_prior(model, forged)
            describe(prior)
            draw(prior, file.with_name("picture"))
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(forged) in str(error)
            refusals += 1
    assert refusals > 300


def test_nested_and_malformed_metadata_is_refused(file):
    for text in ("[" * 100000, "{", "[]", "1", '{"format": 2}'):
        save_file({"a": np.zeros(3)}, file, {"glass": text})
        with pytest.raises(ValueError, match="not in the format glass-prior-4"):
            GlobalPrior.load(file)


def test_a_header_with_huge_sizes_allocates_nothing(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for entry in header.values():
        if "shape" in entry:
            entry["shape"], entry["data_offsets"] = [1 << 40], [0, 1 << 42]
    forged = json.dumps(header).encode()
    huge = (1 << 62).to_bytes(8, "little")
    for start in (len(forged).to_bytes(8, "little"), huge):
        file.write_bytes(start + forged + content[8 + size :])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            GlobalPrior.load(file)


def test_zero_or_huge_fingerprints_match_no_model(model):
    prior = made_prior(model)
    for value in (0, 3e38, -3e38):
        samples = {p: np.full_like(s, value) for p, s in prior.fingerprint.samples.items()}
        other = replace(prior, fingerprint=Fingerprint(samples, 0.003))
        with pytest.raises(ValueError, match="other weights"):
            resolve_prior(model, other)


def test_non_finite_values_are_refused(model, file):
    prior = made_prior(model)
    next(iter(prior.scores["activation"].values()))[3] = np.nan
    prior.save(file)
    with pytest.raises(ValueError, match="not finite"):
        GlobalPrior.load(file)


def test_scores_of_the_vocabulary_are_optional(model, file):
    prior = made_prior(model)
    replace(prior, vocabulary=np.zeros(0, np.float32)).save(file)
    with pytest.raises(ValueError, match=r"vocabulary\.plausibility has type float32"):
        GlobalPrior.load(file)
    for scores in (None, np.ones(8, np.float32)):
        replace(prior, vocabulary=scores).save(file)
        loaded = GlobalPrior.load(file)
        assert (loaded.vocabulary is None) == (scores is None)


def test_an_interrupted_save_keeps_the_old_file(model, file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glass_mlx.files.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        made_prior(model, seed=1).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_model_folder_is_searched_before_the_cache(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    lines = []
    bad = tmp_path / "cache/priors/0.safetensors"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"x")
    with pytest.raises(NoPriorError, match=r"no prior for this model.*glass-mlx calibrate --model"):
        resolve_prior(model, folder=tmp_path, report=lines.append)
    places = (tmp_path, bad, tmp_path / "cache/priors", "glass_mlx/priors")
    assert all(str(p) in line for p, line in zip(places, lines, strict=True))
    made_prior(tiny_model("llama", seed=1)).save(tmp_path / "cache/priors/a.safetensors")
    made_prior(model).save(tmp_path / "cache/priors/b.safetensors")
    assert resolve_prior(model).source.endswith("b.safetensors")
    in_folder = tmp_path / "model" / FILE_NAME
    made_prior(model).save(in_folder)
    assert resolve_prior(model, folder=tmp_path / "model").source == str(in_folder)
    made_prior(tiny_model("llama", seed=1)).save(in_folder)
    with pytest.raises(ValueError, match="not for this model"):  # instead of using another prior
        resolve_prior(model, folder=tmp_path / "model")


def test_the_file_describes_the_measurement(file):
    with safe_open(file, "numpy") as stored:
        metadata = json.loads(stored.metadata()["glass"])
    assert metadata["about"] == {"model": "tiny", "rounding": 0.003}
    assert metadata["format"] == "glass-prior-4"
    names = set(load_file(file))
    parts = ("activation", "activation_spread", "fingerprint")
    assert {f"model.layers.0.mlp.{part}" for part in parts} <= names


def noisy(model, noise):
    """Return a tiny model whose weights differ from a model's by a share of their size."""
    related = tiny_model("llama")
    for ffn in find_ffns(related):
        for layer in ffn.expand.values():
            layer.weight += noise * mx.std(layer.weight) * mx.random.normal(layer.weight.shape)
    return related


def test_a_related_models_prior_serves_without_its_curve_and_says_so(model, tmp_path):
    mx.random.seed(0)
    about = {"model": "base", "whole": ["model.layers.0.mlp"]}
    about["curves"] = [curve_record(model)]
    prior = replace(made_prior(model), about=about)
    own = resolve_prior(model, prior)
    assert own is prior
    assert own.kept_dense == ("model.layers.0.mlp",)
    related = resolve_prior(noisy(model, 0.05), prior)
    assert related.kept_dense == ()
    assert "curves" not in related.about
    assert re.fullmatch(
        r"given \(measured on other weights: base, similarity 0\.99\d\)", related.title
    )
    assert related.scores is prior.scores
    with pytest.raises(ValueError, match="other weights"):
        resolve_prior(noisy(model, 0.7), prior)


def test_the_models_own_prior_goes_before_a_relatives(model, tmp_path, monkeypatch):
    mx.random.seed(0)
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path))
    related = noisy(model, 0.05)
    made_prior(related).save(tmp_path / "priors/a.safetensors")
    assert "other weights" in resolve_prior(model).title
    made_prior(model).save(tmp_path / "priors/b.safetensors")
    assert resolve_prior(model).title == str(tmp_path / "priors/b.safetensors")
    assert resolve_prior(related).title == str(tmp_path / "priors/a.safetensors")


@pytest.mark.parametrize("size", [250, 256, 270])
def test_token_scores_serve_variants_with_more_or_fewer_tokens(model, size):
    scores = np.arange(1, 257, dtype=np.float32)
    prior = replace(made_prior(model), vocabulary=scores).with_vocabulary(size)
    assert prior.vocabulary.dtype == np.float32
    assert np.array_equal(prior.vocabulary[:256], scores[:size])
    assert not prior.vocabulary[256:].any()
    assert prior.title == "given"


@pytest.mark.parametrize("size", [100, 300])
def test_scores_of_other_tokens_are_not_used_and_the_report_says_so(model, size):
    scores = np.ones(size, np.float32)
    prior = replace(made_prior(model), vocabulary=scores)
    selector = Session(model).selector(GlassConfig(density=1.0, vocabulary=0.5), prior)
    assert selector.prior.vocabulary is None
    assert "other tokens" in selector.prior.title
    assert selector.prior.scores is prior.scores
