"""A small prior is measured once, when a model without a prior is used for the first time."""

import math

from glass_mlx import Session, stream_generate
from glass_mlx.calibration import building, first_use
from glass_mlx.calibration.first_use import find_or_measure_prior
from glass_mlx.files import locked
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.streaming import generate
from helpers import chat_tokenizer, made_prior

import pytest

TOKENIZER = chat_tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path))
    return tmp_path / "priors"


def priors(cache):
    return sorted(cache.iterdir()) if cache.exists() else []


def test_generation_in_python_measures_it_once(cache, capsys):
    model = tiny_model("llama")
    options = {"max_tokens": 4, "warmup": 1, "max_kl": 1.0}
    *_, response = stream_generate(model, TOKENIZER, "丁七丄", **options)
    (file,) = priors(cache)
    prior = GlobalPrior.load(file)
    assert response.glass.prior == str(file)
    assert prior.about["sequences"] >= 24
    assert {*prior.scores} == {"activation", "griffin"}
    assert "Measuring a small one once" in capsys.readouterr().err
    state = file.stat()
    generate(tiny_model("llama"), TOKENIZER, "丁七丄", **options)
    assert capsys.readouterr().err == ""
    assert file.stat() == state


def test_it_is_measured_neither_for_a_given_prior_nor_without_one(cache):
    model = tiny_model("llama")
    for prior in (False, made_prior(model)):
        list(stream_generate(model, TOKENIZER, "丁七丄", 4, prior=prior))
    assert priors(cache) == []


def test_it_has_what_the_configuration_needs(cache):
    model = tiny_model("llama")
    stream_generate(model, TOKENIZER, "丁七丄", 4, max_kl=1.0, prior_statistic="impact")
    (file,) = priors(cache)
    assert {*GlobalPrior.load(file).scores} == {"activation", "griffin", "impact"}


def test_an_interrupted_measurement_continues(cache, monkeypatch):
    session, measured, limit = Session(tiny_model("llama")), [], math.inf
    measure = building.measure_sequences

    def measure_up_to_the_limit(*arguments):
        if len(measured) == limit:
            raise KeyboardInterrupt
        measured.append(measure(*arguments))

    monkeypatch.setattr(building, "measure_sequences", measure_up_to_the_limit)
    whole = find_or_measure_prior(session, TOKENIZER)
    (file,) = priors(cache)
    file.unlink()
    batches, limit = len(measured), len(measured) + 1
    with pytest.raises(KeyboardInterrupt):
        find_or_measure_prior(session, TOKENIZER)
    assert [path.name for path in priors(cache)] == [f"{file.name}.partial"]
    limit = math.inf
    assert find_or_measure_prior(session, TOKENIZER).about == whole.about
    assert len(measured) == 2 * batches
    assert priors(cache) == [file]


def test_the_checkpoint_of_another_version_is_begun_again(cache):
    session = Session(tiny_model("llama"))
    find_or_measure_prior(session, TOKENIZER)
    (file,) = priors(cache)
    file.unlink()
    file.with_name(f"{file.name}.partial").write_bytes(b"damaged")
    assert find_or_measure_prior(session, TOKENIZER).source == str(file)
    assert priors(cache) == [file]


def test_a_damaged_prior_in_the_cache_is_measured_again(cache):
    session = Session(tiny_model("llama"))
    find_or_measure_prior(session, TOKENIZER)
    (file,) = priors(cache)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    find_or_measure_prior(session, TOKENIZER)
    assert file.read_bytes() == content


def test_a_second_process_waits_and_measures_nothing(cache, capsys, monkeypatch):
    session = Session(tiny_model("llama"))
    find_or_measure_prior(session, TOKENIZER)
    (file,) = priors(cache)
    content = file.read_bytes()
    file.unlink()
    other_process = locked(file)
    other_process.__enter__()

    def finish(seconds):
        file.write_bytes(content)
        other_process.__exit__(None, None, None)

    monkeypatch.setattr(first_use.time, "sleep", finish)
    capsys.readouterr()
    assert find_or_measure_prior(session, TOKENIZER).source == str(file)
    assert file.read_bytes() == content
    err = capsys.readouterr().err
    assert "waiting for another process" in err
    assert err.count("Measuring") == 1


def test_where_nothing_can_be_measured_the_message_names_the_alternative(cache, monkeypatch):
    def fail(*arguments):
        raise ValueError("the recipe bos gave no text to measure")

    monkeypatch.setattr(first_use, "build", fail)
    with pytest.raises(ValueError, match=r"gave no text to measure; .*prior=False"):
        find_or_measure_prior(Session(tiny_model("llama")), TOKENIZER)


def test_a_cache_that_cannot_be_written_is_an_error_before_measuring(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"no prior can be measured .*prior=False"):
        find_or_measure_prior(Session(tiny_model("llama")), TOKENIZER)
