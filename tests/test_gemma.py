"""A real model of another family: GeGLU, sliding windows, tied and scaled embeddings.

The Gemma terms of use apply, so tests never download it; tools/research/fetch_gemma.py does.
"""

from glass_mlx import load, stream_generate
from glass_mlx.models import find_ffns
from helpers import check_invariants, check_statistics, made_prior

import mlx.core as mx
import mlx_lm
import pytest
from fetch_gemma import gemma_gguf


@pytest.fixture(scope="module")
def gemma():
    if not gemma_gguf().is_file():
        pytest.skip("Gemma 3 270M is missing; python tools/research/fetch_gemma.py downloads it")
    return load(str(gemma_gguf()), dtype="float32", dequantize=True)


def test_invariants(gemma):
    model, tokenizer = gemma
    ffns = find_ffns(model)
    assert [(ffn.kind, ffn.width) for ffn in ffns] == [("gated", 2048)] * 18
    tokens = mx.array([tokenizer.encode("The quick brown fox jumps over the lazy dog and")])
    check_invariants(model, lambda m: m(tokens))
    check_statistics(model, tokens)


def test_generation(gemma):
    model, tokenizer = gemma
    prompt, options = "The capital of France is", {"max_tokens": 24}
    dense = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, **options)]
    options |= {"prior": made_prior(model), "warmup": 4, "refresh": 8}
    # First keep all neurons, with tokens read again at renewals; then slice.
    responses = list(stream_generate(model, tokenizer, prompt, density=0.9999, **options))
    assert [r.token for r in responses] == dense
    assert "France" in "".join(r.text for r in responses)
    *_, last = stream_generate(model, tokenizer, prompt, density=0.5, **options)
    assert last.glass.density_got == 0.5
    assert last.glass.selections == 3
