"""Conversations that continue from a prompt cache: in Python, in files and across commands."""

import copy
import itertools
import json
import os
import re
import sys
from functools import partial

from glass_mlx import (
    PromptCache,
    load_prompt_cache,
    make_prompt_cache,
    memory,
    save_prompt_cache,
    stream_generate,
    trim_prompt_cache,
)
from glass_mlx.cache_prompt import main as cache_prompt
from glass_mlx.chat_templates import encode, encode_beginning, encode_rest
from glass_mlx.conversation import Conversation
from glass_mlx.decoding import Decoder
from glass_mlx.generate.__main__ import main as generate
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prompt_cache import read_prompt
from glass_mlx.streaming import generate as sliced_generate
from glass_mlx.vocabulary import Shortlister
from helpers import (
    CHAT_TEMPLATE,
    chat_tokenizer,
    letter_tokenizer,
    made_prior,
    save_chat_folder,
)

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

FIRST, SECOND = [1, 7, 3, 200, 9, 54, 21], [8, 31, 77, 5]
RENEWAL = {"density": 0.5, "warmup": 3, "refresh": 4}


@pytest.fixture
def model():
    return tiny_model("llama", seed=49)


def turn(model, tokenizer, prompt, cache, n=13, **options):
    options = {"prior": made_prior(model)} | RENEWAL | options
    return list(stream_generate(model, tokenizer, prompt, n, prompt_cache=cache, **options))


def equal(a, b):
    """Return whether two local statistics are equal."""
    for one, two in ((a.prompt, b.prompt), (a.text, b.text)):
        one, two = one.state(), two.state()
        assert one.keys() == two.keys()
        if not all(np.array_equal(one[key], two[key]) for key in one):
            return False
    one, two = a.vocabulary.state(), b.vocabulary.state()
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_a_second_turn_reads_only_new_tokens(model, tokenizer):
    cache = make_prompt_cache(model)
    first = [r.token for r in turn(model, tokenizer, FIRST, cache, density=1.0)]
    second = turn(model, tokenizer, SECOND, cache, density=1.0)
    assert cache.tokens == [*FIRST, *first, *SECOND, *(r.token for r in second)]
    assert second[0].prompt_tokens == len(SECOND)
    whole = mlx_lm.stream_generate(model, tokenizer, [*FIRST, *first, *SECOND], 13)
    assert [r.token for r in second] == [r.token for r in whole]


def test_selection_uses_all_turns(model, tokenizer):
    """Dense prefill in two turns gives the same selection as prefill at once."""
    cache, options = make_prompt_cache(model), {"warmup": 1, "refresh": 0, "prior_weight": 0.0}
    read_prompt(model, FIRST, cache, lambda done, total: None)
    assert cache.statistics.prompt.tokens == len(FIRST)
    turns = turn(model, tokenizer, SECOND, cache, **options)[-1].glass.selection
    whole = turn(model, tokenizer, FIRST + SECOND, None, **options)[-1].glass.selection
    last = turn(model, tokenizer, SECOND, None, **options)[-1].glass.selection
    assert all(np.array_equal(turns.indices[path], whole.indices[path]) for path in whole.indices)
    assert any(
        not np.array_equal(last.indices[path], whole.indices[path]) for path in whole.indices
    )


@pytest.mark.parametrize("trimmed", [0, 2, 6, 9])
def test_turns_at_a_bound_of_0_observe_no_neurons(model, tokenizer, trimmed):
    cache = make_prompt_cache(model)
    exact = {"density": None, "warmup": 16, "refresh": None, "max_kl": 0}
    assert turn(model, tokenizer, FIRST, cache, n=5, **exact)[-1].glass.selection is None
    assert (cache.statistics.prompt.tokens, cache.statistics.text.tokens) == (0, 0)
    assert len(cache.tokens) == len(FIRST) + 5
    assert trim_prompt_cache(cache, trimmed) == trimmed
    assert turn(model, tokenizer, SECOND, cache)[-1].glass.density_got == 0.5
    assert cache.statistics.prompt.tokens == len(SECOND)
    assert 3 <= cache.statistics.text.tokens < 13
    # The other way round, what was observed stays.
    turn(model, tokenizer, FIRST, cache, n=5, **exact)
    assert cache.statistics.prompt.tokens == len(SECOND)
    trim_prompt_cache(cache, 5 + len(FIRST) + 13)
    assert cache.statistics.text.tokens == 0


def test_tokens_of_all_turns_stay_in_the_shortlist(model, tokenizer, monkeypatch):
    chosen = []

    def choose(shortlister, text, original=Shortlister.choose):
        chosen.append(original(shortlister, text))
        return chosen[-1]

    monkeypatch.setattr(Shortlister, "choose", choose)
    cache = make_prompt_cache(model)
    options = {"density": 1.0, "vocabulary": 0.1, "prior": False}
    turn(model, tokenizer, FIRST, cache, **options)
    turn(model, tokenizer, SECOND, cache, **options)
    assert chosen[-1].share < 1
    assert {*cache.tokens} - {cache.tokens[-1]} <= {*chosen[-1].rows.tolist()}


@pytest.mark.parametrize("end", [1, 2, 5])
def test_a_generation_closed_early_leaves_a_usable_cache(model, tokenizer, end):
    cache = make_prompt_cache(model)
    stream = stream_generate(
        model, tokenizer, FIRST, 20, prompt_cache=cache, prior=made_prior(model), **RENEWAL
    )
    tokens = [next(stream).token for _ in range(end)]
    stream.close()
    assert cache.tokens == FIRST + tokens
    assert {layer.offset for layer in cache} == {len(cache.tokens)}


def test_a_saved_conversation_continues_like_one_in_memory(model, tokenizer, tmp_path):
    cache, file = make_prompt_cache(model), tmp_path / "talk.safetensors"
    turn(model, tokenizer, FIRST, cache)
    save_prompt_cache(file, cache, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata["model"] == "tiny"
    assert loaded.tokens == cache.tokens
    assert equal(loaded.statistics, cache.statistics)
    assert (
        loaded.statistics.text.mean_outputs().keys() == cache.statistics.text.mean_outputs().keys()
    )
    from_file, in_memory = (turn(model, tokenizer, SECOND, c) for c in (loaded, cache))
    assert [r.token for r in from_file] == [r.token for r in in_memory]
    assert equal(loaded.statistics, cache.statistics)


def test_prompt_cache_files_are_exchangeable_with_mlx_lm(model, tokenizer, tmp_path):
    cache, file = make_prompt_cache(model), str(tmp_path / "talk.safetensors")
    turn(model, tokenizer, FIRST, cache)
    save_prompt_cache(file, cache)
    plain_cache = mlx_lm_cache.load_prompt_cache(file)
    assert [layer.offset for layer in plain_cache] == [layer.offset for layer in cache]
    mlx_lm_cache.save_prompt_cache(file, plain_cache)
    reloaded = load_prompt_cache(file)
    assert reloaded.statistics is None
    turn(model, tokenizer, SECOND, reloaded)
    assert reloaded.statistics.prompt.tokens == len(SECOND)
    save_prompt_cache(file, reloaded)
    assert equal(load_prompt_cache(file).statistics, reloaded.statistics)


def test_mismatched_files_are_refused(model, tokenizer, tmp_path):
    cache = make_prompt_cache(model)
    for n, name in enumerate("ab"):
        turn(model, tokenizer, FIRST, cache, n=n + 3)
        save_prompt_cache(tmp_path / f"{name}.safetensors", cache)
    file, statistics_file = tmp_path / "a.safetensors", tmp_path / "a.glass.safetensors"
    statistics_file.write_bytes((tmp_path / "b.glass.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not belong to this prompt cache"):
        load_prompt_cache(file)
    statistics_file.write_bytes(statistics_file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_prompt_cache(file)
    statistics_file.unlink()
    with pytest.raises(ValueError, match="statistics of the prompt cache are missing"):
        load_prompt_cache(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a prompt cache"):
        load_prompt_cache(file)
    with pytest.raises(FileNotFoundError, match="no prompt cache at"):
        load_prompt_cache(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="must have a name that ends in"):
        save_prompt_cache(tmp_path / "talk", cache)


def test_a_cache_is_refused_after_an_error(model, tokenizer):
    def fail(done, total):
        raise RuntimeError

    cache = make_prompt_cache(model)
    with pytest.raises(RuntimeError):
        turn(model, tokenizer, FIRST, cache, prompt_progress_callback=fail)
    with pytest.raises(ValueError, match="left in the middle"):
        turn(model, tokenizer, FIRST, cache)


def fail_at(count):
    """Return a sampler that raises an error when it samples for the n-th time."""
    calls = itertools.count(1)

    def sampler(logprobs):
        if next(calls) == count:
            raise RuntimeError("sampler")
        return mx.argmax(logprobs, axis=-1)

    return sampler


# In prefill, in the warm-up, in a sliced stretch, while text is read again, and after that.
@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_a_cache_that_an_error_left_is_neither_saved_nor_used_nor_good_as_a_copy(
    model, tokenizer, tmp_path, count
):
    cache, file = make_prompt_cache(model), tmp_path / "talk.safetensors"
    turn(model, tokenizer, SECOND, cache)
    save_prompt_cache(file, cache)
    before, expected = copy.deepcopy(cache), load_prompt_cache(file)
    with pytest.raises(RuntimeError, match="sampler"):
        turn(model, tokenizer, FIRST, cache, sampler=fail_at(count))
    for broken in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="left in the middle of a step; it cannot be saved"):
            save_prompt_cache(file, broken)
        with pytest.raises(ValueError, match="left in the middle of a step; begin a new one"):
            turn(model, tokenizer, FIRST, broken)
    # The file and the copy from before the error are good.
    assert load_prompt_cache(file).tokens == before.tokens == expected.tokens
    assert equal(before.statistics, expected.statistics)
    one, two = (turn(model, tokenizer, FIRST, good) for good in (before, expected))
    assert [r.token for r in one] == [r.token for r in two]


def test_questions_can_be_asked_of_copies_of_a_cache(model, tokenizer):
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    tokens, offset = list(cache.tokens), cache[0].offset
    answers = [
        [r.token for r in turn(model, tokenizer, SECOND, copy.deepcopy(cache))] for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert (cache.tokens, cache[0].offset) == (tokens, offset)
    assert [r.token for r in turn(model, tokenizer, SECOND, cache)] == answers[0]


def both(tokens):
    """Return the token counts of local statistics."""
    return tokens.prompt.tokens, tokens.text.tokens


def two_turns(model, tokenizer):
    """Return a cache after two turns of 7 + 13 and 4 + 13 tokens, and states between them."""
    cache, states = make_prompt_cache(model), {}

    def progress(tokens_read, total):
        if tokens_read == total - 1:
            states[start + tokens_read] = cache._statistics.copy()

    for prompt in (FIRST, SECOND):
        start = len(cache.tokens)
        states[start] = cache.statistics.copy()
        options = {"prior": made_prior(model), "prompt_progress_callback": progress} | RENEWAL
        stream = stream_generate(model, tokenizer, prompt, 13, prompt_cache=cache, **options)
        next(stream)
        read = cache._statistics.copy()  # the first token is not read yet
        stream_end = [*stream]
        assert len(stream_end) == 12
        states[len(cache.tokens) - 13] = read
    states[len(cache.tokens)] = cache.statistics.copy()
    return cache, states


@pytest.mark.parametrize("trim", [trim_prompt_cache, mlx_lm_cache.trim_prompt_cache])
@pytest.mark.parametrize("how", ["in memory", "from a file", "a copy"])
@pytest.mark.parametrize(
    ("remaining", "known"),
    [
        *((37, 37), (36, 24), (24, 24), (23, 23), (22, 20), (20, 20)),
        *((19, 7), (7, 7), (6, 6), (5, 0), (1, 0), (0, 0)),
    ],
)
def test_tokens_and_statistics_follow_trimming(
    model, tokenizer, tmp_path, trim, how, remaining, known
):
    cache, states = two_turns(model, tokenizer)
    assert [*states] == [0, 6, 7, 20, 23, 24, 37]
    tokens = [*cache.tokens]
    if how == "a copy":
        original, cache = cache, copy.deepcopy(cache)
    elif how == "from a file":
        save_prompt_cache(tmp_path / "talk.safetensors", cache)
        cache = load_prompt_cache(tmp_path / "talk.safetensors")
        # A file has the beginning of the last turn alone.
        known = {23: 20, 7: 0, 6: 0}.get(known, known)
    trim(cache, 37 - remaining)
    assert cache.tokens == tokens[:remaining]
    assert {layer.offset for layer in cache} == {remaining}
    assert equal(cache.statistics, states[known])
    if how == "a copy":
        assert original.tokens == tokens
        assert equal(original.statistics, states[37])


def test_trimming_step_by_step_gives_the_same_statistics(model, tokenizer):
    cache, states = two_turns(model, tokenizer)
    steps = [(1, 24), (11, 24), (2, 23), (2, 20), (2, 7), (11, 7), (1, 7), (1, 6), (1, 0)]
    for count, known in steps:
        trim_prompt_cache(cache, count)
        assert equal(cache.statistics, states[known])
    assert len(cache.tokens) == 5


def test_an_answer_of_one_token_is_no_part_of_the_prompt(model, tokenizer):
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache, n=1)
    assert both(cache.statistics) == (len(FIRST), 0)
    assert {layer.offset for layer in cache} == {len(cache.tokens)} == {len(FIRST) + 1}


def test_a_trimmed_cache_continues_as_if_it_had_never_had_the_tokens(model, tokenizer):
    trimmed, untouched = make_prompt_cache(model), make_prompt_cache(model)
    for cache in (trimmed, untouched):
        turn(model, tokenizer, FIRST, cache)
    turn(model, tokenizer, [9, 9, 9, 200, 17], trimmed)
    assert trim_prompt_cache(trimmed, 18) == 18
    one, two = (turn(model, tokenizer, SECOND, cache) for cache in (trimmed, untouched))
    assert [r.token for r in one] == [r.token for r in two]
    assert trimmed.tokens == untouched.tokens
    assert equal(trimmed.statistics, untouched.statistics)


def test_a_prompt_that_is_given_again_gets_the_same_answer(model, tokenizer):
    """A server finds the prompt in a longer cache and trims all but its last token."""
    cache = make_prompt_cache(model)
    turn(model, tokenizer, SECOND, cache)
    start = len(cache.tokens)
    answer = turn(model, tokenizer, FIRST, cache)
    trim_prompt_cache(cache, len(cache.tokens) - start - len(FIRST) + 1)
    again = turn(model, tokenizer, FIRST[-1:], cache)
    assert again[0].prompt_tokens == 1
    assert [r.token for r in again] == [r.token for r in answer]
    kept, kept_again = answer[-1].glass.selection.indices, again[-1].glass.selection.indices
    assert all(np.array_equal(kept[path], kept_again[path]) for path in kept)


def test_messages_read_only_what_is_new(model):
    tokenizer, cache = chat_tokenizer(), make_prompt_cache(model)
    options = {"density": 1.0, "prior": False, "prompt_cache": cache}
    messages = [{"role": "user", "content": "丁七"}]
    expected = encode(tokenizer, messages)
    first = [*stream_generate(model, tokenizer, None, 8, messages=messages, **options)]
    assert first[0].prompt_tokens == len(expected)
    assert cache.tokens[: len(expected)] == expected
    answer = "".join(response.text for response in first)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "丂"}]
    text = sliced_generate(model, tokenizer, max_tokens=8, messages=messages, **options)
    expected = encode(tokenizer, messages)
    assert cache.tokens[: len(expected)] == expected
    whole = sliced_generate(model, tokenizer, expected, max_tokens=8, density=1.0, prior=False)
    assert text == whole

    # Another continuation trims the cache.
    messages[-1] = {"role": "user", "content": "丄"}
    (response,) = stream_generate(model, tokenizer, None, 1, messages=messages, **options)
    assert response.prompt_tokens == 3
    assert cache.tokens[: len(expected)] == encode(tokenizer, messages)


def test_messages_are_checked(model):
    tokenizer, messages = chat_tokenizer(), [{"role": "user", "content": "丁七"}]
    generate = partial(stream_generate, model, tokenizer, prior=False)
    with pytest.raises(ValueError, match="give either a prompt or messages"):
        generate("丁七", messages=messages)
    with pytest.raises(ValueError, match="give either a prompt or messages"):
        generate()
    for bad in ([], ["丁"], [{"role": "user"}]):
        with pytest.raises(ValueError, match="must be a list of roles and contents"):
            generate(messages=bad)
    with pytest.raises(ValueError, match="make the prompt cache with glass_mlx"):
        generate(messages=messages, prompt_cache=mlx_lm_cache.make_prompt_cache(model))
    rotating = PromptCache([RotatingKVCache(8) for _ in model.layers], None)
    for _ in generate([5] * 20, 3, prompt_cache=rotating):
        pass
    with pytest.raises(ValueError, match="that cannot be trimmed; make a new one"):
        generate(messages=messages, prompt_cache=rotating)


def test_a_cache_that_cannot_be_trimmed_stays_as_it_is(tokenizer):
    model = tiny_model("gemma3_text")  # with a window of 8 tokens
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    tokens, statistics = [*cache.tokens], cache.statistics.copy()
    assert trim_prompt_cache(cache, 3) == 0
    assert cache.tokens == tokens
    assert equal(cache.statistics, statistics)


def test_tokens_that_another_program_read_are_not_taken_for_known_ones(model, tokenizer, tmp_path):
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    tokens = [*cache.tokens]
    model(mx.array([[5, 6, 7]]), cache=cache)
    for use in (
        lambda: turn(model, tokenizer, SECOND, cache),
        lambda: save_prompt_cache(tmp_path / "talk.safetensors", cache),
    ):
        with pytest.raises(ValueError, match="has 3 tokens that glass_mlx did not read"):
            use()
    assert not [*tmp_path.iterdir()]
    trim_prompt_cache(cache, 3)
    assert cache.tokens == tokens
    turn(model, tokenizer, SECOND, cache)
    assert len(cache.tokens) == len(tokens) + 4 + 13


def test_tokens_of_a_cache_from_mlx_lm_can_be_trimmed(model, tokenizer, tmp_path):
    file, plain = tmp_path / "talk.safetensors", mlx_lm_cache.make_prompt_cache(model)
    model(mx.array([FIRST]), cache=plain)
    mlx_lm_cache.save_prompt_cache(str(file), plain, {})
    cache = load_prompt_cache(file)
    answer = [r.token for r in turn(model, tokenizer, SECOND, cache)]
    trim_prompt_cache(cache, 10)
    assert cache.tokens == SECOND + answer[:3]
    assert both(cache.statistics) == (len(SECOND), 0)
    trim_prompt_cache(cache, 10)  # some that were read before
    assert cache.tokens == []
    assert both(cache.statistics) == (0, 0)
    turn(model, tokenizer, SECOND, cache)
    assert {layer.offset for layer in cache} == {4 + 4 + 13}


def test_a_prompt_of_embeddings_has_no_tokens(model, tokenizer):
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    embeddings = model.model.embed_tokens(mx.array(SECOND))
    answer = turn(model, tokenizer, [], cache, input_embeddings=embeddings)
    assert cache.tokens == [r.token for r in answer]
    turn(model, tokenizer, SECOND, cache)
    assert len(cache.tokens) == 13 + 4 + 13
    trim_prompt_cache(cache, 17)
    assert cache.tokens == [r.token for r in answer]


def test_layers_without_attention_do_not_count(model, tokenizer):
    """nemotron-nas has such layers. mlx-lm gives them caches that stay empty."""
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    with_empty = PromptCache([KVCache(), *cache], cache.statistics, cache.tokens)
    assert with_empty.tokens == cache.tokens
    mlx_lm_cache.trim_prompt_cache(with_empty, 3)
    assert with_empty.tokens == cache.tokens
    assert len(cache.tokens) == len(FIRST) + 13 - 3


def test_the_statistics_of_the_latest_turns_are_kept(model, tokenizer):
    cache = make_prompt_cache(model)
    for _ in range(6):
        turn(model, tokenizer, [5], cache, n=2)
    assert [one.start for one in cache.turns] == [6, 9, 12, 15]


@pytest.mark.parametrize("make", [make_prompt_cache, mlx_lm_cache.make_prompt_cache])
def test_a_cache_with_other_layers_is_refused(model, tokenizer, make):
    for other, has in (
        (tiny_model("qwen3", num_hidden_layers=3), "3 layers (keys and values)"),
        (tiny_model("falcon_h1"), "4 layers (CacheList)"),
    ):
        message = re.escape(f"it has {has}, and the model needs 4 layers (keys and values)")
        with pytest.raises(ValueError, match=message):
            turn(model, tokenizer, FIRST, make(other))


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_a_saved_conversation_follows_the_umask(model, tmp_path, umask, mode):
    cache = make_prompt_cache(model)
    read_prompt(model, FIRST, cache)
    before = os.umask(umask)
    try:
        save_prompt_cache(tmp_path / "talk.safetensors", cache)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


def test_an_error_while_closing_a_generation_reaches_the_caller(model, tokenizer, monkeypatch):
    def fail(self, token):
        raise RuntimeError("read")

    cache = make_prompt_cache(model)
    stream = stream_generate(
        model, tokenizer, FIRST, 20, prompt_cache=cache, prior=made_prior(model), **RENEWAL
    )
    next(stream)  # the last token before a change of models has not been read yet
    monkeypatch.setattr(Decoder, "_read", fail)
    with pytest.raises(RuntimeError, match="read"):
        stream.close()
    assert not cache.intact


def test_a_failed_save_keeps_both_files(model, tokenizer, tmp_path, monkeypatch):
    cache, file = make_prompt_cache(model), tmp_path / "talk.safetensors"
    turn(model, tokenizer, FIRST, cache)
    save_prompt_cache(file, cache)
    turn(model, tokenizer, SECOND, cache)

    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(mlx_lm_cache, "save_prompt_cache", fail)
    with pytest.raises(OSError, match="cannot be written: no space left"):
        save_prompt_cache(file, cache)
    assert len(load_prompt_cache(file).tokens) == len(FIRST) + 13


def test_statistics_of_another_model_are_refused(model, tokenizer):
    for changes in ({"intermediate_size": 96}, {"vocab_size": 320}):
        other = tiny_model("llama", **changes)
        cache = make_prompt_cache(other)
        turn(other, tokenizer, FIRST, cache, density=0.5, vocabulary=0.5)
        with pytest.raises(ValueError, match="of another model"):
            turn(model, tokenizer, SECOND, cache, density=0.5, vocabulary=0.5)


def test_encode_rest_continues_the_encoded_beginning():
    tokenizer = chat_tokenizer()
    message = {"role": "user", "content": "丁七"}
    rest = encode_rest(tokenizer, [message])
    assert encode_beginning(tokenizer, "丄") + rest == encode(
        tokenizer, [message | {"content": "丄丁七"}]
    )
    answer = {"role": "assistant", "content": "丈"}
    assert encode_rest(tokenizer, [message, answer]) == tokenizer.encode("丁七不下丈")
    plain = TokenizerWrapper(letter_tokenizer())
    assert encode_rest(plain, [message]) == plain.encode("丁七")
    tokenizer.chat_template = "上"
    with pytest.raises(ValueError, match="does not show the user's message"):
        encode_rest(tokenizer, [message])


@pytest.mark.parametrize("name", ["talk.safetensors", "talk.glass.safetensors"])
def test_damaged_files_are_refused(model, tokenizer, tmp_path, name):
    """Every changed byte is noticed, or does not matter."""
    cache, good = make_prompt_cache(model), tmp_path / "talk.safetensors"
    turn(model, tokenizer, FIRST, cache)
    save_prompt_cache(good, cache, {"model": "tiny"})
    file = tmp_path / name
    data, generator = file.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    expected = load_prompt_cache(good)
    places = [*generator.integers(0, header, 60), *generator.integers(header, len(data), 40)]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << generator.integers(8)
        file.write_bytes(changed)
        try:
            loaded = load_prompt_cache(good)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert place < header  # such as another name in the metadata
        for one, two in zip(loaded, expected, strict=True):
            assert one.offset == two.offset
            assert all(map(mx.array_equal, one.state[:2], two.state[:2]))
    assert refused > 60
    for length in (0, 7, 100, header, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=file.name):
            load_prompt_cache(good)


def test_a_cache_in_bfloat16_is_checked_too(tokenizer, tmp_path):
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    cache, file = make_prompt_cache(model), tmp_path / "talk.safetensors"
    turn(model, tokenizer, FIRST, cache)
    save_prompt_cache(file, cache)
    assert load_prompt_cache(file).tokens == cache.tokens
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_prompt_cache(file)


@pytest.fixture
def folder(tmp_path):
    return save_chat_folder(tmp_path / "tiny")


def answer(out):
    return out.split("\n")[1]


def test_one_cached_prompt_serves_many_questions(run_command, folder, tmp_path):
    file = tmp_path / "prompt.safetensors"
    arguments = ("--model", folder, "--prompt-cache-file", file)
    code, out, _ = run_command(cache_prompt, *arguments, "--prompt", "丁七丄丈三")
    assert code == 0
    assert out.startswith(f"{file}: 6 tokens")
    before = file.read_bytes()
    for question in ("丙丄", "业"):
        options = ("-m", 9, "--density", 0.5, "--warmup", 1, "--refresh", 0)
        code, with_cache, _ = run_command(
            generate, "--prompt-cache-file", file, "--prompt", question, *options
        )
        assert code == 0
        full_prompt = ("--model", folder, "--prompt", f"丁七丄丈三{question}")
        _, without_cache, _ = run_command(generate, *full_prompt, *options)
        assert answer(with_cache) == answer(without_cache)
        assert f"Prompt: {len(question) + 2} tokens" in with_cache
    assert file.read_bytes() == before


def test_a_conversation_can_start_from_a_cached_prompt(run_command, folder, tmp_path):
    file, talk = tmp_path / "prompt.safetensors", tmp_path / "talk.safetensors"
    arguments = ("--model", folder, "--prompt-cache-file", file)
    run_command(cache_prompt, *arguments, "--prompt", "丁七丄丈三")
    options = ("-m", 6, "--density", 1, "--save-prompt-cache", talk)
    _, first, _ = run_command(generate, "--prompt-cache-file", file, "-p", "丙丄", *options)
    code, second, _ = run_command(generate, "--prompt-cache-file", talk, "-p", "业", *options)
    assert code == 0
    cache, metadata = load_prompt_cache(talk, return_metadata=True)
    chat = json.loads(metadata["messages"])
    assert [m["content"] for m in chat] == ["丁七丄丈三丙丄", answer(first), "业", answer(second)]
    tokens = encode(chat_tokenizer(), chat[:-1])
    assert cache.tokens[: len(tokens)] == tokens
    assert cache.statistics.prompt.tokens <= len(tokens) - len(answer(first))  # none counts twice


def test_messages_are_not_read_after_tokens_that_are_not_known(model, tmp_path):
    cache, file = mlx_lm_cache.make_prompt_cache(model), str(tmp_path / "cache.safetensors")
    model(mx.array([FIRST]), cache=cache)
    mlx_lm_cache.save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file)
    messages = [{"role": "user", "content": "丁"}]
    with pytest.raises(ValueError, match="make a new one"):
        stream_generate(model, chat_tokenizer(), messages=messages, prompt_cache=loaded)
    assert loaded[0].offset == len(FIRST)


def test_a_refused_generation_leaves_the_cache_as_it_was(model, tokenizer, monkeypatch):
    cache = make_prompt_cache(model)
    turn(model, tokenizer, FIRST, cache)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "usable_memory", lambda: 1)
        with pytest.raises(ValueError, match="slices need"):
            turn(model, tokenizer, SECOND, cache)
    turn(model, tokenizer, SECOND, cache)
    assert cache.tokens[: len(FIRST)] == FIRST


def test_a_cache_from_mlx_lm_works_with_a_note_on_missing_statistics(
    run_command, folder, tmp_path, monkeypatch
):
    file = tmp_path / "prompt.safetensors"
    cache = make_prompt_cache(model := mlx_lm.load(str(folder))[0])
    read_prompt(model, chat_tokenizer().encode("上丁七丄"), cache, lambda done, total: None)
    metadata = {"model": str(folder), "tokenizer_config": "{}"}
    mlx_lm_cache.save_prompt_cache(str(file), cache, metadata)
    arguments = ("--prompt-cache-file", file, "-p", "丙丄", "-m", 8)
    code, sliced, err = run_command(generate, *arguments, "--density", 1)
    assert code == 0
    assert "no statistics beside the prompt cache" in err
    code, _, err = run_command(
        generate, *arguments, "--save-prompt-cache", tmp_path / "a.safetensors"
    )
    assert code == 2
    assert "does not tell what was said" in err
    _, dense, _ = run_command(generate, *arguments, "--dense")
    _, stock, _ = run_command(sys.modules["mlx_lm.generate"].main, *arguments)
    assert answer(sliced) == answer(dense) == answer(stock)


@pytest.mark.parametrize("bits", [(), ("--kv-bits", 8, "--kv-group-size", 32)])
def test_a_conversation_is_saved_after_every_answer(run_command, folder, tmp_path, bits):
    file = tmp_path / "talk.safetensors"
    options = ("-m", 6, "--density", 0.9, "--save-prompt-cache", file, *bits)
    code, first, _ = run_command(generate, "--model", folder, "-p", "丁七", *options)
    assert code == 0
    code, second, _ = run_command(generate, "--prompt-cache-file", file, "-p", "丄", *options)
    assert code == 0
    cache, metadata = load_prompt_cache(file, return_metadata=True)
    messages = json.loads(metadata["messages"])
    assert [m["content"] for m in messages] == ["丁七", answer(first), "丄", answer(second)]
    tokenizer = chat_tokenizer()
    assert cache.tokens[:-6] == encode(tokenizer, messages[:-1])
    assert cache.statistics.prompt.tokens == len(cache.tokens) - 12
    if not bits:
        uncached = [
            *run_command(generate, "--model", folder, "-p", "丁七", "-m", 6, "--density", 1)
        ]
        assert answer(uncached[1]) == answer(first)
        model, _ = mlx_lm.load(str(folder))
        expected = mlx_lm.stream_generate(model, tokenizer, encode(tokenizer, messages[:-1]), 6)
        assert [r.token for r in expected] == cache.tokens[-6:]


def test_tokens_that_the_template_changes_are_read_again(run_command, folder, tmp_path):
    """Templates of reasoning models omit the thinking of earlier turns."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "m.content", "(m.content if m.role == 'user' else '丐')"
    )
    tokenizer.save_pretrained(folder)
    file = tmp_path / "talk.safetensors"
    options = ("-m", 6, "--density", 1, "--save-prompt-cache", file)
    run_command(generate, "--model", folder, "-p", "丁七", *options)
    code, _, _ = run_command(generate, "--prompt-cache-file", file, "-p", "丄", *options)
    cache = load_prompt_cache(file)
    assert code == 0
    assert cache.tokens[:-6] == tokenizer.encode("上丁七不下丐不上丄不下")
    assert {layer.offset for layer in cache} == {len(cache.tokens)}


@pytest.mark.parametrize("save", [True, False])
def test_a_conversation_that_passed_its_window_is_read_again(run_command, folder, tmp_path, save):
    """A rotating cache cannot be trimmed to what a changed template leaves of it."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "m.content", "(m.content if m.role == 'user' else '丐')"
    )
    tokenizer.save_pretrained(folder)
    file, model = tmp_path / "talk.safetensors", mlx_lm.load(str(folder))[0]
    # mlx-lm gives this architecture no window, so the first turn is saved from Python.
    cache = make_prompt_cache(model)
    cache[:] = [RotatingKVCache(max_size=12, keep=4) for _ in cache]
    options = {"prior": made_prior(model), "density": 1.0, "max_tokens": 9, "prompt_cache": cache}
    text = sliced_generate(model, tokenizer, tokenizer.encode("上丁七不下"), **options)
    conversation = Conversation(cache)
    messages = [{"role": "user", "content": "丁七"}, {"role": "assistant", "content": text}]
    conversation.save(file, str(folder), messages)
    saving = ("--save-prompt-cache", file) if save else ()
    options = ("-m", 9, "--density", 1, *saving)
    code, out, _ = run_command(generate, "--prompt-cache-file", file, "-p", "丄", *options)
    assert code == 0
    tokens = tokenizer.encode("上丁七不下丐不上丄不下")
    window = [RotatingKVCache(max_size=12, keep=4) for _ in model.layers]
    expected = mlx_lm.generate(model, tokenizer, tokens, max_tokens=9, prompt_cache=window)
    assert answer(out) == expected
    if save:
        saved = load_prompt_cache(file)
        assert saved.tokens[:-9] == tokens
        assert {(layer.offset, layer.max_size) for layer in saved} == {(len(tokens) + 9, 12)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"messages": "["}, "are not a list of roles and contents"),
        ({"messages": "{}"}, "are not a list of roles and contents"),
        ({"messages": '"hi"'}, "are not a list of roles and contents"),
        ({"messages": "[1]"}, "are not a list of roles and contents"),
        ({"messages": '[{"role": "user"}]'}, "are not a list of roles and contents"),
        ({"messages": '[{"content": "a"}]'}, "are not a list of roles and contents"),
        ({"messages": '[{"role": 1, "content": "a"}]'}, "are not a list of roles and contents"),
        ({"messages": '[{"role": "a", "content": ["b"]}]'}, "are not a list of roles and contents"),
        ({"messages": "[" * 100_000}, "are not a list of roles and contents"),
        ({"messages.0": "[]"}, "are not a list of roles and contents"),
        ({"tokenizer_config": "["}, "tokenizer options in the prompt cache"),
        ({"tokenizer_config": "[]"}, "tokenizer options in the prompt cache"),
        ({"model": None}, "does not name its model"),
        ({"model": None, "model.0": "tiny"}, "does not name its model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_metadata_is_reported_in_one_sentence(
    run_command, folder, tmp_path, metadata, message
):
    file, model = tmp_path / "talk.safetensors", mlx_lm.load(str(folder))[0]
    entries = {"model": str(folder), "messages": "[]"} | metadata
    if "messages.0" in metadata:
        del entries["messages"]
    entries = {key: value for key, value in entries.items() if value is not None}
    cache = make_prompt_cache(model)
    read_prompt(model, FIRST, cache)
    save_prompt_cache(file, cache, entries)
    code, out, err = run_command(generate, "--prompt-cache-file", file, "-p", "丁")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-cache-file", "missing.safetensors"], "no prompt cache at missing.safetensors"),
        (["--prompt-cache-file", "TALK", "--model", "other"], "is of the model TINY, not of other"),
        (["--prompt-cache-file", "TALK", "--system-prompt", "丄"], "beginning of a conversation"),
        (["--save-prompt-cache", "talk"], "ends in .safetensors"),
        (["--save-prompt-cache", "talk.safetensors", "--dense"], "combined with --dense"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(run_command, folder, tmp_path, arguments, message):
    file = tmp_path / "talk.safetensors"
    run_command(generate, "--model", folder, "-p", "丁", "-m", 2, "--save-prompt-cache", file)
    arguments = [str(file) if value == "TALK" else value for value in arguments]
    code, out, err = run_command(generate, *arguments)
    assert (code, out) == (2, "")
    assert message.replace("TINY", str(folder)) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("glass-mlx: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "", "--prompt-cache-file", "a.safetensors"], "the prompt is empty"),
        (["--prompt", "丁", "--prompt-cache-file", "a"], "ends in .safetensors"),
        (["--prompt", "丁", "--prompt-cache-file", "a.safetensors", "--model", "./b"], "no model"),
    ],
)
def test_bad_input_to_cache_prompt_is_reported_in_one_sentence(run_command, arguments, message):
    code, out, err = run_command(cache_prompt, *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
