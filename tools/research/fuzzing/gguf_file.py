"""The parts of a GGUF file, which can hold what no writer would write.

The layout follows the GGUF specification (ggml/docs/gguf.md): header, metadata, tensor infos,
padding to the alignment, tensor data.
"""

import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gguf import GGUFValueType

ALIGNMENT = 32
_NUMBERS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass
class Array:
    """An array in the metadata.

    Attributes:
        kind: the type of its items, a `GGUFValueType` or any other number.
        items: its items.
        length: the length that the file states. Default: the number of items.
    """

    kind: int
    items: list[Any]
    length: int | None = None


@dataclass
class Entry:
    """A key of the metadata and its value; strings are bytes."""

    key: bytes
    kind: int
    value: Any


@dataclass
class TensorInfo:
    """The description of a tensor; `dims` has the fastest dimension first."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int


class Layout(NamedTuple):
    """The bytes of a file, where its tensor infos begin, and where its tensor data begin."""

    content: bytes
    infos: int
    data: int


@dataclass
class GGUFFile:
    """A GGUF file, valid or not.

    Attributes:
        entries: the metadata.
        tensors: the descriptions of tensors.
        data: the tensor data.
        magic: the first four bytes.
        version: the version of the format.
        extra_entries: how many more entries the header states than there are.
        extra_tensors: how many more tensors the header states than there are.
        order: "<" or ">", the byte order of everything but the tensor data.
    """

    entries: list[Entry]
    tensors: list[TensorInfo]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    extra_entries: int = 0
    extra_tensors: int = 0
    order: str = field(default="<")

    def layout(self) -> Layout:
        """Write the file."""
        head = self.magic + self._number("I", self.version)
        head += self._number("Q", len(self.tensors) + self.extra_tensors)
        head += self._number("Q", len(self.entries) + self.extra_entries)
        head += b"".join(
            self._string(entry.key)
            + self._number("I", entry.kind)
            + self._value(entry.kind, entry.value)
            for entry in self.entries
        )
        infos = b"".join(map(self._info, self.tensors))
        start = len(head) + len(infos)
        padding = -start % ALIGNMENT
        return Layout(head + infos + bytes(padding) + self.data, len(head), start + padding)

    def _number(self, code: str, value: float) -> bytes:
        """Write a number, which is cut to the bits that there are."""
        if code in "fd":
            try:
                return struct.pack(self.order + code, value)
            except OverflowError:
                return struct.pack(self.order + code, float("inf"))
        bits = 8 * struct.calcsize(code)
        whole = int(value) % (1 << bits)
        if code.islower() and whole >= 1 << (bits - 1):
            whole -= 1 << bits
        return struct.pack(self.order + code, whole)

    def _string(self, text: bytes) -> bytes:
        return self._number("Q", len(text)) + text

    def _value(self, kind: int, value: Any) -> bytes:
        if isinstance(value, Array):
            length = len(value.items) if value.length is None else value.length
            items = b"".join(self._value(value.kind, item) for item in value.items)
            return self._number("I", value.kind) + self._number("Q", length) + items
        if isinstance(value, bytes):
            return self._string(value)
        return self._number(_NUMBERS.get(kind, "I"), value)

    def _info(self, info: TensorInfo) -> bytes:
        dims = b"".join(self._number("Q", dim) for dim in info.dims)
        return (
            self._string(info.name)
            + self._number("I", len(info.dims))
            + dims
            + self._number("I", info.kind)
            + self._number("Q", info.offset)
        )
