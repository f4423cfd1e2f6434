"""Token ids of what a user asks, inside the model's chat template if it has one."""

from typing import Any

from glass_mlx.files import one_line

from mlx_lm.tokenizer_utils import TokenizerWrapper


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
    begun = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
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
    return tokenizer.encode(text, add_special_tokens=False)
