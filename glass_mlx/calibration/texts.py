"""The texts that a prior is measured on: written by the model itself, or from a corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from glass_mlx.chat import Messages
from glass_mlx.documents import is_jsonl, read_content, read_lines, read_messages, read_records
from glass_mlx.errors import one_line
from glass_mlx.files import expand_user, sha256
from glass_mlx.writing import Writer, stop_sequences

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

KINDS = ("bos", "chat", "corpus")

# The first positions of a text that starts without context do not count: decoding never reaches
# such early positions, and their activations differ from those of later ones (docs/experiments.md).
SKIPPED_POSITIONS = 16

# A text file is tokenized in blocks of this many lines.
_LINES_PER_BLOCK = 1024

# The largest share of a sequence that the user's turn of a conversation takes.
_USER_SHARE = 1 / 4


@dataclass(frozen=True)
class Recipe:
    """One kind of text to measure a prior on.

    Attributes:
        kind: "bos", text that the model writes from the beginning-of-sequence token alone (null
            prompt stimulation, arXiv 2508.14302); "chat", where the model writes a user's turn from
            the opening of its chat template and then answers it; or "corpus".
        weight: the weight of the text's scores in the prior.
        file: the corpus: text, or JSONL with `text`, or as in `documents.read_messages`.
    """

    kind: str
    weight: float = 1.0
    file: Path | None = None

    @staticmethod
    def parse(text: str) -> "Recipe":
        """Parse `bos`, `chat` or `corpus:FILE`, each with an optional `=WEIGHT` at the end.

        Raises:
            ValueError: if the text is not a recipe, or the weight is not positive.
        """
        name, _, number = text.rpartition("=")
        try:
            weight = float(number) if name else 1.0
        except ValueError:  # an equals sign in a file name
            name, weight = "", 1.0
        kind, _, file = (name or text).partition(":")
        if kind not in KINDS or (kind == "corpus") != bool(file):
            raise ValueError(f"{text!r} is not a recipe; bos, chat and corpus:FILE are")
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of the recipe {text!r} must be positive")
        return Recipe(kind, weight, expand_user(file) if file else None)

    @property
    def name(self) -> str:
        """The recipe as the user names it."""
        return self.kind if self.file is None else f"{self.kind}:{self.file}"

    def identity(self) -> dict[str, Any]:
        """Return a record of this recipe. It identifies a corpus by its name and contents.

        Raises:
            FileNotFoundError: if the corpus does not exist.
        """
        record: dict[str, Any] = {"recipe": self.kind, "weight": self.weight}
        if self.file is None:
            return record
        if not self.file.exists():
            raise FileNotFoundError(f"there is no corpus at {self.file}")
        if not self.file.is_file():  # a pipe could be read only once
            raise ValueError(f"the corpus {self.file} is not a regular file; save it to one")
        return record | {"file": self.file.name, "sha256": sha256(self.file)}


@dataclass(frozen=True)
class Sequence:
    """A text to measure.

    Attributes:
        tokens: its token ids.
        mask: one flag per token: 1 if the token counts, 0 if it is only context.
    """

    tokens: list[int]
    mask: list[int]


# Maps the size and the number of a batch to its sequences.
BatchSource = Callable[[int, int], list[Sequence]]


def null_token(tokenizer: TokenizerWrapper) -> int:
    """Return the token that comes before any text: BOS, or EOS for models without BOS.

    Raises:
        ValueError: if the tokenizer has neither token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a beginning- nor an end-of-sequence token")


def _write_from_bos(
    writer: Writer, tokenizer: TokenizerWrapper, length: int, size: int, batch: int
) -> list[Sequence]:
    """Write texts that start with the beginning-of-sequence token and run past document ends."""
    start = null_token(tokenizer)
    continuations = writer([[start]] * size, [length] * size, [], batch)
    return [
        Sequence([start, *tokens], [int(n >= SKIPPED_POSITIONS) for n in range(len(tokens) + 1)])
        for tokens in continuations
    ]


@dataclass(frozen=True)
class ChatFrame:
    """The tokens that a chat template writes around a user's turn.

    Attributes:
        before: the tokens that open the user's turn.
        after: the tokens between the turn and the answer.
        end: the first tokens of `after`, which end the turn.
    """

    before: list[int]
    after: list[int]
    end: list[int]


# Templates that contain the date use this date, so the text does not depend on the day.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}


def chat_frame(tokenizer: TokenizerWrapper) -> ChatFrame:
    """Return the tokens that the chat template writes around a user's turn.

    Raises:
        ValueError: if there is no template, or it does not reproduce the user's turn.
    """
    if not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template; use the recipe bos")
    turn = "glass-mlx-user-turn"
    messages = [{"role": "user", "content": turn}]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS
        )
    except Exception as error:  # templates raise any kind of error
        raise ValueError(
            f"the model's chat template fails ({one_line(error)}); use the recipe bos"
        ) from error
    opening, separator, rest = text.partition(turn)
    if not (separator and opening and rest):
        raise ValueError("the model's chat template hides the user's turn; use the recipe bos")
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in (opening, rest))
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.eos_token_ids}
    ends = [n for n, token in enumerate(after) if token in special]
    return ChatFrame(before, after, after[: ends[0] + 1] if ends else after)


def _write_chats(
    writer: Writer,
    tokenizer: TokenizerWrapper,
    frame: ChatFrame,
    length: int,
    size: int,
    batch: int,
) -> list[Sequence]:
    """Write conversations of one question and one answer, both by the model."""
    stops = stop_sequences(tokenizer)
    max_turn = max(1, int(length * _USER_SHARE))
    turns = []
    for turn in writer([frame.before] * size, [max_turn] * size, [*stops, frame.end], batch):
        stop = next((end for end in (frame.end, *stops) if turn[-len(end) :] == end), [])
        turns.append(turn[: len(turn) - len(stop)])
    prompts = [[*frame.before, *turn, *frame.after] for turn in turns]
    answers = writer(prompts, [length - len(turn) for turn in turns], stops, batch, turn=1)
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        mask = [0] * len(prompt) + [1] * len(answer)
        if answer[-1] in tokenizer.eos_token_ids:  # decoding does not read it
            mask[-1] = 0
        sequences.append(Sequence([*prompt, *answer], mask))
    return [sequence for sequence in sequences if any(sequence.mask)]


def _read_documents(file: Path, field: str) -> Iterator[str | Messages]:
    """Yield the documents of a corpus: texts, or conversations with an answer.

    A text file is read in blocks of lines, and a JSONL file has one document per line.
    """
    if not is_jsonl(file):
        block: list[str] = []
        for n, line in read_lines(file, "corpus"):
            block.append(line)
            if n % _LINES_PER_BLOCK == 0:
                yield "\n".join(block)
                block = []
        yield "\n".join(block)
        return
    for place, record in read_records(file, "corpus"):
        if record.get(field) is not None:
            yield read_content(record[field], f"{place}, {field},")
        elif messages := read_messages(record, place):
            yield messages
        else:
            raise ValueError(f"{place} has neither {field} nor messages nor prompt")


def _encode_conversation(
    messages: Messages, tokenizer: TokenizerWrapper
) -> tuple[list[int], list[int]]:
    """Encode a conversation.

    Returns:
        Token ids, and a mask that is 1 from the first answer on. Without an answer, nothing counts.
    """
    if not tokenizer.has_chat_template:
        texts = [message["content"] for message in messages]
        tokens = tokenizer.encode("\n".join(texts))
        context = len(tokenizer.encode(texts[0]))
        return tokens, [int(n >= context) for n in range(len(tokens))]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return [], []
    first = roles.index("assistant")
    tokens = tokenizer.apply_chat_template(messages, **TEMPLATE_OPTIONS)
    context = 0
    if first > 0:
        before = messages[:first]
        context = len(
            tokenizer.apply_chat_template(before, add_generation_prompt=True, **TEMPLATE_OPTIONS)
        )
    return tokens, [int(n >= context) for n in range(len(tokens))]


def _read_corpus(
    file: Path, field: str, tokenizer: TokenizerWrapper, length: int
) -> Iterator[Sequence]:
    """Yield the texts of a corpus, cut into windows that each start like a new text."""
    start = null_token(tokenizer)
    for document in _read_documents(file, field):
        if isinstance(document, list):
            try:
                tokens, mask = _encode_conversation(document, tokenizer)
            except Exception as error:  # templates raise exceptions of any type
                raise ValueError(
                    f"the corpus {file} has a conversation that the model's chat template does not "
                    f"accept: {one_line(error)}"
                ) from error
        else:
            tokens = [start, *tokenizer.encode(document, add_special_tokens=False)]
            mask = [int(n >= SKIPPED_POSITIONS) for n in range(len(tokens))]
        if any(mask[: length + 1]):
            yield Sequence(tokens[: length + 1], mask[: length + 1])
        for at in range(length + 1, len(tokens), length):  # the start token comes in addition
            window, flags = [start, *tokens[at : at + length]], [0, *mask[at : at + length]]
            flags[:SKIPPED_POSITIONS] = [0] * min(SKIPPED_POSITIONS, len(flags))
            if any(flags):
                yield Sequence(window, flags)


def make_source(
    recipe: Recipe,
    writer: Writer,
    tokenizer: TokenizerWrapper,
    length: int,
    frame: ChatFrame | None = None,
    field: str = "text",
    done: int = 0,
) -> BatchSource:
    """Return a function that writes or reads the next batch of sequences.

    Args:
        recipe: the kind of text.
        writer: writes the text, unless it comes from a corpus.
        tokenizer: the model's tokenizer.
        length: tokens per sequence.
        frame: for chats; see `chat_frame`.
        field: the field of a JSONL corpus that holds the text.
        done: how many sequences of a corpus to skip because they have been measured before.

    Returns:
        A function from the size and the number of a batch to its sequences. At the end of a corpus
        it returns fewer sequences, and then none.
    """
    if recipe.file is not None:
        texts = islice(_read_corpus(recipe.file, field, tokenizer, length), done, None)
        return lambda size, batch: list(islice(texts, size))
    if frame is not None:
        return lambda size, batch: _write_chats(writer, tokenizer, frame, length, size, batch)
    return lambda size, batch: _write_from_bos(writer, tokenizer, length, size, batch)


def pad(sequences: list[Sequence]) -> tuple[mx.array, np.ndarray]:
    """Pad sequences on the right, where causal models do not look.

    Returns:
        Token ids and mask, both (B, T) for the B sequences and the longest length T.
    """
    width = max(len(sequence.tokens) for sequence in sequences)
    ids, mask = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.tokens)] = sequence.tokens
        mask[row, : len(sequence.tokens)] = sequence.mask
    return mx.array(ids), mask
