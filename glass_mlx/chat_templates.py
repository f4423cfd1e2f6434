"""Encode messages into token ids, with the model's chat template if it has one."""

from typing import Any

from glass_mlx.errors import check_text, is_library_error, library_reason, one_line

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Replaces the user's message, to find the position of the message in the template's text.
_PLACEHOLDER = "<query>"

# Options of a chat template that this module sets.
RESERVED_OPTIONS = frozenset(
    ("add_generation_prompt", "continue_final_message", "conversation", "messages", "tokenize")
)

# Each message has a role and its content.
Messages = list[dict[str, str]]


def is_message(value: Any) -> bool:
    """Return whether a value from outside is a message: a role and its content."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def encode(
    tokenizer: TokenizerWrapper,
    messages: Messages,
    ignore_template: bool = False,
    /,  # an option may have any name
    **options: Any,
) -> list[int]:
    """Encode messages so that the model continues with its answer.

    Args:
        tokenizer: the model's tokenizer.
        messages: a list of {"role", "content"}. If the last message is the assistant's, the model
            continues it.
        ignore_template: whether to ignore the chat template. Without a template the user's
            messages are joined by line breaks.
        **options: options of the chat template.

    Returns:
        Token ids.

    Raises:
        ValueError: if the template rejects the messages.
    """
    if ignore_template or not tokenizer.has_chat_template:
        text = "\n".join(m["content"] for m in messages if m["role"] == "user")
        return encode_text(tokenizer, text, add_special_tokens=True)
    return encode_text(tokenizer, _apply_template(tokenizer, messages, options))


def encode_rest(
    tokenizer: TokenizerWrapper,
    messages: Messages,
    ignore_template: bool = False,
    /,  # an option may have any name
    **options: Any,
) -> list[int]:
    """Encode the last user message and what follows it, for a model with a prompt cache.

    mlx-lm does the same: the cached prompt ends within the user message, so the template's text
    before that message is cut off.

    Args:
        tokenizer: see `encode`.
        messages: see `encode`.
        ignore_template: see `encode`.
        **options: options of the chat template.

    Returns:
        Token ids.

    Raises:
        ValueError: if the template rejects the messages or leaves out the user's message.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    if ignore_template or not tokenizer.has_chat_template:
        return encode_text(tokenizer, messages[last]["content"])
    marked_messages = [dict(message) for message in messages]
    marked_messages[last]["content"] = _PLACEHOLDER
    marked_text = _apply_template(tokenizer, marked_messages, options)
    start = marked_text.find(_PLACEHOLDER)
    if start < 0:
        raise ValueError("the model's chat template does not show the user's message")
    return encode_text(tokenizer, _apply_template(tokenizer, messages, options)[start:])


def encode_beginning(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Encode the beginning of a user's message, which `encode_rest` continues.

    Raises:
        ValueError: if the model's chat template rejects the message.
    """
    if not tokenizer.has_chat_template:
        return encode_text(tokenizer, prompt, add_special_tokens=True)
    messages = [{"role": "user", "content": prompt}]
    return encode_text(tokenizer, _apply_template(tokenizer, messages, {}, is_unfinished=True))


def encode_text(
    tokenizer: TokenizerWrapper, text: str, add_special_tokens: bool = False
) -> list[int]:
    """Encode text.

    Args:
        tokenizer: the model's tokenizer.
        text: the text. What a chat template returns already has its special tokens.
        add_special_tokens: whether to add the tokens that begin a text.

    Raises:
        ValueError: if the text has half a character, or the tokenizer's files are damaged.
    """
    check_text(text, "the text")
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except BaseException as error:  # transformers and tokenizers raise errors of any type
        if not is_library_error(error):
            raise
        raise ValueError(
            f"the tokenizer cannot encode the text: {library_reason(error)}"
        ) from error


def _apply_template(
    tokenizer: TokenizerWrapper,
    messages: Messages,
    options: dict[str, Any],
    is_unfinished: bool | None = None,
) -> str:
    """Return the template's text up to the position where more text follows.

    Args:
        tokenizer: the model's tokenizer.
        messages: see `encode`.
        options: options of the chat template.
        is_unfinished: whether the model continues the last message instead of answering it.
            Default: whether the message is the assistant's.
    """
    if is_unfinished is None:
        is_unfinished = messages[-1]["role"] == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=is_unfinished,
                add_generation_prompt=not is_unfinished,
                **options,
            )
        )
    except Exception as error:  # templates raise exceptions of any type
        is_from_template = isinstance(error, TemplateError)
        reason = one_line(error) if is_from_template else library_reason(error)
        raise ValueError(
            f"the model's chat template does not accept these messages ({reason})"
        ) from error
