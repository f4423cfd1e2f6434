"""The server as OpenAI's own client sees it."""

import itertools
import json
from functools import partial

from glass_mlx import load, stream_generate
from glass_mlx.chat_templates import encode
from glass_mlx.server import generation
from helpers import chat_tokenizer

import mlx.core as mx
import mlx_lm
import openai
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

MESSAGES = [{"role": "user", "content": "丁七丄"}]


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture
def chat(client):
    return partial(client.chat.completions.create, model="tiny", messages=MESSAGES, max_tokens=30)


@pytest.fixture(scope="module")
def model(folder):
    return load(str(folder))


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def sliced_text(model, prompt, n=30, **options):
    return "".join(r.text for r in stream_generate(*model, prompt, n, **options))


def test_a_chat_completion_is_the_text_of_stream_generate(chat, model):
    answer = chat()
    prompt = encode(model[1], MESSAGES)
    assert answer.choices[0].message.content == sliced_text(model, prompt)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 30)
    assert usage.total_tokens == len(prompt) + 30


def test_a_stream_has_the_same_text(chat):
    options = {"extra_body": {"glass": {"density": 0.5}}}
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **options))
    assert text_of(chunks) == chat(**options).choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].usage.glass["dense_tokens"] == 19
    assert not any(hasattr(chunk, "glass") for chunk in chunks)
    assert all(chunk.usage is None for chunk in chat(stream=True))


def test_a_text_completion_continues_a_text_or_token_ids(client, model):
    complete = partial(client.completions.create, model="tiny", max_tokens=20)
    answer = complete(prompt="丁七丄")
    tokens = model[1].encode("丁七丄")
    assert answer.choices[0].text == sliced_text(model, tokens, 20)
    assert complete(prompt=tokens).choices[0].text == answer.choices[0].text
    chunks = list(complete(prompt="丁七丄", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_the_glass_field_sets_what_is_kept(chat, model):
    prompt = encode(model[1], MESSAGES)
    for field in ({"density": 0.25}, {"max_kl": 2.0}, {"density": 0.5, "vocabulary": 0.5}):
        answer = chat(extra_body={"glass": field})
        assert answer.choices[0].message.content == sliced_text(model, prompt, **field)
        glass = answer.usage.glass
        assert glass["max_kl"] == field.get("max_kl")
        assert glass["bytes_per_token"] < glass["dense_bytes_per_token"]
        assert glass["bytes_share"] < 1
        if "density" in field:
            assert glass["density"] == field["density"]


def test_the_dense_model_answers_on_request(chat, model):
    answer = chat(extra_body={"glass": {"dense": True}})
    dense = mlx_lm.generate(*model, encode(model[1], MESSAGES), max_tokens=30)
    assert answer.choices[0].message.content == dense
    assert answer.usage.glass["bytes_share"] == answer.usage.glass["density"] == 1


def test_a_conversation_reads_only_what_is_new(chat):
    messages = [{"role": "user", "content": "丗丘丙七丄"}]
    first = chat(messages=messages, max_tokens=20)
    assert first.usage.prompt_tokens_details.cached_tokens < 3
    answer = first.choices[0].message.content
    again = chat(messages=messages, max_tokens=20)
    assert again.choices[0].message.content == answer
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1

    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "丁"}]
    second = chat(messages=messages, max_tokens=20)
    # The last token of the answer is the end of the turn, which this answer did not reach.
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    for field, is_shared in (({"dense": True}, True), ({"density": 0.5}, False)):
        other = chat(messages=messages, max_tokens=20, extra_body={"glass": field})
        cached = other.usage.prompt_tokens_details.cached_tokens
        assert (cached >= first.usage.total_tokens) == is_shared


def test_statistics_go_from_request_to_request(run_server, folder, monkeypatch):
    given = []

    def record(*args, **options):
        statistics = options["prompt_cache"].statistics
        given.append((statistics.prompt.tokens, statistics.text.tokens))
        return stream_generate(*args, **options)

    monkeypatch.setattr(generation, "stream_generate", record)
    with run_server(folder, "--density", 0.5) as server:
        create = partial(client_of(server).chat.completions.create, model="tiny", max_tokens=20)
        messages = [*MESSAGES]
        answer = create(messages=messages).choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "丁"}]
        create(messages=messages)
        create(messages=messages)
    # 6 tokens of the prompt, and 16 + 1 tokens that the dense model wrote and read.
    assert given[0] == (0, 0)
    assert given[1][0] == 6
    assert given[1][1] >= 16
    assert given[2][1] == given[1][1]  # without those of the same question


def test_stop_words_end_the_text_before_them(chat):
    text = chat().choices[0].message.content
    for start in (3, 10, 25):
        stop = text[start : start + 2]
        expected = text[: text.index(stop)]
        answer = chat(stop=stop)
        assert (answer.choices[0].message.content or "") == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(chat(stop=["龥", stop], stream=True))
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert chat(stop="龥").choices[0].message.content == text


def test_an_end_token_stops(chat):
    answer = chat(logit_bias={str(ord("不") - 0x4E00): 100})
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 1


def test_the_seed_determines_the_text(chat):
    one, two = (chat(temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 2))
    chat(temperature=1.5)
    assert chat(temperature=1.5, seed=1).choices[0].message.content == one
    assert one != two


def test_log_probabilities_are_those_of_the_tokens(chat, model):
    answer = chat(logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    logits, _ = model[0](mx.array([encode(model[1], MESSAGES)]))[0, -1], None
    logprobs = logits - mx.logsumexp(logits)
    best = mx.argsort(-logprobs)[:3].tolist()
    assert [top.id for top in tokens[0].top_logprobs] == best
    for top in tokens[0].top_logprobs:
        assert top.logprob == pytest.approx(logprobs[top.id].item(), abs=1e-4)
        assert bytes(top.bytes).decode() == top.token
    assert tokens[0].logprob == pytest.approx(logprobs[tokens[0].id].item(), abs=1e-4)
    chunks = list(chat(logprobs=True, top_logprobs=3, max_tokens=5, stream=True))
    streamed = [t for c in chunks for t in c.choices[0].logprobs.content]
    assert streamed == tokens


def test_log_probabilities_of_text_completions_have_their_own_form(client):
    answer = client.completions.create(model="tiny", prompt="丁", max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == value
        assert len(top) == 2


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other")


@pytest.mark.parametrize("name", ["tiny", "default_model", "FOLDER"])
def test_the_model_has_several_names(chat, folder, name):
    assert chat(model=name.replace("FOLDER", str(folder)), max_tokens=2).model == "tiny"


@pytest.mark.parametrize(
    "name", ["gpt-4o", "../tiny", "/etc/passwd", "mlx-community/Llama", "", ".", "tiny/", "~"]
)
def test_no_other_model_is_loaded(chat, server, name, monkeypatch):
    monkeypatch.setattr("glass_mlx.server.provider.load", None)
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        chat(model=name)
    with pytest.raises(openai.NotFoundError, match="no adapters on request"):
        chat(extra_body={"adapters": name})
    with pytest.raises(openai.NotFoundError, match=r"the draft model .*is not served here"):
        chat(extra_body={"draft_model": name})
    assert chat(max_tokens=2).usage.completion_tokens == 2


def test_other_models_are_loaded_if_a_flag_allows_it(run_server, folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(folder)
    with run_server(folder, "--allow-model-requests") as server:
        chat = partial(client_of(server).chat.completions.create, messages=MESSAGES, max_tokens=20)
        text = chat(model="tiny").choices[0].message.content
        assert chat(model=str(other)).choices[0].message.content == text
        with pytest.raises(openai.NotFoundError, match="there is no model at /nowhere"):
            chat(model="/nowhere")
        assert chat(model="tiny").choices[0].message.content == text


def test_a_draft_model_proposes_tokens(run_server, chat, folder):
    """The text of the dense model is the same, and that of slices is the engine's."""
    model, tokenizer = load(str(folder))
    dense = {"glass": {"dense": True}}
    expected = chat(max_tokens=30, extra_body=dense).choices[0].message.content
    ids = encode(tokenizer, MESSAGES)
    options = {"draft_model": model, "num_draft_tokens": 4, "density": 0.5, "max_tokens": 30}
    sliced = "".join(r.text for r in stream_generate(model, tokenizer, ids, **options))
    with run_server(folder, "--draft-model", folder, "--num-draft-tokens", 4) as server:
        drafted = partial(
            client_of(server).chat.completions.create, model="tiny", messages=MESSAGES
        )
        for draft in ({}, {"draft_model": str(folder)}, {"num_draft_tokens": 0}):
            answer = drafted(max_tokens=30, extra_body=dense | draft)
            assert answer.choices[0].message.content == expected
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        answer = drafted(max_tokens=30, extra_body={"glass": {"density": 0.5}})
        assert answer.choices[0].message.content == sliced
        with pytest.raises(openai.NotFoundError, match="draft model other is not served here"):
            drafted(extra_body={"draft_model": "other"})


def test_other_draft_models_are_loaded_if_a_flag_allows_it(run_server, folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(folder)
    dense = {"glass": {"dense": True}}
    flags = ("--allow-model-requests", "--draft-model", folder)
    with run_server(folder, *flags) as server:
        chat = partial(client_of(server).chat.completions.create, messages=MESSAGES, max_tokens=20)
        text = chat(model="tiny", extra_body=dense).choices[0].message.content
        provider = server.generator.model_provider
        assert provider.draft_model is not None
        for model in ("tiny", str(other)):
            answer = chat(model=model, extra_body=dense | {"draft_model": str(other)})
            assert answer.choices[0].message.content == text
            assert provider.model_key[2] == str(other)
        # The draft model of the command line belongs to the model of the command line.
        assert chat(model=str(other), extra_body=dense).choices[0].message.content == text
        assert provider.draft_model is None
        with pytest.raises(openai.NotFoundError, match="there is no model at /nowhere"):
            chat(model="tiny", extra_body={"draft_model": "/nowhere"})
        assert chat(model="tiny", extra_body=dense).choices[0].message.content == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": "hot"}, "temperature must be of type"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_p": 2}, "top_p must be at most 1"),
        ({"logit_bias": {"999": 1}}, "999 is not among the model's 256 tokens"),
        ({"logit_bias": {"-1": 1}}, "-1 is not among"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be a dict of int to float"),
        ({"extra_body": {"glass": {"density": 3}}}, "the density must be above 0"),
        ({"extra_body": {"top_k": -1}}, "top_k must be at least 0"),
        ({"extra_body": {"draft_model": 1}}, "draft_model must be of type str"),
        ({"extra_body": {"num_draft_tokens": 65}}, "num_draft_tokens must be at most 64"),
        ({"extra_body": {"num_draft_tokens": -1}}, "num_draft_tokens must be at least 0"),
    ],
)
def test_a_bad_value_is_refused_with_a_reason(chat, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(**fields)


def test_unknown_token_ids_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="300 is not among"):
        client.completions.create(model="tiny", prompt=[1, 300])


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1e-300}, {"temperature": 1e30}, {"temperature": 1.0, "top_p": 0}],
)
def test_extreme_values_give_an_answer(chat, fields):
    answer = chat(**fields, seed=1)
    assert answer.usage.completion_tokens == 30
    if fields["temperature"] < 1:
        assert answer.choices[0].message.content == chat().choices[0].message.content
    answer = chat(**fields, extra_body={"top_k": 10**9, "min_p": 1}, seed=1)
    assert answer.usage.completion_tokens == 30


def test_a_template_that_refuses_the_messages_is_the_clients_error(server, chat, monkeypatch):
    tokenizer = server.generator.model_provider.tokenizer
    template = "{{ raise_exception('only two roles') }}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match="cannot be encoded: only two roles"):
        chat()


class Scripted:
    """A stream that writes a given text, with a real report."""

    def __init__(self, text):
        self.text = text

    def __call__(self, *args, **options):
        stream = stream_generate(*args, **options)
        for response, character in zip(stream, self.text, strict=False):
            response.text = character
            response.finish_reason = None
            yield response
        stream.close()
        response.text, response.finish_reason = "", "stop"
        yield response


@pytest.fixture
def tool_tokenizer(server, monkeypatch):
    tokenizer = TokenizerWrapper(
        chat_tokenizer()._tokenizer,
        tool_call_start="⟨⟨",
        tool_call_end="⟩",
        tool_parser=lambda text, tools: json.loads(text),
    )
    monkeypatch.setattr(server.generator.model_provider, "tokenizer", tokenizer)
    server.generator._state_machine_cache.clear()
    yield
    server.generator._state_machine_cache.clear()


@pytest.mark.usefixtures("tool_tokenizer")
def test_tool_calls_are_parsed(chat, monkeypatch):
    call = {"name": "add", "arguments": {"a": 1}}
    monkeypatch.setattr(generation, "stream_generate", Scripted(f"好⟨⟨{json.dumps(call)}⟩"))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    options = {"tools": tools, "max_tokens": 100}
    answer = chat(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "好"
    (found,) = answer.message.tool_calls
    assert found.function.name == "add"
    assert json.loads(found.function.arguments) == {"a": 1}
    chunks = list(chat(stream=True, **options))
    (streamed,) = [t for c in chunks for t in c.choices[0].delta.tool_calls or ()]
    assert streamed.function.model_dump() == found.function.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The call and its result are read in the next turn.
    monkeypatch.setattr(generation, "stream_generate", stream_generate)
    messages = [*MESSAGES, answer.message.model_dump(), {"role": "tool", "content": "1"}]
    assert chat(messages=messages, tools=tools).usage.completion_tokens == 30


@pytest.mark.usefixtures("tool_tokenizer")
def test_text_that_only_begins_like_a_marker_is_not_lost(chat, monkeypatch):
    monkeypatch.setattr(generation, "stream_generate", Scripted("一⟨"))
    answer = chat(max_tokens=50).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("一⟨", "stop")
    assert text_of(chat(max_tokens=50, stream=True)) == "一⟨"


def test_the_trace_shows_what_is_kept_after_each_renewal(chat):
    field = {"trace": True, "density": 0.5, "vocabulary": 0.5}
    chunks = list(chat(stream=True, max_tokens=80, extra_body={"glass": field}))
    traces = [chunk.glass for chunk in chunks if hasattr(chunk, "glass")]
    kept = [trace["kept"] for trace in traces if "kept" in trace]
    assert len(kept) == traces[-1]["selections"] == 3
    for entry in kept:
        assert len(entry["layers"]) == 4
        assert {len(layer) for layer in entry["layers"]} == {64}
        shares = [int(digit, 36) / 35 for layer in entry["layers"] for digit in layer]
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)
        assert len(entry["vocabulary"]) == 64
    assert kept[0] != kept[-1]
    assert [trace["tokens"] for trace in traces] == [*range(1, 81), 80]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(traces))
