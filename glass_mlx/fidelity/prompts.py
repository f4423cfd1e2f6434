"""Prompts, and the dense model's continuations of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glass_mlx.chat_templates import Messages, encode
from glass_mlx.config import check_seed
from glass_mlx.documents import is_jsonl, parse_record, read_lines, read_messages
from glass_mlx.writing import Writer, stop_sequences

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

_NAME = "prompts file"


@dataclass(frozen=True)
class Continuation:
    """A prompt, and the text that follows it.

    Attributes:
        prompt: the prompt's token ids, with the chat template.
        written: the token ids that the dense model wrote.
    """

    prompt: list[int]
    written: list[int]


@dataclass(frozen=True)
class WritingSettings:
    """How the dense model continues prompts.

    Attributes:
        tokens: the maximum number of tokens to write after each prompt.
        temperature: the sampling temperature.
        seed: the same seed and batch size give the same texts.
        batch_size: prompts continued at once. Default: all.
    """

    tokens: int
    temperature: float
    seed: int
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the seed; see `check_seed`."""
        check_seed(self.seed)


def read_prompts(file: Path) -> list[Messages]:
    """Read prompts: a text file with one per line, or JSONL (see `documents.read_messages`).

    A pipe holds JSONL if its first line begins with a brace.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a line cannot be read, or there are no prompts.
    """
    prompts: list[Messages] = []
    has_objects = is_jsonl(file)
    for n, line in read_lines(file, _NAME):
        if not line.strip():
            continue
        if not prompts and file.is_fifo():  # a pipe has no name that tells
            has_objects = line.startswith("{")
        place = f"line {n} of the {_NAME} {file}"
        prompts.append(
            _messages_of(parse_record(line, place), place) if has_objects else _user_message(line)
        )
    if not prompts:
        raise ValueError(f"there are no prompts in {file}")
    return prompts


def _user_message(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _messages_of(record: dict[str, Any], place: str) -> Messages:
    """Return the messages of a JSON object; see `documents.read_messages`."""
    messages = read_messages({k: v for k, v in record.items() if k != "completion"}, place)
    if messages is None:
        raise ValueError(f"{place} has neither a prompt nor messages")
    return messages


def continue_prompts(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Messages],
    settings: WritingSettings,
    done: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[list[Continuation]]:
    """Have the dense model continue prompts, a batch at a time.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        settings: how the model writes.
        done: how many prompts to skip because they were continued before, in complete batches.
        progress: called at every step with the number of tokens written.

    Yields:
        The continuations of a batch.
    """
    size = settings.batch_size or max(len(prompts), 1)
    write = Writer(model, settings.temperature, [settings.seed], progress)
    for start in range(done, len(prompts), size):
        encoded = [encode(tokenizer, messages) for messages in prompts[start : start + size]]
        lengths = [settings.tokens] * len(encoded)
        written = write(encoded, lengths, stop_sequences(tokenizer), start // size)
        yield [Continuation(*pair) for pair in zip(encoded, written, strict=True)]


def continue_all(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Messages],
    settings: WritingSettings,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Continuation]:
    """Have the dense model continue all prompts; see `continue_prompts`."""
    batches = continue_prompts(model, tokenizer, prompts, settings, progress=progress)
    return [text for batch in batches for text in batch]
