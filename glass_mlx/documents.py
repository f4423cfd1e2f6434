"""Text and JSONL files of users: prompts, corpora and tasks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glass_mlx.chat_templates import Messages
from glass_mlx.errors import check_text, one_line, parse_json


def is_jsonl(file: Path) -> bool:
    """Return whether a file's name is that of JSONL."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def read_lines(file: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, without line ends.

    A byte order mark at the beginning and Windows' line ends are left out.

    Args:
        file: the file.
        name: what it holds, for messages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is a folder, a device, a JSON file, or not UTF-8 text.
    """
    if file.is_dir():
        raise ValueError(f"the {name} {file} is a folder; give the name of a file")
    if not file.exists():
        raise FileNotFoundError(f"there is no {name} at {file}")
    if not file.is_file() and not file.is_fifo():
        raise ValueError(f"the {name} {file} is neither a file nor a pipe")
    if file.suffix.lower() == ".json":
        raise ValueError(
            f"the {name} {file} is JSON; give text, or JSONL with an object on each line, which "
            f"jq -c '.[]' {file} makes from a list"
        )
    with file.open("rb") as stream:
        for n, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {n} of the {name} {file} is not UTF-8 text") from error
            yield n, text.rstrip("\r\n")


def read_records(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON objects of a JSONL file, each with its place for messages.

    Args:
        file: the file. Empty lines are left out.
        name: what it holds, for messages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8 text, or a line is not a JSON object.
    """
    for n, line in read_lines(file, name):
        if not line.strip():
            continue
        place = f"line {n} of the {name} {file}"
        yield place, parse_record(line, place)


def parse_record(line: str, place: str) -> dict[str, Any]:
    """Return the JSON object on a line.

    Raises:
        ValueError: if the line is not a JSON object; the message begins with the place.
    """
    record = parse_json(line, place)
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object, but {shorten(record)}")
    return record


def read_messages(record: dict[str, Any], place: str) -> Messages | None:
    """Return the messages of a record, or None if it has none.

    Args:
        record: a JSON object with `messages`; with `prompt` and perhaps `completion`; or with
            `conversations` in the form of ShareGPT.
        place: where the record is, for messages.

    Raises:
        ValueError: if the messages are malformed, with the reason.
    """
    if record.get("messages") is not None:
        return _checked_messages(record["messages"], place)
    if record.get("conversations") is not None:
        return _checked_messages(_from_sharegpt(record["conversations"], place), place)
    if record.get("prompt") is None:
        return None
    messages = [{"role": "user", "content": read_content(record["prompt"], f"{place}, prompt,")}]
    if record.get("completion") is not None:
        answer = read_content(record["completion"], f"{place}, completion,")
        messages.append({"role": "assistant", "content": answer})
    return messages


def read_content(content: Any, place: str) -> str:
    """Return the text of a message: text, or a list of parts of the type "text".

    Raises:
        ValueError: if there are parts of other types, or the content is not text.
    """
    if isinstance(content, str):
        return check_text(content, place)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{place} is not text, but {shorten(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"{place} has a part that is not text, but {shorten(part)}")
        texts.append(check_text(text, place))
    return "".join(texts)


def _checked_messages(messages: Any, place: str) -> Messages:
    """Return messages with role and text."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place} has no messages, but {shorten(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place} has a message without a role: {shorten(message)}")
    return [
        {
            "role": message["role"],
            "content": read_content(message.get("content"), f"{place}, message {n},"),
        }
        for n, message in enumerate(messages, 1)
    ]


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def _from_sharegpt(turns: Any, place: str) -> list[dict[str, Any]]:
    """Turn a conversation of ShareGPT (`from` and `value`) into messages."""
    if not isinstance(turns, list):
        raise ValueError(f"{place} has conversations that are not a list, but {shorten(turns)}")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in _SHAREGPT_ROLES:
            raise ValueError(
                f"{place} has a turn that is not from {', '.join(_SHAREGPT_ROLES)}: {shorten(turn)}"
            )
    return [{"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]


def shorten(value: Any) -> str:
    """Return the beginning of a JSON value on one line, for messages."""
    text = one_line(json.dumps(value, ensure_ascii=True))
    return text if len(text) <= 50 else f"{text[:50]} ..."
