"""Questions with one right answer, which pruning may break while perplexity looks fine."""

from collections.abc import Callable, Iterator

from glass_mlx.fidelity import Continuation

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

_SHOWN = 4  # questions that the prompt answers, as an example
_ASKED = 16  # questions after it
_WORDS = ("apple", "bridge", "candle", "door", "engine", "feather", "garden", "hammer", "island")


def _arithmetic(rng: np.random.Generator) -> tuple[str, str]:
    a, b = (int(n) for n in rng.integers(2, 50, 2))
    return f"{a} + {b} =", f" {a + b}"


def _copying(rng: np.random.Generator) -> tuple[str, str]:
    words = " ".join(rng.choice(_WORDS, 4, replace=False))
    return f"Say {words}:", f" {words}"


TASKS: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
}


def write_task(
    kind: str, tokenizer: TokenizerWrapper, count: int, seed: int
) -> Iterator[tuple[Continuation, list[tuple[int, int]]]]:
    """Write texts of questions with their right answers, to be scored token by token.

    Args:
        kind: a key of `TASKS`.
        tokenizer: the model's tokenizer.
        count: how many texts.
        seed: of the questions.

    Yields:
        A text whose prompt has some questions and answers and whose continuation has more, and
        where the answers are: ranges of scored tokens, which are all but the first.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        shown = "".join(f"{a}{b}\n" for a, b in (TASKS[kind](rng) for _ in range(_SHOWN)))
        written: list[int] = []
        answers = []
        for question, answer in (TASKS[kind](rng) for _ in range(_ASKED)):
            written += tokenizer.encode(question, add_special_tokens=False)
            start = len(written)
            written += tokenizer.encode(answer, add_special_tokens=False)
            answers.append((start - 1, len(written) - 1))
            written += tokenizer.encode("\n", add_special_tokens=False)
        yield Continuation(tokenizer.encode(shown), written), answers
