"""Every field of a request with every kind of value: an answer or a refusal, never a failure."""

import json

from raw_http import error_of, exchange, request_bytes

import pytest

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e-320, 1e308, 2**31, 2**63, 10**400),
    *("", "a", "丁", "\x00", "../..", "null", [], [[]], ["丁"], [1], [None], [{}]),
    *({}, {"a": 1}, {"1": 1}, {"type": "text"}, {"role": "user", "content": "丁"}),
]
FIELDS = [
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "stop", "seed"),
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("repetition_context_size", "presence_penalty", "presence_context_size", "logit_bias"),
    *("frequency_penalty", "frequency_context_size", "xtc_probability", "xtc_threshold"),
    *("logprobs", "top_logprobs", "n", "tools", "tool_choice", "response_format", "role_mapping"),
    *("chat_template_kwargs", "adapters", "draft_model", "num_draft_tokens", "glass", "user"),
    *("messages.role", "messages.content", "messages.tool_calls", "messages.name"),
    *("glass.max_kl", "glass.density", "glass.vocabulary", "glass.dense", "glass.trace"),
]


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_value_makes_the_server_fail(server, caplog, field, path):
    for value in VALUES:
        message = {"role": "user", "content": "丁七"}
        body = {"max_tokens": 2, "temperature": 1.0, "seed": 1}
        body |= {"messages": [message]} if "chat" in path else {"prompt": "丁七"}
        name, _, inner = field.partition(".")
        if name == "messages" and inner:
            body["messages"] = [message | {inner: value}]
        else:
            body[name] = {inner: value} if inner else value
        if field in ("max_tokens", "max_completion_tokens"):
            body["stop"] = ["丁", "七", "上", "下", "不"]
            body["logit_bias"] = {str(ord("不") - 0x4E00): 100}
        status, _, answer = exchange(server.address, request_bytes(body, path))
        assert status == 200 or 400 <= status < 500, (field, value, answer)
        if status != 200:
            error_of(answer)
        else:
            assert b'"error"' not in answer, (field, value, answer)
            assert answer.endswith(b"[DONE]\n\n") or json.loads(answer)["choices"]
    assert "Traceback" not in caplog.text
