"""Token ids of what a user asks, inside the model's chat template if it has one."""

from typing import Any

from glass_mlx.files import one_line

from mlx_lm.tokenizer_utils import TokenizerWrapper

# Stands for a message to find its place in a template's text.
_MARK = "<query>"


def encode(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, str]],
    ignore_template: bool = False,
    **options: Any,
) -> list[int]:
    """Encode messages so that the model's answer comes next.

    Args:
        tokenizer: the model's tokenizer.
        messages: each with `role` and `content`. A last one by the assistant is the beginning of
            the answer.
        ignore_template: do as if the model had no chat template. Without one the user's messages
            are joined by line breaks.
        options: for the chat template.

    Raises:
        ValueError: if the template refuses the messages.
    """
    if ignore_template or not tokenizer.has_chat_template:
        return tokenizer.encode("\n".join(m["content"] for m in messages if m["role"] == "user"))
    return tokenizer.encode(_in_template(tokenizer, messages, options), add_special_tokens=False)


def encode_rest(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, str]],
    ignore_template: bool = False,
    **options: Any,
) -> list[int]:
    """Encode the last user's message and what follows it, for a model that has read the rest.

    That is what mlx-lm does with a prompt cache: what was read ends within the user's message,
    and the template's text up to there is not looked at.

    Args and errors as of `encode`.
    """
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    if ignore_template or not tokenizer.has_chat_template:
        return tokenizer.encode(messages[last]["content"], add_special_tokens=False)
    marked = [dict(message) for message in messages]
    marked[last]["content"] = _MARK
    before, found, _ = _in_template(tokenizer, marked, options).partition(_MARK)
    if not found:
        raise ValueError("the model's chat template does not show the user's message")
    text = _in_template(tokenizer, messages, options)[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)


def encode_beginning(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Encode the beginning of a user's message, which `encode_rest` goes on with.

    Raises:
        ValueError: if the model's chat template refuses it.
    """
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    text = _in_template(tokenizer, [{"role": "user", "content": prompt}], {}, begun=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _in_template(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, str]],
    options: dict[str, Any],
    begun: bool | None = None,
) -> str:
    """The template's text, up to where the model goes on with the last message or answers it."""
    if begun is None:
        begun = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=begun,
            add_generation_prompt=not begun,
            **options,
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"the model's chat template does not take these messages ({one_line(error)})"
        ) from error
