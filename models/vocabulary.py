"""The tokens that a model knows."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of a model's logits. MLX computes nothing for this."""
    return int(model(mx.array([[0]], mx.uint32)).shape[-1])


def check_tokens(tokens: Iterable[int], size: int) -> None:
    """Check token ids, because MLX would look up unknown ones beyond the embedding's end.

    Args:
        tokens: token ids.
        size: the number of tokens that the model knows.

    Raises:
        ValueError: for the first id that is out of range.
    """
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(
                f"the token {token} is not among the model's {size} tokens; the tokenizer may be "
                "of another model"
            )
