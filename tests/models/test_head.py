"""The output head of every architecture: found, sliced, moved in place and computed by itself."""

from importlib.metadata import version

import glass_mlx.models.head as head_module
from glass_mlx.models import BackedOffModel, LogitsOfHidden, find_head, weight_bytes, with_head
from glass_mlx.models.architectures import names, tiny_model
from helpers import FAST, add_adapters, snapshot

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21], [5, 4, 3, 2, 1, 0, 255]])

# Logits that are the product of two layers, or computed by a layer of the model's own class.
WHOLE = ("talkie",)

# Models that MLX's CPU backend does not run.
CRASHES = ("bitnet", "muse_spark", "phi3small", "prism_hadamard_qwen35")

pytestmark = pytest.mark.skipif(
    version("mlx-lm").startswith("0.31."), reason="the architectures are tested from mlx-lm 0.32 on"
)


def rows_of(size, share=0.5, seed=0):
    kept = np.random.default_rng(seed).choice(size, round(share * size), replace=False)
    return np.sort(kept).astype(np.int32)


def check_head(model):
    """Check a sliced head against the dense logits; return its bytes' share of the whole head's."""
    before, dense, head = snapshot(model), model(TOKENS), find_head(model)
    assert head is not None
    assert head.size == dense.shape[-1]
    first, second = rows_of(head.size), rows_of(head.size, seed=1)
    sliced = head.sliced(first)
    small, seen = with_head(model, head, sliced), []
    sliced.show(seen.append)
    small(TOKENS[:1])
    sliced.show(None)
    logits = LogitsOfHidden(model, head)
    assert mx.allclose(logits(mx.concatenate(seen, axis=-2)), dense[:1], rtol=1e-4, atol=1e-5)
    expected = dense[..., mx.array(first)]
    assert small(TOKENS).shape == expected.shape
    assert mx.allclose(small(TOKENS), expected, rtol=1e-4, atol=1e-5)
    saved = weight_bytes(model, head) - weight_bytes(small, head)
    assert saved == pytest.approx(head.bytes / 2, rel=0.01)

    sliced.move(second)
    assert sorted(sliced.rows.tolist()) == second.tolist()
    moved = with_head(model, head, sliced)(TOKENS)
    assert mx.allclose(moved, dense[..., mx.array(sliced.rows)], rtol=1e-4, atol=1e-5)

    everything = with_head(model, head, head.sliced(np.arange(head.size, dtype=np.int32)))
    assert mx.array_equal(everything(TOKENS), dense)
    assert snapshot(model) == before
    assert mx.array_equal(model(TOKENS), dense)


@pytest.mark.usefixtures("working_olmo")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names()]
)
def test_heads_of_every_architecture(name):
    if name in CRASHES:
        pytest.skip("MLX's CPU backend does not run it")
    try:
        model = tiny_model(name)
    except Exception as error:
        pytest.skip(f"no tiny model of it can be made: {error}")
    if name in WHOLE:
        assert find_head(model) is None
    else:
        check_head(model)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_quantized_heads_keep_their_rows_exactly(name, bits, mode):
    model = tiny_model(name)
    nn.quantize(model, 32, bits, mode=mode)
    check_head(model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_heads_with_adapters(kind):
    model = tiny_model("llama")
    assert "lm_head" in model
    model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=True)
    add_adapters(model, kind)
    check_head(model)


def test_other_tokens_have_the_given_odds_against_all_kept_ones():
    model = tiny_model("llama")
    head, dense = find_head(model), model(TOKENS)
    rows = rows_of(head.size)
    others = np.setdiff1d(np.arange(head.size), rows)
    odds = np.full(head.size, 0.01 / len(others), np.float32)
    small = with_head(model, head, head.sliced(rows))
    probabilities = np.array(
        mx.softmax(BackedOffModel(small, rows, mx.array(np.log(odds)))(TOKENS), axis=-1)
    )
    assert np.allclose(probabilities[..., others], 0.01 / 1.01 / len(others), rtol=1e-4)
    kept = np.array(mx.softmax(dense[..., mx.array(rows)], axis=-1)) / 1.01
    assert np.allclose(probabilities[..., rows], kept, rtol=1e-4, atol=1e-7)


def test_a_head_that_is_not_one_layer_is_not_found():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.scale = nn.Embedding(16, 8), mx.ones((8, 16))

        def __call__(self, tokens):
            return self.embed(tokens) @ self.scale

    assert find_head(Sum()) is None


@pytest.mark.parametrize("rows", [[], [-1, 2], [1, 1], [0, 256]])
def test_rows_are_checked_on_the_host(rows):
    head = find_head(tiny_model("llama"))
    sliced = head.sliced(np.arange(2, dtype=np.int32))
    for slicing in (head.sliced, sliced.move):
        with pytest.raises(ValueError, match="indices must be"):
            slicing(np.array(rows, np.int32))


@pytest.mark.parametrize(
    ("architecture", "generation"),
    [("applegpu_g13g", 13), ("applegpu_g16s", 16), ("gfx942", 15), ("", 15)],
)
def test_the_generation_of_an_apple_gpu(monkeypatch, architecture, generation):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert head_module._apple_generation() == generation


@pytest.mark.parametrize("bits", [None, 4])
def test_several_rows_take_longer_than_one(bits):
    model = tiny_model("llama")
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    times = [find_head(model).time_of_rows(count) for count in (1, 2, 4, 6, 8)]
    assert times[0] == 1
    assert times == sorted(times)
    assert times[-1] == (8 if bits else pytest.approx(2.05))
