"""What is known of a model is found once, and found again when the model is another one."""

import copy

from glass_mlx import Session, stream_generate
from glass_mlx.models import discovery, ffn, weights
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior import file, lookup
from glass_mlx.prior.file import FILE_NAME, GlobalPrior
from helpers import letter_tokenizer, made_prior

import mlx.core as mx
import mlx.nn as nn
import pytest

OPTIONS = {"density": 0.5, "warmup": 2, "refresh": 4, "max_tokens": 12}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def counts(monkeypatch):
    """How often each step of the preparation runs."""
    counts = {}

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(discovery, "_find_ffn")  # per module
    count(discovery, "_is_sum_over_neurons")  # per kind of module
    count(weights, "dense_weight")  # per FFN, for the fingerprint
    count(ffn, "_TransposedCopy")  # per FFN, for the transposed copies
    count(GlobalPrior, "mismatch")
    count(lookup, "prior_files")
    count(file, "ranks")  # per FFN, for the prior
    return counts


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_second_generation_prepares_nothing_again(model, counts, tmp_path, monkeypatch, wrapped):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path))
    nn.quantize(model, 32, 4)
    made_prior(model).save(tmp_path / "priors" / FILE_NAME)
    tokenizer, given = letter_tokenizer(), Session(model) if wrapped else model
    options = OPTIONS | {"down_policy": "neuron-major"}

    counts.clear()
    first = [r.token for r in stream_generate(given, tokenizer, [1, 2, 3], **options)]
    if not wrapped:
        assert counts["_find_ffn"] == len(model.named_modules())
    assert counts["dense_weight"] == 4
    assert counts["mismatch"] == 1
    assert counts["prior_files"] == 1
    assert counts["ranks"] == 4
    assert counts["_TransposedCopy"] == 4

    counts.clear()
    assert [r.token for r in stream_generate(given, tokenizer, [1, 2, 3], **options)] == first
    assert counts == {}


def replace_a_module(model):
    model.layers[1].mlp.down_proj = nn.Linear(128, 64, bias=False)


def replace_weights(model):
    model.set_dtype(mx.float16)


def replace_attention(model):
    model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)


@pytest.mark.parametrize("change", [replace_a_module, replace_weights, replace_attention])
def test_a_session_ends_with_the_arrays_it_knows(model, change):
    session = Session.of(model)
    assert Session.of(model) is session
    assert Session.of(session) is session
    change(model)
    assert not session.is_current()
    assert Session.of(model) is not session
    assert Session.of(model).weight_bytes > 0


def test_copies_of_a_model_have_sessions_of_their_own(model):
    session = Session.of(model)
    for other in (copy.copy(model), copy.deepcopy(model)):
        assert Session.of(other) is not session
        assert Session.of(other).model is other
    assert Session.of(model) is session


def test_a_prior_is_read_again_when_its_file_changes(model, tmp_path):
    prior_file = tmp_path / "prior.safetensors"
    made_prior(model).save(prior_file)
    session = Session(model)
    first = session.find_prior(prior_file)
    assert session.find_prior(prior_file) is first
    made_prior(model, seed=2).save(prior_file)
    second = session.find_prior(prior_file)
    assert second is not first
    given = made_prior(model)
    assert session.find_prior(given) is given
    assert session.find_prior(prior_file).scores.keys() == second.scores.keys()
