"""Teacher-forced scores, compared with the engine."""

from glass_mlx import draft_shortlist, stream_generate
from glass_mlx.config import GlassConfig
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, Scores, divergence, score
from glass_mlx.kept_tokens import KeptTokens
from glass_mlx.models.architectures import tiny_model
from glass_mlx.sampling import make_sampler
from glass_mlx.session import Session
from helpers import made_prior, statistics_of

import mlx.core as mx
import numpy as np
import pytest

# With experts alone and beside shared ones, in a module that flattens tokens, and in a list.
MIXTURES = ("qwen3_moe", "deepseek_v3", "olmoe", "dbrx")
PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "olmo", *MIXTURES])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup": 12},
        {"warmup": 1},
        {"refresh": 0},
        {"dense_every": 0},
        {"vocabulary": 0.5},
        {"density": 1.0, "vocabulary": 0.25, "refresh": 8},
    ],
)
@pytest.mark.usefixtures("working_olmo")
def test_scores_match_generation_by_the_engine(tokenizer, kind, changes):
    """Teacher forcing on the engine's text gives the engine's log-probabilities."""
    model = tiny_model(kind)
    options = {"density": 0.5, "vocabulary": 1.0, "warmup": 3, "refresh": 4} | changes
    responses = list(
        stream_generate(model, tokenizer, PROMPT, max_tokens=30, prior=made_prior(model), **options)
    )
    text = Continuation(PROMPT, [r.token for r in responses])
    config = GlassConfig(**options)
    reading = DenseReading(model, text, [config.warmup])
    selector = reading.session.selector(config, made_prior(model), always=KeptTokens(tokenizer))
    scores = score(reading, selector)
    generated = [-r.logprobs[r.token].item() for r in responses[1:]]
    assert np.allclose(scores.nll, generated, atol=1e-4)
    assert scores.dense.tolist() == [r.glass.dense for r in responses[1:]]
    share = responses[-1].glass.sliced_bytes / responses[-1].glass.dense_bytes
    assert np.all(scores.bytes[scores.dense] == 1)
    assert scores.bytes[~scores.dense][-1] == pytest.approx(share)
    vocabulary = scores.vocabulary.get(max(scores.selections), 1.0)
    assert vocabulary == responses[-1].glass.vocabulary_got
    assert scores.dense.sum() + 1 == responses[-1].glass.dense_tokens
    assert len(scores.selections) == responses[-1].glass.selections
    last = scores.selections[max(scores.selections)]
    for path, kept in responses[-1].glass.selection.indices.items():
        assert np.array_equal(last.indices[path], kept)
    warmup = config.warmup - 1
    assert np.all(scores.kl[:warmup] == 0)
    assert np.all(scores.kl[warmup:][~scores.dense[warmup:]] > 0)
    # A later dense token sees what the sliced model left in the cache.
    assert np.median(scores.kl[scores.dense]) < np.median(scores.kl[~scores.dense])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "lfm2"])
@pytest.mark.parametrize(
    "changes", [{}, {"density": None}, {"refresh": 0}, {"dense_every": 0}, {"warmup": 12}]
)
def test_drafts_and_checks_read_what_they_read_in_the_engine(tokenizer, monkeypatch, kind, changes):
    monkeypatch.setattr(draft_shortlist, "_MAX_COST", np.inf)  # tiny models predict badly
    model = tiny_model(kind)
    tokenizer.eos_token_ids = []
    options = {"density": 0.5, "warmup": 3, "refresh": 8} | changes
    mx.random.seed(5)
    more = {"prior": made_prior(model), "sampler": make_sampler(1.0)}
    responses = list(stream_generate(model, tokenizer, PROMPT, 60, **more, **options))
    report, config = responses[-1].glass, GlassConfig(**options)
    text = Continuation(PROMPT, [r.token for r in responses])
    session = Session(model)
    selector = session.selector(config, made_prior(model), always=KeptTokens(tokenizer))
    scores = score(DenseReading(session, text, [selector.config.warmup]), selector)
    assert report.drafts > report.checked_tokens > 30  # some were wrong
    read = (1 + scores.bytes.sum()) * report.dense_bytes
    assert read == pytest.approx(report.read_bytes, rel=1e-4)
    assert scores.vocabulary[max(scores.vocabulary)] == report.vocabulary_got
    assert scores.dense.sum() + 1 == report.dense_tokens
    generated = [-r.logprobs[r.token].item() for r in responses[1:]]
    assert np.allclose(scores.nll, generated, atol=1e-4)


@pytest.mark.parametrize("prefill", [{}, {"prefill_step_size": 100}, {"prefill_step_size": 150}])
@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 1, "refresh": 0},
        {"warmup": 1, "refresh": 0, "statistic": "activation"},
        {"warmup": 9, "refresh": 10},
    ],
)
def test_selections_are_the_engine_s_for_long_prompts(tokenizer, prefill, changes):
    """In prefill the engine observes a sample of each chunk in the last FFN."""
    model = tiny_model("llama")
    prompt = np.random.default_rng(0).integers(2, 256, 333).tolist()
    options = {"density": 0.5, "prior_weight": 0.0} | changes
    responses = list(
        stream_generate(model, tokenizer, prompt, 24, prior=made_prior(model), **options, **prefill)
    )
    text, config = Continuation(prompt, [r.token for r in responses]), GlassConfig(**options)
    reading = DenseReading(model, text, [config.warmup], **prefill)
    selections = score(reading, reading.session.selector(config, made_prior(model))).selections
    assert len(selections) == responses[-1].glass.selections
    for point, selection in selections.items():
        expected = responses[point].glass.selection
        assert all(
            np.array_equal(kept, expected.indices[path]) for path, kept in selection.indices.items()
        )


def test_the_last_ffn_is_scored_on_the_sample_that_the_engine_observes():
    """Static methods on prompts of more than 128 tokens would select other neurons without it."""
    model = tiny_model("llama")
    prompt = np.random.default_rng(0).integers(2, 256, 333).tolist()
    text = Continuation(prompt, [5, 9, 77])
    all_tokens = statistics_of(model, [mx.array([prompt])], cached=True)["griffin"]
    last = [*all_tokens][-1]
    for step, is_sampled in ((2048, True), (128, False)):
        statistics = DenseReading(model, text, prefill_step_size=step).statistics().prompt
        scores = statistics.scores("griffin")
        for path, expected in all_tokens.items():
            equal = np.allclose(scores[path], expected, rtol=1e-4)
            assert equal != (is_sampled and path == last)
        # Every third of 332 tokens, and the last token, which is read alone.
        counts = {path: int(statistics.state()[f"{path}.tokens"][0]) for path in all_tokens}
        assert counts == dict.fromkeys(all_tokens, 333) | ({last: 112} if is_sampled else {})


def test_scores_with_all_neurons_equal_dense_scores():
    model = tiny_model("llama")
    text = Continuation(PROMPT, [5, 9, 77, 31, 5, 200])
    config = GlassConfig(density=1.0, warmup=3, refresh=4)
    reading = DenseReading(model, text, [3])
    selector = reading.session.selector(config, made_prior(model))
    scores, exact = score(reading, selector), Scores.exact(reading)
    assert np.allclose(scores.kl, 0, atol=1e-5)
    assert np.allclose(scores.nll, exact.nll, atol=1e-5)
    assert scores.agrees.all()


def test_a_dense_reading_has_statistics_at_each_point():
    model = tiny_model("llama")
    generated = [5, 9, 77, 31, 5, 200]
    reading = DenseReading(model, Continuation(PROMPT, generated), [1, 4])
    assert reading.statistics(1).text.tokens == 0
    assert reading.statistics(4).text.tokens == 3
    assert reading.oracle.tokens == reading.tokens == 5
    for point in (1, 4):
        tokens_read = PROMPT + generated[: point - 1]
        expected = statistics_of(model, [mx.array([tokens_read])], cached=True)["activation"]
        local = reading.statistics(point)
        for path, scores in expected.items():
            prompt, text = (
                part.scores("activation")[path] * part.tokens for part in (local.prompt, local.text)
            )
            assert np.allclose(prompt + text, scores * len(tokens_read), rtol=1e-5)


def test_divergence_equals_a_hand_computed_value():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(*map(mx.array, (np.log(p), np.log(q)))).item() == pytest.approx(expected)


def test_scores_may_be_against_another_model():
    model = tiny_model("llama")
    text = Continuation(PROMPT, [5, 9, 77, 31, 5, 200])
    own = DenseReading(model, text, [3])
    other = mx.roll(own.dense, 1, axis=-1)
    reading = DenseReading(model, text, [3], reference=other)
    assert np.allclose(Scores.exact(reading).kl, divergence(other, own.dense))
    selector = reading.session.selector(GlassConfig(density=1.0, warmup=3), made_prior(model))
    scores = score(reading, selector)
    assert np.allclose(scores.kl, divergence(other, own.dense), rtol=1e-3)
    assert not scores.agrees.all()
    assert np.allclose(scores.nll, Scores.exact(own).nll, rtol=1e-3)
