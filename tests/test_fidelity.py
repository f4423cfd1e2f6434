import json
from dataclasses import replace

from glass_mlx import stream_generate
from glass_mlx.fidelity import (
    Continuation,
    Reading,
    Scores,
    divergence,
    places,
    read_prompts,
    score,
    segments,
)
from glass_mlx.models.architectures import tiny_model
from glass_mlx.slicing import Slicing
from invariants import letter_tokenizer, statistics_of
from test_prior import made_prior

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


def settings(model, **changes):
    return Slicing(prior=made_prior(model), warmup=3, refresh=4, **changes)


def test_segments_follow_the_renewals_with_a_dense_token_between():
    slicing = Slicing(warmup=3, refresh=4)
    # Renewals at 4, 8, 12, 16, then every 8: 24, 32, 40, 48, then every 16.
    assert segments(slicing, 30) == [(3, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 30)]
    assert segments(Slicing(warmup=1, refresh=0), 30) == [(1, 30)]
    assert segments(Slicing(warmup=16, refresh=4), 24) == [(16, 24)]
    assert segments(slicing, 3) == []
    assert segments(slicing, 5) == [(3, 4)]
    assert segments(replace(slicing, density=1.0), 30) == [(3, 30)]
    assert places([slicing, Slicing(warmup=1, refresh=0)], 10) == [1, 3, 5, 9]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("changes", [{}, {"warmup": 12}, {"warmup": 1}, {"refresh": 0}])
def test_scores_are_what_the_engine_generates(kind, changes):
    """Teacher-forced on what the engine wrote, every log-probability is the engine's own."""
    model = tiny_model(kind)
    tokenizer = TokenizerWrapper(letter_tokenizer(), NaiveStreamingDetokenizer)
    options = {"density": 0.5, "warmup": 3, "refresh": 4, "mix": 0.5} | changes
    responses = list(
        stream_generate(model, tokenizer, PROMPT, max_tokens=30, prior=made_prior(model), **options)
    )
    text = Continuation(PROMPT, [r.token for r in responses])
    slicing = Slicing(prior=made_prior(model), **options)
    reading = Reading(model, text, places([slicing], 30))
    scores = score(reading, slicing)
    ours = [-r.logprobs[r.token].item() for r in responses[1:]]
    assert np.allclose(scores.nll, ours, atol=1e-4)
    assert scores.dense.tolist() == [r.glass.dense for r in responses[1:]]
    assert scores.reread == responses[-1].glass.reread_tokens
    assert scores.dense.sum() + 1 == responses[-1].glass.dense_tokens
    assert len(scores.selections) == responses[-1].glass.selections
    last = scores.selections[max(scores.selections)]
    for path, kept in responses[-1].glass.selection.indices.items():
        assert np.array_equal(last.indices[path], kept)
    assert np.all(scores.kl[scores.dense] == 0)
    assert np.all(scores.kl[~scores.dense] > 0)


def test_all_neurons_are_the_dense_model():
    model = tiny_model("llama")
    text = Continuation(PROMPT, [5, 9, 77, 31, 5, 200])
    slicing = settings(model, density=1.0)
    reading = Reading(model, text, places([slicing], 6))
    scores, exact = score(reading, slicing), Scores.exact(reading)
    assert np.allclose(scores.kl, 0, atol=1e-5)
    assert np.allclose(scores.nll, exact.nll, atol=1e-5)
    assert scores.agrees.all()


def test_a_reading_knows_what_was_seen_at_each_place():
    model = tiny_model("llama")
    written = [5, 9, 77, 31, 5, 200]
    reading = Reading(model, Continuation(PROMPT, written), [1, 4])
    assert reading.evidence(1).text.tokens == 0
    assert reading.evidence(4).text.tokens == 3
    assert reading.oracle.tokens == reading.tokens == 5
    for place in (1, 4):
        whole = PROMPT + written[: place - 1]
        seen = statistics_of(model, [mx.array([whole])], cached=True)["activation"]
        evidence = reading.evidence(place)
        for path, scores in seen.items():
            prompt, text = (
                part.scores("activation")[path] * part.tokens
                for part in (evidence.prompt, evidence.text)
            )
            assert np.allclose(prompt + text, scores * len(whole), rtol=1e-5)


def test_divergence_by_hand():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(*map(mx.array, (np.log(p), np.log(q)))).item() == pytest.approx(expected)


def test_prompts_are_read_from_text_and_jsonl(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [m[0]["content"] for m in read_prompts(text)] == ["one", "two"]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    assert read_prompts(lines) == [[{"role": "user", "content": "one"}], chat]


@pytest.mark.parametrize(
    "content", ["{", '{"text": "no"}', "[1]", '{"messages": []}', '{"messages": [{"role": 1}]}', ""]
)
def test_bad_prompts_are_refused(tmp_path, content):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"prompts"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="no prompts"):
        read_prompts(tmp_path / "none")
