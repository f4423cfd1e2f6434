"""Changes to the bytes of a file, without knowledge of its format."""

import random
from collections.abc import Callable
from dataclasses import dataclass

_MAX_BLOCK = 256
_EXTREME_INTEGERS = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


@dataclass(frozen=True)
class ByteEdit:
    """Mutated bytes.

    Attributes:
        content: the mutated bytes.
        what: a description of the change.
        start: the first byte that may differ.
        stop: the end of the bytes that may differ, or the file's end if the length changed.
        is_truncation: whether only the file's end is missing.
    """

    content: bytes
    what: str
    start: int
    stop: int
    is_truncation: bool = False


def mutate_bytes(rng: random.Random, content: bytes, limit: int | None = None) -> ByteEdit:
    """Change some bytes of a file.

    Args:
        rng: the source of choices.
        content: the file's bytes.
        limit: change only bytes before this position. Default: all.
    """
    position = rng.randrange(limit or len(content))
    return rng.choice(_EDITS)(rng, content, position)


def _overwrite(content: bytes, position: int, block: bytes, what: str) -> ByteEdit:
    block = block[: len(content) - position]
    stop = position + len(block)
    mutated = content[:position] + block + content[stop:]
    return ByteEdit(mutated, f"{what} at byte {position}", position, stop)


def _flip(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    flipped = bytes([content[position] ^ (1 << rng.randrange(8))])
    return _overwrite(content, position, flipped, "a bit is flipped")


def _randomize(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    return _overwrite(content, position, rng.randbytes(rng.randint(1, 8)), "bytes are random")


def _zero(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    size = rng.randint(1, _MAX_BLOCK)
    return _overwrite(content, position, bytes(size), f"{size} bytes are zero")


def _put_integer(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    size, value = rng.choice([4, 8]), rng.choice(_EXTREME_INTEGERS)
    block = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return _overwrite(content, position, block, f"the integer {value} is written")


def _truncate(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    what = f"it is cut to {position} of {len(content)} bytes"
    return ByteEdit(content[:position], what, position, len(content), is_truncation=True)


def _insert(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    block = rng.randbytes(rng.randint(1, _MAX_BLOCK))
    mutated = content[:position] + block + content[position:]
    what = f"{len(block)} random bytes are inserted at byte {position}"
    return ByteEdit(mutated, what, position, len(mutated))


def _duplicate(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    stop = min(len(content), position + rng.randint(1, _MAX_BLOCK))
    mutated = content[:stop] + content[position:]
    what = f"{stop - position} bytes at byte {position} are duplicated"
    return ByteEdit(mutated, what, position, len(mutated))


def _delete(rng: random.Random, content: bytes, position: int) -> ByteEdit:
    stop = min(len(content), position + rng.randint(1, _MAX_BLOCK))
    what = f"{stop - position} bytes at byte {position} are removed"
    return ByteEdit(content[:position] + content[stop:], what, position, len(content))


_EDITS: tuple[Callable[[random.Random, bytes, int], ByteEdit], ...] = (
    _flip,
    _randomize,
    _zero,
    _put_integer,
    _truncate,
    _insert,
    _duplicate,
    _delete,
)
