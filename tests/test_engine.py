import gc
import weakref
from types import SimpleNamespace

from glass_mlx import load, stream_generate
from glass_mlx.models.architectures import tiny_model
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import select
from glass_mlx.streaming import generate
from helpers import (
    letter_tokenizer,
    made_prior,
    masked_model,
    save_tiny_folder,
    snapshot,
    statistics_of,
)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


@pytest.fixture
def tokenizer():
    return TokenizerWrapper(letter_tokenizer(), NaiveStreamingDetokenizer)


@pytest.fixture
def model():
    return tiny_model("llama", seed=49)  # writes few tokens twice


# One selection, after the prompt.
STATIC = {"warmup": 1, "refresh": 0, "prior_weight": 0.5, "statistic": "activation"}


def run(model, tokenizer, prompt=PROMPT, n=12, **options):
    options = {"density": 0.5, "prior": made_prior(model)} | STATIC | options
    return list(stream_generate(model, tokenizer, prompt, max_tokens=n, **options))


def test_all_neurons_give_the_dense_tokens_and_logits_bit_for_bit(model, tokenizer):
    for temp in (0.0, 1.0):
        mx.random.seed(3)
        dense = list(
            mlx_lm.stream_generate(
                model, tokenizer, PROMPT, max_tokens=20, sampler=make_sampler(temp)
            )
        )
        mx.random.seed(3)
        ours = run(model, tokenizer, n=20, density=1.0, sampler=make_sampler(temp))
        assert [r.token for r in ours] == [r.token for r in dense]
        assert [r.text for r in ours] == [r.text for r in dense]
        for a, b in zip(ours, dense, strict=True):
            assert mx.array_equal(a.logprobs, b.logprobs)
        assert [r.finish_reason for r in ours] == [r.finish_reason for r in dense]
        assert [r.generation_tokens for r in ours] == [r.generation_tokens for r in dense]
        assert ours[-1].prompt_tokens == dense[-1].prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("statistic", ["activation", "griffin"])
@pytest.mark.parametrize("chunk", [2048, 3])
def test_it_decodes_with_the_fused_selection_of_the_prompt(model, tokenizer, statistic, chunk):
    """Against the method step by step: statistics, ranks, fusion, selection, masking."""
    prior = made_prior(model)
    prior.scores["griffin"] = made_prior(model, seed=5).scores["griffin"]
    local = statistics_of(model, [mx.array([PROMPT])], cached=True)[statistic]
    fused = {
        path: fuse(ranks(scores), ranks(prior.scores["griffin"][path]), 0.25)
        for path, scores in local.items()
    }
    expected = select(fused, 0.5, dict.fromkeys(fused, 32))
    masked, cache, tokens = masked_model(model, expected), make_prompt_cache(model), []
    logits = model(mx.array([PROMPT]), cache=cache)[0, -1]
    for _ in range(12):
        tokens.append(logits.argmax().item())
        logits = masked(mx.array([tokens[-1:]]), cache=cache)[0, -1]

    options = {
        "prior": prior,
        "prior_weight": 0.25,
        "statistic": statistic,
        "prefill_step_size": chunk,
    }
    responses = run(model, tokenizer, **options)
    assert [r.token for r in responses] == tokens
    for path, kept in expected.indices.items():
        assert np.array_equal(responses[-1].glass.selection.indices[path], kept)


def test_the_first_token_is_dense_and_the_report_says_so(model, tokenizer):
    first, *_, last = run(model, tokenizer)
    assert first.glass.density_got == 1.0
    assert first.glass.sliced_bytes == first.glass.dense_bytes
    assert last.glass.density == 0.5
    assert last.glass.density_got == 0.5
    ffn_bytes = 4 * 3 * 64 * 128 * 4
    assert last.glass.dense_bytes - last.glass.sliced_bytes == ffn_bytes // 2
    assert last.glass.prior_weight == 0.5
    assert last.glass.select_time > 0
    assert last.glass.slice_time > 0


def test_the_model_is_never_touched(model, tokenizer):
    before = snapshot(model)
    stream = stream_generate(model, tokenizer, PROMPT, prior=made_prior(model), density=0.5)
    for _ in range(3):
        next(stream)
        assert snapshot(model) == before  # in the middle of a generation, too
    stream.close()
    run(model, tokenizer)

    def fail(*_):
        raise RuntimeError("sampler")

    with pytest.raises(RuntimeError, match="sampler"):
        run(model, tokenizer, sampler=fail)
    assert snapshot(model) == before


def test_a_model_that_keeps_references_to_its_modules_is_refused(model, tokenizer):
    """Replaced modules would not be run, and the selection would be of nothing."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.run = model, model.__call__

        @property
        def layers(self):
            return model.layers

        def __call__(self, tokens, cache=None):
            return self.run(tokens, cache=cache)

    detached = Detached()
    with pytest.raises(ValueError, match="does not run the modules"):
        run(detached, tokenizer)


def test_options_may_be_none_as_in_mlx_lm(model, tokenizer):
    options = ("sampler", "logits_processors", "prompt_cache", "prompt_progress_callback")
    plain = run(model, tokenizer)
    options += ("down_policy",)
    ours = run(model, tokenizer, **dict.fromkeys(options), num_draft_tokens=3)
    assert [r.token for r in ours] == [r.token for r in plain]
    assert ours[-1].glass.prior == "given"


def test_two_generations_at_once_do_not_disturb_each_other(model, tokenizer):
    prompts, prior = ([1, 2, 3, 4], [250, 9, 77, 31, 5]), made_prior(model)
    alone = [[r.token for r in run(model, tokenizer, p, prior=prior)] for p in prompts]
    streams = [
        stream_generate(model, tokenizer, p, max_tokens=12, density=0.5, prior=prior, **STATIC)
        for p in prompts
    ]
    together = list(zip(*streams, strict=True))
    assert [[pair[i].token for pair in together] for i in range(2)] == alone


def test_one_token_uses_the_prior_alone(model, tokenizer):
    responses = run(model, tokenizer, prompt=[5], prior_weight=0.0)
    prior = made_prior(model).scores["activation"]
    expected = select(prior, 0.5, dict.fromkeys(prior, 32))
    assert responses[-1].glass.prior_weight == 1.0
    for path, kept in expected.indices.items():
        assert np.array_equal(responses[-1].glass.selection.indices[path], kept)
    with pytest.raises(ValueError, match="one token"):
        run(model, tokenizer, prompt=[5], prior=False)


def test_without_a_prior_the_prompt_decides(model, tokenizer):
    alone = run(model, tokenizer, prior=False)[-1].glass
    zero = run(model, tokenizer, prior_weight=0.0)[-1].glass
    assert (alone.prior, alone.prior_weight) == ("none", 0.0)
    for path, kept in zero.selection.indices.items():
        assert np.array_equal(alone.selection.indices[path], kept)


RENEWED = {"warmup": 3, "refresh": 4}
# From a token in the middle of a slice on, between two readings.
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(PROMPT) + 6}


@pytest.mark.parametrize("options", [{}, RENEWED])
def test_logits_processors_see_the_prompt_and_all_that_was_generated(model, tokenizer, options):
    seen = {}

    def record(tokens, logits):
        seen[len(tokens)] = tokens.tolist()
        return logits

    responses = run(model, tokenizer, n=20, logits_processors=[record], **options)
    tokens = [r.token for r in responses]
    known = seen[min(seen)]  # mlx-lm does not show all of a prompt that is read in chunks
    assert known[-1] == PROMPT[-1]
    for i in range(1, 20):
        assert seen[min(seen) + i] == known + tokens[:i]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options", [{}, RENEWED, RENEWED | QUANTIZED | {"quantized_kv_start": 0}, RENEWED | QUANTIZED]
)
def test_the_cache_ends_where_that_of_mlx_lm_does(tokenizer, kind, options):
    if kind == "gemma3_text" and "kv_bits" in options:
        pytest.skip("mlx-lm does not quantize rotating caches")
    model = tiny_model(kind, head_dim=32)
    for n in (2, 3, 4, 5, 8, 9, 20):
        cache = make_prompt_cache(model)
        responses = run(model, tokenizer, n=n, prompt_cache=cache, **options)
        assert len(responses) == n
        assert responses[-1].finish_reason == "length"
        assert {layer.offset for layer in cache} == {len(PROMPT) + n}


@pytest.mark.parametrize("end", range(14))
def test_an_end_of_sequence_is_in_the_cache_as_in_mlx_lm(model, tokenizer, end):
    tokens = [r.token for r in run(model, tokenizer, n=14, **RENEWED)]
    if tokens[end] in tokens[:end]:
        pytest.skip("the token comes earlier, too")
    tokenizer.eos_token_ids = {tokens[end]}
    cache = make_prompt_cache(model)
    responses = run(model, tokenizer, n=30, prompt_cache=cache, **RENEWED)
    assert [r.token for r in responses] == tokens[: end + 1]
    assert responses[-1].finish_reason == "stop"
    assert cache[0].offset == len(PROMPT) + end + 1


def test_renewal_counts_what_it_does(model, tokenizer):
    reports = [r.glass for r in run(model, tokenizer, n=20, **RENEWED)]
    # Dense are the warm-up of 3, and the tokens after 4, 8, 12 and 16 of them.
    assert [i for i, report in enumerate(reports) if report.dense] == [0, 1, 2, 4, 8, 12, 16]
    last = reports[-1]
    assert (last.dense_tokens, last.reread_tokens, last.selections) == (7, 1 + 3 * 3, 5)
    assert last.reread_time > 0
    assert reports[2].selection is None
    assert reports[3].selection is not None


def test_repetition_penalty_matches_mlx_lm(model, tokenizer):
    processors = make_logits_processors(repetition_penalty=1.5)
    dense = [
        r.token
        for r in mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=12, logits_processors=processors
        )
    ]
    processors = make_logits_processors(repetition_penalty=1.5)
    ours = run(model, tokenizer, density=1.0, logits_processors=processors)
    assert [r.token for r in ours] == dense


def test_generation_stops_at_eos(model, tokenizer):
    tokens = [r.token for r in run(model, tokenizer)]
    stop = next(i for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
    tokenizer.eos_token_ids = [tokens[stop]]
    responses = run(model, tokenizer)
    assert [r.token for r in responses] == tokens[: stop + 1]
    assert responses[-1].finish_reason == "stop"
    assert "".join(r.text for r in responses) == tokenizer.decode(tokens[:stop])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_generates_as_many_tokens_as_asked_for(model, tokenizer, n):
    responses = run(model, tokenizer, n=n)
    assert len(responses) == n
    assert responses[-1].finish_reason == "length"


def test_no_limit(model, tokenizer):
    stream = stream_generate(
        model, tokenizer, PROMPT, max_tokens=-1, prior=made_prior(model), density=0.5
    )
    assert [next(stream).finish_reason for _ in range(300)] == [None] * 300


@pytest.mark.parametrize(
    "options", [{"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}, {"max_kv_size": 8}]
)
def test_cache_options_are_passed_on(tokenizer, options):
    model = tiny_model("llama", head_dim=32)
    dense = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12, **options)
    ours = run(model, tokenizer, density=1.0, **options)
    assert [r.token for r in ours] == [r.token for r in dense]


def test_a_prompt_cache_goes_on_where_it_was(model, tokenizer):
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT[:6]]), cache=cache)
    ours = run(model, tokenizer, prompt=PROMPT[6:], density=1.0, prompt_cache=cache)
    whole = run(model, tokenizer, density=1.0)
    assert [r.token for r in ours] == [r.token for r in whole]


def test_progress_is_reported(model, tokenizer):
    calls = []
    run(
        model,
        tokenizer,
        prefill_step_size=4,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 10), (4, 10), (8, 10), (9, 10), (10, 10)]


def test_generate_returns_the_text_and_prints_statistics(model, tokenizer, capsys):
    text = generate(
        model,
        tokenizer,
        PROMPT,
        verbose=True,
        max_tokens=16,
        prior=made_prior(model),
        density=0.5,
        prior_weight=0.5,
        warmup=2,
        refresh=4,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] == "=" * 10
    assert lines[1] == text
    assert lines[3].startswith("Prompt: 10 tokens, ")
    assert lines[4].startswith("Generation: 16 tokens, ")
    assert lines[6].startswith("GLASS: density 0.500 (asked 0.5), λ 0.50, prior given, ")
    assert lines[7].startswith("GLASS: 5 tokens dense, 8 read again in ")
    assert "4 selections" in lines[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 2}, "density"),
        ({"prior_weight": -1}, "between 0 and 1"),
        ({"statistic": "mean"}, "statistic 'mean'"),
        ({"prior_statistic": "impact"}, "has no statistic"),
        ({"down_policy": "float"}, "down policy"),
        ({"prompt": []}, "prompt is empty"),
        ({"n": 0}, "must not be zero"),
        ({"draft_model": SimpleNamespace()}, "draft model"),
        ({"prior": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_bad_values_are_refused_before_anything_is_computed(model, tokenizer, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(model, tokenizer, **options)


def test_the_prior_ranks_by_a_statistic_of_its_own(model, tokenizer):
    prior = made_prior(model)
    other = {path: 1 - values for path, values in prior.scores["activation"].items()}
    prior.scores["impact"] = other

    def kept(**options):
        return run(model, tokenizer, n=2, prior=prior, prior_weight=1.0, **options)[-1].glass

    by_impact = kept(prior_statistic="impact")
    assert (by_impact.statistic, by_impact.prior_statistic) == ("activation", "impact")
    for path, indices in by_impact.selection.indices.items():
        assert set(indices) == set(np.argsort(other[path])[-64:])
        assert not set(indices) & set(kept().selection.indices[path])
    with pytest.raises(
        ValueError, match="has no statistic 'x'; it has activation, griffin, impact"
    ):
        kept(prior_statistic="x")


@pytest.mark.parametrize("quantization", [{}, {"group_size": 32, "bits": 4}])
@pytest.mark.parametrize("refresh", [0, 4])
def test_released_weights_are_freed_and_come_back(tmp_path, tokenizer, quantization, refresh):
    folder = save_tiny_folder(tmp_path / "tiny", **quantization)
    options = {"warmup": 3, "refresh": refresh}
    model, _ = load(str(folder))
    dense = model(mx.array([PROMPT]))
    expected = run(model, tokenizer, **options)
    # Not identities: a new array may have the address of one that was freed.
    held = {path: weakref.ref(a) for path, a in tree_flatten(model.parameters()) if "mlp" in path}
    loaded = []

    def reload():
        loaded.append(load(str(folder), lazy=True)[0])
        return loaded[-1]

    responses = run(model, tokenizer, reload=reload, **options)
    assert [r.token for r in responses] == [r.token for r in expected]
    now = {path for path, _ in tree_flatten(model.parameters()) if "mlp" in path}
    assert now == held.keys()
    assert not any(array() is not None for array in held.values())
    assert len(loaded) == responses[-1].glass.selections
    assert mx.array_equal(model(mx.array([PROMPT])), dense)


def test_less_is_held_when_dense_weights_are_released(tmp_path, tokenizer):
    folder = save_tiny_folder(tmp_path / "tiny")
    ffns = 4 * 3 * 64 * 128 * 4

    def held(**options):
        model, _ = load(str(folder))
        gc.collect()
        return run(model, tokenizer, **options)[-1].glass.held_bytes

    usual, released = held(), held(reload=lambda: load(str(folder), lazy=True)[0])
    assert usual - released == pytest.approx(ffns, rel=0.05)
