"""Questions with one correct answer. Pruning can break these while perplexity still looks fine."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from glass_mlx.fidelity.prompts import Continuation

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

_EXAMPLES = 4  # questions with answers in the prompt
_QUESTIONS = 16  # questions after the prompt
_WORDS = ("apple", "bridge", "candle", "door", "engine", "feather", "garden", "hammer", "island")


class Sample(NamedTuple):
    """A text to score.

    Attributes:
        text: a prompt and its continuation.
        answers: the ranges of scored tokens that hold an answer; empty if the text is not a task.
            Every token of the continuation is scored except the first.
    """

    text: Continuation
    answers: list[tuple[int, int]]


def _arithmetic(rng: np.random.Generator) -> tuple[str, str]:
    a, b = (int(n) for n in rng.integers(2, 50, 2))
    return f"{a} + {b} =", f" {a + b}"


def _copying(rng: np.random.Generator) -> tuple[str, str]:
    words = " ".join(rng.choice(_WORDS, 4, replace=False))
    return f"Say {words}:", f" {words}"


# Functions that make a question and its answer.
TASKS: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
}


def write_task(kind: str, tokenizer: TokenizerWrapper, count: int, seed: int) -> Iterator[Sample]:
    """Write texts of questions with their correct answers, to be scored token by token.

    Args:
        kind: a key of `TASKS`.
        tokenizer: the model's tokenizer.
        count: the number of texts.
        seed: the seed of the questions.

    Yields:
        A text. The prompt has some questions with answers, the continuation has more.
    """
    ask = TASKS[kind]
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        examples = [ask(rng) for _ in range(_EXAMPLES)]
        prompt = "".join(f"{question}{answer}\n" for question, answer in examples)
        written: list[int] = []
        answers = []
        for question, answer in (ask(rng) for _ in range(_QUESTIONS)):
            written += tokenizer.encode(question, add_special_tokens=False)
            start = len(written)
            written += tokenizer.encode(answer, add_special_tokens=False)
            answers.append((start - 1, len(written) - 1))
            written += tokenizer.encode("\n", add_special_tokens=False)
        yield Sample(Continuation(tokenizer.encode(prompt), written), answers)
