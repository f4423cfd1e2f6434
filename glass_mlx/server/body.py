"""The bodies of requests, checked before anything uses them."""

import inspect
import json
from typing import Any

from glass_mlx.chat_templates import RESERVED_OPTIONS
from glass_mlx.config import check_seed
from glass_mlx.errors import check_text
from glass_mlx.server.errors import bad_request

from transformers import PreTrainedTokenizerBase

# Objects and lists may be nested this deeply. JSON schemas of tools need about a dozen levels.
_MAX_DEPTH = 64

# Numbers are below this. Seeds have 64 bits, and no other field needs more.
_MAX_NUMBER = 2**128

_MAX_STOP_WORDS, _MAX_STOP_LENGTH = 16, 256

# The largest size of a logit bias, as in OpenAI's API, and of a penalty.
_MAX_BIAS = 100

# Fields with numbers: Python takes true for 1, but a request with it is wrong.
_NUMBERS = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty"),
    *("presence_context_size", "frequency_penalty", "frequency_context_size", "top_logprobs"),
    *("xtc_probability", "xtc_threshold", "num_draft_tokens", "n", "best_of"),
)

# Fields that become floats, as which mlx-lm and MLX take every value.
_FLOATS = (
    *("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

# More drafts at once are of no use, and cost memory.
_MAX_DRAFT_TOKENS = 64

# Fields of OpenAI's API that change the answer, with the values that do what happens anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
}

# What a request cannot give to the chat template: the arguments of the method that applies it.
_TEMPLATE_ARGUMENTS = RESERVED_OPTIONS | {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
}


def parse_body(data: bytes) -> dict[str, Any]:
    """Return the JSON object that a request's body is, without fields that are null.

    Raises:
        RequestError: if it is not UTF-8 or not a JSON object, is nested too deeply, or has numbers
            or text that nothing can be done with.
    """
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request("the request's body is not valid UTF-8") from error
    except RecursionError as error:
        raise bad_request("the request's body is nested too deeply") from error
    except ValueError as error:
        raise bad_request(f"the request's body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise bad_request("the request's body must be a JSON object")
    _check_values(body)
    return {name: value for name, value in body.items() if value is not None}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _check_values(body: dict[str, Any]) -> None:
    """Check the depth, all text and all numbers, without recursion."""
    pending: list[tuple[Any, int]] = [(body, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise bad_request("the request's body is nested too deeply")
        if isinstance(value, dict):
            pending += [(entry, depth + 1) for pair in value.items() for entry in pair]
        elif isinstance(value, list):
            pending += [(entry, depth + 1) for entry in value]
        elif isinstance(value, str):
            try:
                check_text(value, "text in the request's body")
            except ValueError as error:
                raise bad_request(str(error)) from error
        elif isinstance(value, int | float) and not abs(value) < _MAX_NUMBER:
            raise bad_request("a number in the request's body is too large")


def check_body(body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """Check the fields of a body that mlx-lm does not check, or not enough.

    Args:
        body: the body from `parse_body`.
        is_chat: whether the request is for a chat completion.

    Returns:
        The body in mlx-lm's form.

    Raises:
        RequestError: for the first field that is wrong.
    """
    body = dict(body)
    _check_sampling(body)
    _check_unsupported(body)
    body["stop"] = _stop_words(body.get("stop", []))
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad_request("stream_options must be an object", "stream_options")
    body["stream_options"] = {"include_usage": options.get("include_usage") is True}
    if is_chat:
        _check_messages(body.get("messages"))
        _check_tools(body)
        _check_template_options(body)
    else:
        body["prompt"] = _text_prompt(body.get("prompt"))
        _convert_logprobs(body)
    return body


def _check_sampling(body: dict[str, Any]) -> None:
    for name in _NUMBERS:
        if isinstance(body.get(name), bool):
            raise bad_request(f"{name} must be a number", name)
    for name in _FLOATS:
        if isinstance(body.get(name), int):
            body[name] = float(body[name])
    seed = body.get("seed")
    if isinstance(seed, int):
        try:
            check_seed(seed)
        except ValueError as error:
            raise bad_request(str(error), "seed") from error
    if isinstance(threshold := body.get("xtc_threshold"), float) and threshold > 0.5:
        raise bad_request("xtc_threshold must be at most 0.5", "xtc_threshold")
    drafts = body.get("num_draft_tokens", 0)
    if _is_number(drafts) and drafts > _MAX_DRAFT_TOKENS:
        raise bad_request(
            f"num_draft_tokens must be at most {_MAX_DRAFT_TOKENS}", "num_draft_tokens"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if _is_number(value := body.get(name, 0)) and abs(value) > _MAX_BIAS:
            raise bad_request(f"{name} must be from -{_MAX_BIAS} to {_MAX_BIAS}", name)
    value = body.get("repetition_penalty", 0)
    if _is_number(value) and value != 0 and not 1 / _MAX_BIAS <= value <= _MAX_BIAS:
        raise bad_request(
            f"repetition_penalty must be 0, or from {1 / _MAX_BIAS} to {_MAX_BIAS}",
            "repetition_penalty",
        )
    bias = body.get("logit_bias", {})
    values = bias.values() if isinstance(bias, dict) else ()
    if not all(_is_number(value) and abs(value) <= _MAX_BIAS for value in values):
        raise bad_request(
            f"logit_bias must map token ids to numbers from -{_MAX_BIAS} to {_MAX_BIAS}",
            "logit_bias",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_unsupported(body: dict[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if name in body and body[name] not in harmless:
            raise bad_request(
                f"this server does not support {name}, except {json.dumps(harmless[-1])}", name
            )


def _stop_words(value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise bad_request("stop must be a text or a list of texts, which are not empty", "stop")
    if len(words) > _MAX_STOP_WORDS or any(len(word) > _MAX_STOP_LENGTH for word in words):
        raise bad_request(
            f"stop has at most {_MAX_STOP_WORDS} texts of {_MAX_STOP_LENGTH} characters", "stop"
        )
    return words


def _text_prompt(value: Any) -> str | list[int]:
    """Return a prompt: a text or token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    is_ids = isinstance(value, list) and all(type(entry) is int for entry in value)
    if not (is_ids or isinstance(value, str)) or not value:
        raise bad_request("prompt must be a text or a list of token ids, and not empty", "prompt")
    return value


def _convert_logprobs(body: dict[str, Any]) -> None:
    """Turn the number of OpenAI's text completions into mlx-lm's two fields."""
    count = body.get("logprobs")
    if isinstance(count, int) and not isinstance(count, bool):
        body["logprobs"] = True
        body.setdefault("top_logprobs", count or -1)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list with at least one message", "messages")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request(f"{where} must be an object with a role", where)
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                is_text = isinstance(part, dict) and part.get("type") == "text"
                if not is_text or not isinstance(part.get("text"), str):
                    raise bad_request(f"{where}.content must have parts of type text only", where)
        elif not isinstance(content, str | None):
            raise bad_request(f"{where}.content must be text", where)
        _check_tool_calls(message.get("tool_calls"), where)


def _check_tool_calls(calls: Any, where: str) -> None:
    """Check the tool calls of an earlier answer, whose arguments mlx-lm reads as JSON."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise bad_request(f"{where}.tool_calls must be a list", where)
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{where}.tool_calls must have functions with names", where)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            try:
                json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise bad_request(f"{where}.tool_calls has arguments that are no JSON") from error


def _check_tools(body: dict[str, Any]) -> None:
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise bad_request("tools must be a list of objects", "tools")
    if body.get("tool_choice") == "none":
        body["tools"] = []
    mapping = body.get("role_mapping", {})
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise bad_request("role_mapping must be an object with texts", "role_mapping")


def _check_template_options(body: dict[str, Any]) -> None:
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise bad_request("chat_template_kwargs must be an object", "chat_template_kwargs")
    if refused := sorted(_TEMPLATE_ARGUMENTS & options.keys()):
        raise bad_request(
            f"chat_template_kwargs cannot set {', '.join(refused)}", "chat_template_kwargs"
        )
