"""A session prepares a model once, and again when the model changes."""

import copy
import gc
import weakref

from glass_mlx import Session, stream_generate
from glass_mlx.models import discovery, ffn, fingerprints
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior import file, lookup
from glass_mlx.prior.file import FILE_NAME, GlobalPrior
from glass_mlx.slicing import slice_model
from helpers import letter_tokenizer, made_prior, random_selection

import mlx.core as mx
import mlx.nn as nn
import pytest

OPTIONS = {"density": 0.5, "warmup": 2, "refresh": 4, "max_tokens": 12}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def counts(monkeypatch):
    """Count how often each step of the preparation runs."""
    counts = {}

    def count(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    count(discovery, "_find_ffn")  # per module
    count(discovery, "_is_sum_over_neurons")  # per kind of module
    count(fingerprints, "leading_columns")  # per FFN, for the fingerprint
    count(ffn, "_TransposedCopy")  # per FFN, for the transposed copies
    count(GlobalPrior, "fitted")
    count(lookup, "prior_files")
    count(file, "ranks")  # per FFN, for the prior
    return counts


@pytest.mark.parametrize("in_session", [False, True])
def test_a_second_generation_repeats_no_preparation(
    model, counts, tmp_path, monkeypatch, in_session
):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path))
    nn.quantize(model, 32, 4)
    made_prior(model).save(tmp_path / "priors" / FILE_NAME)
    tokenizer, source = letter_tokenizer(), Session(model) if in_session else model
    options = OPTIONS | {"down_policy": "neuron-major"}

    counts.clear()
    first = [r.token for r in stream_generate(source, tokenizer, [1, 2, 3], **options)]
    if not in_session:
        assert counts["_find_ffn"] == len(model.named_modules())
    assert counts["leading_columns"] == 4
    assert counts["fitted"] == 1
    assert counts["prior_files"] == 1
    assert counts["ranks"] == 4
    assert counts["_TransposedCopy"] == 4

    counts.clear()
    assert [r.token for r in stream_generate(source, tokenizer, [1, 2, 3], **options)] == first
    assert counts == {}


def replace_a_module(model):
    model.layers[1].mlp.down_proj = nn.Linear(128, 64, bias=False)


def replace_weights(model):
    model.set_dtype(mx.float16)


def replace_attention(model):
    model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)


def quantize(model):
    nn.quantize(model, 32, 4)


@pytest.mark.parametrize("change", [replace_a_module, replace_weights, replace_attention, quantize])
def test_replacing_arrays_invalidates_a_session(model, change):
    session = Session(model)
    ffns, size = session.ffns, session.weight_bytes
    assert Session(model).ffns is ffns
    assert Session.of(session) is session
    assert session.ffns is ffns
    change(model)
    assert Session.of(model).ffns is not ffns
    assert Session.of(session) is session
    assert session.ffns is Session(model).ffns
    assert (session.weight_bytes == size) == (change in (replace_a_module, replace_attention))


def test_an_existing_session_follows_its_model(model):
    """Stale slices of the float weights would give other logits than the quantized weights."""
    session, tokenizer, prior = Session(model), letter_tokenizer(), made_prior(model)
    options = OPTIONS | {"prior": prior, "down_policy": "requantize"}
    nn.quantize(model, 32, 4)
    by_session, by_model = (
        [r.logprobs for r in stream_generate(model_or_session, tokenizer, [1, 2, 3], **options)]
        for model_or_session in (session, model)
    )
    assert all(mx.array_equal(a, b) for a, b in zip(by_session, by_model, strict=True))
    with pytest.raises(ValueError, match="not for this model"):
        session.find_prior(made_prior(tiny_model("llama", seed=1)))
    model.layers[0].mlp.up_proj = nn.QQLinear(64, 128, mode="mxfp8")
    with pytest.raises(ValueError, match="quantizes activations"):
        stream_generate(session, tokenizer, [1, 2, 3], **options)


def test_copies_of_a_model_have_separate_sessions(model):
    ffns = Session(model).ffns
    for other in (copy.copy(model), copy.deepcopy(model)):
        assert Session(other).ffns is not ffns
        assert Session.of(other).model is other
    assert Session(model).ffns is ffns


def test_a_model_is_freed_with_its_last_reference():
    model = tiny_model("llama")
    made_prior(model)
    list(stream_generate(model, letter_tokenizer(), [1, 2, 3], prior=made_prior(model), **OPTIONS))
    weights, vocabulary = (
        weakref.ref(a) for a in (model.layers[0].mlp.up_proj.weight, model.lm_head.weight)
    )
    sliced = slice_model(model, random_selection(model), "requantize")
    gc.disable()
    try:
        del model
        assert weights() is None  # although the slices still exist
        assert vocabulary() is sliced.lm_head.weight
    finally:
        gc.enable()


def test_a_prior_is_read_again_when_its_file_changes(model, tmp_path):
    prior_file = tmp_path / "prior.safetensors"
    made_prior(model).save(prior_file)
    session = Session(model)
    first = session.find_prior(prior_file)
    assert session.find_prior(prior_file) is first
    made_prior(model, seed=2).save(prior_file)
    second = session.find_prior(prior_file)
    assert second is not first
    prior = made_prior(model)
    assert session.find_prior(prior) is prior
    assert session.find_prior(prior_file).scores.keys() == second.scores.keys()


def test_a_prior_is_searched_for_again_when_one_is_added(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path))
    folder, session, lines = tmp_path / "model", Session(model), []
    folder.mkdir()
    for new_file in (tmp_path / "priors/b.safetensors", tmp_path / "priors/a.safetensors"):
        made_prior(model).save(new_file)
        for _ in range(2):
            assert session.find_prior(folder=folder, report=lines.append).source == str(new_file)
            assert lines.pop() == f"using {new_file}"
            assert lines.pop().startswith("no glass_prior.safetensors")
    made_prior(model).save(folder / FILE_NAME)
    assert session.find_prior(folder=folder).source == str(folder / FILE_NAME)
    (folder / FILE_NAME).unlink()
    assert session.find_prior(folder=folder).source == str(tmp_path / "priors/a.safetensors")
