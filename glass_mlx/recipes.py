"""The texts that a prior is measured on: written by the model itself, or from a corpus."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from glass_mlx.files import one_line, sha256

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

KINDS = ("bos", "chat", "corpus")

# Of a sequence that begins with nothing, as many tokens do not count: decoding never sees such
# early positions, and their activations are unlike those of later ones (docs/experiments.md).
SKIPPED = 16

# The share of a sequence that the model may spend on the user's turn of a conversation.
_USER_SHARE = 4


@dataclass(frozen=True)
class Recipe:
    """One kind of text to measure a prior on.

    Attributes:
        kind: "bos", text that the model writes from the beginning-of-sequence token alone (null
            prompt stimulation, arXiv 2508.14302); "chat", where it writes a user's turn from the
            opening of its chat template and then answers it; or "corpus".
        weight: of its scores in the prior.
        file: the corpus: text, or JSONL with `messages`, `prompt` and `completion`, or `text`.
    """

    kind: str
    weight: float = 1.0
    file: Path | None = None

    @staticmethod
    def parse(text: str) -> "Recipe":
        """Read `bos`, `chat` or `corpus:FILE`, each with `=WEIGHT` at the end or without.

        Raises:
            ValueError: if it is none of these, or the weight is not positive.
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
        return Recipe(kind, weight, Path(file).expanduser() if file else None)

    def identity(self) -> dict[str, Any]:
        """What this recipe is, for the record; a corpus by its name and its contents' hash."""
        about = {"recipe": self.kind, "weight": self.weight}
        if self.file is None:
            return about
        if not self.file.is_file():
            raise FileNotFoundError(f"there is no corpus at {self.file}")
        return about | {"file": self.file.name, "sha256": sha256(self.file)}


@dataclass(frozen=True)
class Sequence:
    """A text to measure.

    Attributes:
        tokens: its token ids.
        counted: for each token whether it counts; the others are only context.
    """

    tokens: list[int]
    counted: list[int]


def null_token(tokenizer: TokenizerWrapper) -> int:
    """The token that stands before any text; models without one separate documents by EOS.

    Raises:
        ValueError: if there is neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither a beginning- nor an end-of-sequence token")


class Writer:
    """Samples text from a model, many sequences at once.

    Args:
        model: the model.
        temperature: of sampling.
        seed: the same seed and batch give the same text.
        progress: called with the number of tokens of every step.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        seed: list[int],
        progress: Callable[[int], object],
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature of sampling must be positive, not {temperature}")
        self.model, self.temperature = model, temperature
        self._seed, self._progress = seed, progress

    def __call__(
        self,
        prompts: list[list[int]],
        lengths: list[int],
        stop: list[list[int]],
        batch: int,
        turn: int = 0,
    ) -> list[list[int]]:
        """Continue prompts, each up to its own number of tokens.

        Args:
            prompts: the token ids to continue.
            lengths: how many tokens to write at most, for each.
            stop: sequences of token ids that end a text. They are part of what is returned.
            batch: the number of the batch, and with `turn` what makes the randomness its own.
            turn: the number of the turn within the batch.
        """
        state = np.random.SeedSequence([*self._seed, batch, turn]).generate_state(1)[0]
        key = mx.random.key(int(state))

        def sampler(logprobs: mx.array) -> mx.array:
            nonlocal key
            key, step = mx.random.split(key)
            return mx.random.categorical(logprobs / self.temperature, key=step)

        generator = BatchGenerator(
            self.model,
            sampler=sampler,
            stop_tokens=stop,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        with closing(generator):
            written = {uid: [] for uid in generator.insert(prompts, lengths)}
            while responses := generator.next_generated():
                for response in responses:
                    written[response.uid].append(response.token)
                self._progress(len(responses))
        return list(written.values())


def ends(tokenizer: TokenizerWrapper) -> list[list[int]]:
    """The end-of-sequence tokens, as what stops a `Writer`."""
    return [[token] for token in sorted(tokenizer.eos_token_ids)]


def _from_bos(
    writer: Writer, tokenizer: TokenizerWrapper, length: int, size: int, batch: int
) -> list[Sequence]:
    """Text after the beginning-of-sequence token, document after document."""
    start = null_token(tokenizer)
    written = writer([[start]] * size, [length] * size, [], batch)
    return [
        Sequence([start, *tokens], [int(n >= SKIPPED) for n in range(len(tokens) + 1)])
        for tokens in written
    ]


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around a user's turn, as token ids.

    Attributes:
        before: what opens the user's turn.
        after: what stands between it and the answer.
        end: the beginning of `after` that ends the turn.
    """

    before: list[int]
    after: list[int]
    end: list[int]


# Templates that write the date take it from here, so that the text is the same on every day.
_TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}


def chat_frame(tokenizer: TokenizerWrapper) -> ChatFrame:
    """What the chat template writes around a user's turn.

    Raises:
        ValueError: if there is no template, or it does not show the user's turn as it is.
    """
    if not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template; use the recipe bos")
    turn = "glass-mlx-user-turn"
    messages = [{"role": "user", "content": turn}]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"the model's chat template fails ({one_line(error)}); use the recipe bos"
        ) from error
    start, found, rest = text.partition(turn)
    if not (found and start and rest):
        raise ValueError("the model's chat template hides the user's turn; use the recipe bos")
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in (start, rest))
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.eos_token_ids}
    marks = [n for n, token in enumerate(after) if token in special]
    return ChatFrame(before, after, after[: marks[0] + 1] if marks else after)


def _from_chat(
    writer: Writer,
    tokenizer: TokenizerWrapper,
    frame: ChatFrame,
    length: int,
    size: int,
    batch: int,
) -> list[Sequence]:
    """Conversations of one turn each, the user's part written by the model, too."""
    stops = ends(tokenizer)
    most = max(1, length // _USER_SHARE)
    turns = []
    for turn in writer([frame.before] * size, [most] * size, [*stops, frame.end], batch):
        stop = next((end for end in (frame.end, *stops) if turn[-len(end) :] == end), [])
        turns.append(turn[: len(turn) - len(stop)])
    prompts = [[*frame.before, *turn, *frame.after] for turn in turns]
    rest = [length - len(turn) for turn in turns]
    answers = writer(prompts, rest, stops, batch, turn=1)
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        counted = [0] * len(prompt) + [1] * len(answer)
        if answer[-1] in tokenizer.eos_token_ids:  # decoding stops, and never reads it
            counted[-1] = 0
        sequences.append(Sequence([*prompt, *answer], counted))
    return [sequence for sequence in sequences if any(sequence.counted)]


def _documents(file: Path, field: str) -> Iterator[str | dict[str, Any]]:
    """The documents of a corpus: the records of a JSONL file, or a text file block by block."""
    with file.open(encoding="utf-8") as stream:
        try:
            if file.suffix != ".jsonl":
                while block := stream.read(1 << 16):
                    yield block
                return
            for n, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not {field, "messages", "prompt"} & {*record}:
                    raise ValueError(f"line {n} has neither {field} nor messages nor prompt")
                yield record
        except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, or ours
            raise ValueError(f"the corpus {file} cannot be read: {error}") from error


def _conversation(
    record: dict[str, Any], tokenizer: TokenizerWrapper
) -> tuple[list[int], list[int]]:
    """Tokens of a record with `messages` or `prompt`, counted from the first answer on."""
    messages = record.get("messages")
    if messages is None:
        pair = (("user", record["prompt"]), ("assistant", record.get("completion", "")))
        messages = [{"role": role, "content": content} for role, content in pair if content]
    if not tokenizer.has_chat_template:
        parts = [message["content"] for message in messages]
        tokens = tokenizer.encode("\n".join(parts))
        given = len(tokenizer.encode(parts[0]))
    else:
        first = [m["role"] for m in messages].index("assistant")
        tokens = tokenizer.apply_chat_template(messages, **_TEMPLATE_OPTIONS)
        given = len(
            tokenizer.apply_chat_template(
                messages[:first], add_generation_prompt=True, **_TEMPLATE_OPTIONS
            )
        )
    return tokens, [int(n >= given) for n in range(len(tokens))]


def _from_corpus(
    file: Path, field: str, tokenizer: TokenizerWrapper, length: int
) -> Iterator[Sequence]:
    """The texts of a corpus, long ones cut into windows that begin as a text does."""
    start = null_token(tokenizer)
    for document in _documents(file, field):
        if isinstance(document, dict) and field not in document:
            try:
                tokens, counted = _conversation(document, tokenizer)
            except Exception as error:  # the template's own, or a record of another shape
                raise ValueError(
                    f"the corpus {file} has a conversation that cannot be read: {one_line(error)}"
                ) from error
        else:
            text = document if isinstance(document, str) else document[field]
            if not isinstance(text, str):
                raise ValueError(f"the corpus {file} has a {field} that is not text: {text!r:.50}")
            tokens = [start, *tokenizer.encode(text, add_special_tokens=False)]
            counted = [int(n >= SKIPPED) for n in range(len(tokens))]
        for at in range(0, len(tokens), length + 1):
            window, flags = tokens[at : at + length + 1], counted[at : at + length + 1]
            if at > 0:
                window[0], flags[:SKIPPED] = start, [0] * min(SKIPPED, len(flags))
            if any(flags):
                yield Sequence(window, flags)


def source(
    recipe: Recipe,
    writer: Writer,
    tokenizer: TokenizerWrapper,
    length: int,
    frame: ChatFrame | None = None,
    field: str = "text",
    done: int = 0,
) -> Callable[[int, int], list[Sequence]]:
    """Return a function from (batch size, number of the batch) to the sequences of a batch.

    Args:
        recipe: which text.
        writer: what writes it.
        tokenizer: the model's tokenizer.
        length: tokens a sequence.
        frame: for chats, see `chat_frame`.
        field: the field of a JSONL corpus that has the text.
        done: how many sequences of a corpus were read before.

    Returns:
        The function. It returns fewer sequences, and in the end none, when a corpus has no more.
    """
    if recipe.file is not None:
        texts = _from_corpus(recipe.file, field, tokenizer, length)
        texts = islice(texts, done, None)
        return lambda size, batch: list(islice(texts, size))
    if frame is not None:
        return lambda size, batch: _from_chat(writer, tokenizer, frame, length, size, batch)
    return lambda size, batch: _from_bos(writer, tokenizer, length, size, batch)


def padded(sequences: list[Sequence]) -> tuple[mx.array, np.ndarray]:
    """Token ids and flags, both (B, T), padded on the right, where causal models do not look."""
    width = max(len(sequence.tokens) for sequence in sequences)
    ids, counted = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.tokens)] = sequence.tokens
        counted[row, : len(sequence.tokens)] = sequence.counted
    return mx.array(ids), counted
