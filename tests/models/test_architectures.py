"""Every architecture of mlx-lm, as a tiny random model."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from glass_mlx import make_prompt_cache, stream_generate
from glass_mlx.models import find_ffns
from glass_mlx.models.__main__ import main, table
from glass_mlx.models.architectures import survey, tiny_model
from helpers import (
    FAST,
    check_invariants,
    check_statistics,
    letter_tokenizer,
    made_prior,
)

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21], [5, 4, 3, 2, 1, 0, 255]])
DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"

# mlx-lm 0.31, the last version for Python 3.10, has bugs of its own in some architectures.
pytestmark = [
    pytest.mark.usefixtures("working_olmo"),
    pytest.mark.skipif(
        version("mlx-lm").startswith("0.31."),
        reason="the architectures are tested from mlx-lm 0.32 on",
    ),
]

ARCHITECTURES = {a.architecture: a for a in survey()}
SUPPORTED = [a.architecture for a in ARCHITECTURES.values() if a.supported]

# MLX's CPU backend crashes in the attention of phi3small, and that of muse_spark needs Metal, so
# their FFNs are tested alone.
CRASHES, NEEDS_METAL = "phi3small", "muse_spark"

TESTED = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in SUPPORTED
    if name not in (CRASHES, NEEDS_METAL)
]

# More tokens than mlx-lm's stacks of experts compute without sorting them.
MANY_TOKENS = mx.array(np.random.default_rng(0).integers(0, 256, (2, 40)))


@pytest.mark.parametrize("name", TESTED)
def test_invariants(name):
    model = tiny_model(name)
    check_invariants(model, lambda m: m(TOKENS))
    check_statistics(model, TOKENS)


WITH_EXPERTS = [p for p in TESTED if "experts" in ARCHITECTURES[p.values[0]].ffn]


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_invariants_with_tokens_sorted_by_expert(name):
    """Chunks are too short to be sorted, so this compares both orders, too."""
    model = tiny_model(name)
    check_invariants(model, lambda m: m(MANY_TOKENS))
    check_statistics(model, MANY_TOKENS, [7] * 5 + [5])


def test_invariants_of_interleaved_ffns():
    model = tiny_model(CRASHES)
    x = mx.random.normal((2, 5, 64))
    check_invariants(model, lambda m: sum(layer.mlp(x) for layer in m.layers))


def test_invariants_of_experts_whose_model_needs_metal():
    model = tiny_model(NEEDS_METAL)
    x, experts = mx.random.normal((2, 5, 64)), mx.array([[0, 3], [1, 2], [2, 0], [3, 1], [1, 0]])
    experts = mx.broadcast_to(experts, (2, 5, 2))
    check_invariants(model, lambda m: sum(layer.mlp.experts(x, experts) for layer in m.layers))


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("max_kv_size", [None, 12])
def test_generation_with_every_kind_of_cache(name, max_kv_size):
    model, tokenizer, prompt = tiny_model(name), TokenizerWrapper(letter_tokenizer()), [1, 2, 3, 9]
    if max_kv_size and hasattr(model, "make_cache"):
        pytest.skip("mlx-lm ignores the size for a model that makes its own cache")
    options = {"max_tokens": 30, "max_kv_size": max_kv_size}

    def generate(density):
        cache = make_prompt_cache(model, max_kv_size)
        slicing = {"prior": made_prior(model), "warmup": 2, "refresh": 8, "prompt_cache": cache}
        responses = [
            *stream_generate(model, tokenizer, prompt, density=density, **options, **slicing)
        ]
        assert cache.tokens == prompt + [response.token for response in responses]
        assert len(responses) == 30
        glass = responses[-1].glass  # more selections where drafts pay, and tokens are missing
        assert glass.selections >= 4 if glass.drafts else glass.selections == 4
        return responses

    dense = mlx_lm.stream_generate(model, tokenizer, prompt, **options)
    # This density rounds to all neurons, but renewals still read tokens again.
    for ours, theirs in zip(generate(0.9999), dense, strict=True):
        assert ours.token == theirs.token
        assert mx.allclose(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-3)
    generate(0.5)


def test_most_architectures_are_supported():
    assert len(SUPPORTED) >= 115
    kinds = {a.architecture: a.ffn for a in ARCHITECTURES.values()}
    assert kinds["llama"] == "gated"
    assert kinds["gpt2"] == "plain"
    assert kinds["phi3"] == "gate and up in one, halves"
    assert kinds["phi3small"] == "gate and up in one, interleaved"
    assert kinds["deepseek_v3"] == "gated, gated experts"
    assert kinds["phixtral"] == "plain experts"
    assert kinds["gpt_oss"] == "gated experts"
    assert ARCHITECTURES["nemotron-nas"].sites == 2  # two of four layers have no FFN
    for name in ("bitnet", "prism_hadamard_qwen35", "mamba"):
        assert not ARCHITECTURES[name].supported
        assert ARCHITECTURES[name].reason


def test_unsupported_architectures_are_refused_with_the_reason():
    for name, reason in (
        ("bitnet", "normalises over all neurons"),
        ("prism_hadamard_qwen35", "rotates the neurons"),
        ("mamba", "no feed-forward network"),
    ):
        with pytest.raises(ValueError, match=reason):
            find_ffns(tiny_model(name))


def test_layers_that_mix_neurons_are_detected_from_their_outputs():
    """The first layer of gemma3n drops activations below a quantile of all neurons."""
    paths = [ffn.path for ffn in find_ffns(tiny_model("gemma3n"))]
    assert paths == [f"model.language_model.layers.{n}.mlp" for n in (1, 2, 3)]


def test_widths_may_differ_by_layer():
    widths = [ffn.width for ffn in find_ffns(tiny_model("openelm"))]
    assert widths == [64, 128, 192, 256]


def test_the_documentation_contains_the_table():
    documented = DOCS.read_text(encoding="utf-8")
    installed = version("mlx-lm")
    if f"mlx-lm {installed}:" not in documented:
        pytest.skip(f"the table in docs/architectures.md is not for mlx-lm {installed}")
    rows = [line for line in table([*ARCHITECTURES.values()]).splitlines() if line]
    # The documented table may come from an installation with more packages.
    rows = [row for row in rows if "no tiny model of it can be made" not in row]
    missing = [row for row in rows if row not in documented.splitlines()]
    assert not missing, "python -m glass_mlx.models makes the table"


def test_the_command_lists_architectures(monkeypatch, capsys):
    one = ARCHITECTURES["llama"]
    monkeypatch.setattr("glass_mlx.models.__main__.survey", lambda: iter([one]))
    monkeypatch.setattr("sys.argv", ["models", "--json"])
    main()
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {
        "architecture": "llama",
        "ffn": "gated",
        "sites": 4,
        "supported": True,
        "reason": "",
    }


@pytest.mark.slow
def test_the_command_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "glass_mlx.models"], capture_output=True, text=True, check=True
    )
    assert re.search(r"^\| llama \| gated \| 4 \| yes \|$", run.stdout, re.M)
    assert f"{len(SUPPORTED)} of {len(ARCHITECTURES)} can be sliced" in run.stdout
