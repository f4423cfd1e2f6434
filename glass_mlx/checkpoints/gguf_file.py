"""Read the structure of a GGUF file: its header, its metadata and where its tensors lie.

The layout follows the GGUF specification (docs/gguf.md in the ggml repository). Every count and
offset is compared with the size of the file before it is used, so a damaged file ends in one
sentence, and no more memory is taken than the file has bytes for.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

from glass_mlx.checkpoints.gguf_blocks import can_read, readable_names
from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata, Value

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
# The fewest bytes that one metadata key, or the description of one tensor, takes.
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_DEFAULT_ALIGNMENT = 32

_NUMBERS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class GGUFTensor(NamedTuple):
    """A tensor whose data stays in the mapped file.

    Attributes:
        name: llama.cpp's name.
        kind: how the numbers are stored.
        shape: as in NumPy, rows first.
        data: uint8, (rows, bytes per row).
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """Return the numbers in float32."""
        values = gguf.dequantize(self.data.view(_stored_type(self.kind)), self.kind)
        return np.asarray(values, np.float32).reshape(self.shape)


class GGUFFile(NamedTuple):
    """A GGUF file.

    Attributes:
        metadata: the key-value part.
        tensors: all tensors by name, in the order of the file.
    """

    metadata: Metadata
    tensors: dict[str, GGUFTensor]


class _TensorInfo(NamedTuple):
    """What the header says of one tensor; the offset counts from the start of all data."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file; tensors stay on disk until they are used.

    Raises:
        GGUFError: if it is not a GGUF file, is damaged, or is of a kind that cannot be read.
    """
    if path.stat().st_size == 0:
        raise GGUFError("it is not a complete GGUF file: it is empty")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(data)
    tensor_count, key_count = _read_header(cursor, path)
    metadata = _read_metadata(cursor, key_count)
    infos = _read_tensor_infos(cursor, tensor_count)
    alignment = metadata.integer("general.alignment", _DEFAULT_ALIGNMENT, low=1)
    if alignment & (alignment - 1):
        raise GGUFError(f"its general.alignment is {alignment}, not a power of two")
    start = _round_up(cursor.offset, alignment)
    _check_offsets(infos, alignment, len(data) - start)
    tensors = {}
    for info in infos:
        first = start + info.offset
        rows = data[first : first + info.nbytes].reshape(-1, info.row_bytes)
        tensors[info.name] = GGUFTensor(info.name, info.kind, info.shape, rows)
    return GGUFFile(metadata, tensors)


class _Cursor:
    """Reads the header from its start to its end, and never beyond the end of the file."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = memoryview(data.data)
        self.offset = 0

    def check(self, size: int, what: str) -> None:
        """Raise an error if fewer than `size` bytes are left."""
        if size > len(self._data) - self.offset:
            raise GGUFError(
                f"it is not a complete GGUF file: it ends after {len(self._data)} bytes, "
                f"inside {what}"
            )

    def take(self, size: int, what: str) -> bytes:
        """Return the next bytes; `what` they belong to is for the message if they are missing."""
        self.check(size, what)
        self.offset += size
        return self._data[self.offset - size : self.offset].tobytes()

    def number(self, form: str, what: str) -> int:
        """Return the next number, in one of `struct`'s formats for integers."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, what: str, errors: str = "strict") -> str:
        """Return the next string."""
        try:
            return self.take(self.number("<Q", what), what).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} holds a string that is not UTF-8") from error


def _read_header(cursor: _Cursor, path: Path) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata keys."""
    magic = cursor.take(len(_MAGIC), "its header")
    if magic != _MAGIC:
        raise GGUFError(f"it is not a GGUF file: it starts with {magic!r}")
    version = cursor.number("<I", "its header")
    if version & 0xFFFF == 0:
        raise GGUFError(
            "it is big-endian, and only little-endian files can be read; "
            f"convert a copy of it with: gguf-convert-endian {path.name} little"
        )
    if version not in _VERSIONS:
        raise GGUFError(f"it is of GGUF version {version}; only versions 2 and 3 can be read")
    tensor_count = cursor.number("<Q", "its header")
    key_count = cursor.number("<Q", "its header")
    cursor.check(key_count * _MIN_KEY_BYTES, f"its {key_count} metadata keys")
    cursor.check(tensor_count * _MIN_TENSOR_BYTES, f"the list of its {tensor_count} tensors")
    return tensor_count, key_count


def _read_metadata(cursor: _Cursor, count: int) -> Metadata:
    values: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.text("its metadata")
        if key in values:
            raise GGUFError(f"its metadata has {key} twice")
        values[key] = _read_value(cursor, key)
    return Metadata(values)


def _read_value(cursor: _Cursor, key: str) -> Value:
    what = f"the value of {key}"
    kind = cursor.number("<I", what)
    if kind == GGUFValueType.STRING:
        # Descriptions may be in any encoding, and nothing depends on them.
        return cursor.text(what, "replace")
    if kind == GGUFValueType.ARRAY:
        return _read_array(cursor, what)
    return _read_numbers(cursor, kind, 1, what)[0].item()


def _read_array(cursor: _Cursor, what: str) -> Value:
    kind = cursor.number("<I", what)
    if kind == GGUFValueType.STRING:
        return [cursor.text(what) for _ in range(cursor.number("<Q", what))]
    return _read_numbers(cursor, kind, cursor.number("<Q", what), what)


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    dtype = next((dtype for known, dtype in _NUMBERS.items() if known == kind), None)
    if dtype is None:
        raise GGUFError(f"{what} is of type {kind}, which cannot be read")
    values = np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)
    return values != 0 if kind == GGUFValueType.BOOL else values


def _read_tensor_infos(cursor: _Cursor, count: int) -> list[_TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    for _ in range(count):
        name = cursor.text("the list of its tensors")
        if name in infos:
            raise GGUFError(f"it has two tensors {name}")
        infos[name] = _read_tensor_info(cursor, name)
    return list(infos.values())


def _read_tensor_info(cursor: _Cursor, name: str) -> _TensorInfo:
    what = f"the description of its tensor {name}"
    dims = cursor.number("<I", what)
    if not 1 <= dims <= _MAX_DIMS:
        raise GGUFError(f"its tensor {name} has {dims} dimensions, not 1 to {_MAX_DIMS}")
    shape = tuple(cursor.number("<Q", what) for _ in range(dims))[::-1]
    if 0 in shape:
        raise GGUFError(f"its tensor {name} of shape {shape} is empty")
    number = cursor.number("<I", what)
    if not can_read(number):
        raise GGUFError(
            f"its tensor {name} has the quantization type {_type_name(number)}, which cannot be "
            f"read; these can: {', '.join(readable_names())}"
        )
    kind = GGMLQuantizationType(number)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise GGUFError(
            f"its tensor {name} has rows of {shape[-1]} numbers, "
            f"which are not whole blocks of {block} as {kind.name} has them"
        )
    return _TensorInfo(name, kind, shape, cursor.number("<Q", what))


def _type_name(number: int) -> str:
    try:
        return f"{GGMLQuantizationType(number).name} ({number})"
    except ValueError:
        return str(number)


def _check_offsets(infos: list[_TensorInfo], alignment: int, size: int) -> None:
    """Check that tensors lie one after another, as llama.cpp demands, and inside the file.

    Args:
        infos: all tensors, in the order of the header.
        alignment: every tensor starts at a multiple of it.
        size: the number of bytes that the file has for the tensors.
    """
    expected = 0
    for info in infos:
        if info.offset != expected:
            raise GGUFError(
                f"its tensor {info.name} is said to start at byte {info.offset} of the data, "
                f"but the tensor before it ends at byte {expected}"
            )
        if info.offset + info.nbytes > size:
            raise GGUFError(
                f"it is not a complete GGUF file: its tensor {info.name} goes "
                f"{info.offset + info.nbytes - size} bytes beyond the end"
            )
        expected = _round_up(info.offset + info.nbytes, alignment)


def _round_up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _stored_type(kind: GGMLQuantizationType) -> np.dtype:
    """Return the type of array that `gguf.dequantize` takes."""
    floats = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
    return np.dtype(floats.get(kind, np.uint8))
