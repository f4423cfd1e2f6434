"""Bodies of requests: what is refused, and with what words."""

import json

from glass_mlx.config import GlassConfig
from glass_mlx.server.body import check_body, parse_body
from glass_mlx.server.errors import RequestError
from glass_mlx.server.glass_field import GlassField

import pytest

MESSAGES = [{"role": "user", "content": "丁"}]


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe{}", "not valid UTF-8"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": NaN}', "is not JSON: NaN is not a number"),
        (b'{"a": -Infinity}', "is not a number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"1" * 400 + b"}", "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"a": ' + nested(100) + b"}", "nested too deeply"),
        (b'{"a": ' + nested(100_000) + b"}", "nested too deeply"),
        (b'{"a": "\\ud800"}', "not valid UTF-8"),
        (b'{"\\ud800": 1}', "not valid UTF-8"),
        (b'{"a": [[{"b": ["\\ud800"]}]]}', "not valid UTF-8"),
    ],
)
def test_a_body_that_is_not_an_object_of_json_is_refused(data, message):
    with pytest.raises(RequestError, match=message) as error:
        parse_body(data)
    assert error.value.status == 400


def test_null_means_that_a_field_is_not_given():
    assert parse_body(b'{"stop": null, "seed": 0}') == {"seed": 0}
    assert parse_body(b'{"a": ' + nested(60) + b"}")["a"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"max_tokens": False}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stream_options": []}, "stream_options"),
        ({"xtc_threshold": 0.7}, "xtc_threshold"),
        ({"presence_penalty": 1000}, "presence_penalty"),
        ({"repetition_penalty": 1e-5}, "repetition_penalty"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["a"]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0]"),
        ({"messages": [*MESSAGES, {"role": "user", "content": 1}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
            "messages[0]",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0]"),
        ({"tools": {}}, "tools"),
        ({"tools": ["a"]}, "tools"),
        ({"role_mapping": {"user": 1}}, "role_mapping"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_field_of_a_chat_request_is_refused_by_name(fields, param):
    with pytest.raises(RequestError) as error:
        check_body({"messages": MESSAGES} | fields, is_chat=True)
    assert error.value.status == 400
    assert error.value.param == param
    assert param.split("[")[0] in str(error.value)


@pytest.mark.parametrize("prompt", ["", [], 1, {}, ["a", "b"], [1, "a"], [True], None])
def test_a_text_prompt_is_a_text_or_token_ids(prompt):
    with pytest.raises(RequestError, match="prompt must be a text or a list of token ids"):
        check_body({"prompt": prompt}, is_chat=False)


def test_a_body_gets_the_form_of_mlx_lm():
    body = check_body({"prompt": ["丁"], "logprobs": 3, "stop": "丂"}, is_chat=False)
    assert (body["prompt"], body["stop"]) == ("丁", ["丂"])
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    assert check_body({"prompt": [1, 2], "logprobs": 0}, is_chat=False)["top_logprobs"] == -1
    fields = {"xtc_probability": 1, "stream_options": {"other": 1}, "tool_choice": "none"}
    body = check_body({"messages": MESSAGES, "tools": [{}]} | fields, is_chat=True)
    assert isinstance(body["xtc_probability"], float)
    assert body["stream_options"] == {"include_usage": False}
    assert body["tools"] == []


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ([], "glass must be an object"),
        ({"kl": 1}, "glass has no 'kl'; it has max_kl, density"),
        ({"max_kl": "1"}, "glass.max_kl must be a number"),
        ({"max_kl": True}, "glass.max_kl must be a number"),
        ({"dense": 1}, "glass.dense must be true or false"),
        ({"max_kl": -1}, "the bound on KL must be at least 0"),
        ({"density": 2}, "the density must be above 0"),
        ({"vocabulary": -1}, "share of the vocabulary must be above 0"),
        ({"max_kl": 0.1, "density": 0.5}, "give either the bound, or density"),
        ({"dense": True, "density": 0.5}, "dense cannot be combined"),
    ],
)
def test_a_wrong_glass_field_is_refused(field, message):
    with pytest.raises(RequestError, match=message) as error:
        GlassField.parse(field).config(GlassConfig(), is_dense=False)
    assert error.value.status == 400
    assert json.dumps(error.value.body)


def test_the_glass_field_decides_what_is_kept():
    default = GlassConfig(max_kl=0.2, refresh=64)
    assert GlassField().config(default, False) == default
    assert GlassField(max_kl=0.5).config(default, False) == GlassConfig(max_kl=0.5, refresh=64)
    shares = GlassField(density=0.5).config(default, False)
    assert shares == GlassConfig(density=0.5, refresh=64)
    assert GlassField(dense=True).config(default, False).is_dense
    assert GlassField().config(default, True).is_dense
    with pytest.raises(RequestError, match="started with --dense"):
        GlassField(density=0.5).config(default, True)
    with pytest.raises(RequestError, match="has not measured what slicing costs"):
        GlassField(max_kl=0.5).config(GlassConfig(density=0.5), False)
