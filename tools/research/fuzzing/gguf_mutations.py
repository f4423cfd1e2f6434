"""Changes to the metadata, the tensor infos and the header of a GGUF file."""

import copy
import random
from collections.abc import Callable
from typing import Any

from fuzzing.byte_mutations import mutate_bytes
from fuzzing.gguf_file import Array, Entry, GGUFFile, TensorInfo
from fuzzing.mutation import Expected, Mutation

import gguf
from gguf import GGMLQuantizationType, GGUFValueType

_INTEGERS = (0, 1, 2, 3, 5, 17, 65, 4096, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1)
_FLOATS = (0.0, -1.0, 1e-45, 1e-5, 1.0, 1e30, 3e38, float("nan"), float("inf"), -float("inf"))
_STRINGS = (
    *(b"", b"llama", b"gemma3", b"gpt2", b"linear", b"none", b"x" * 3000, b"\xff\xfe", b"a\0b"),
    *(b"\xed\xa0\x80", b"{{ messages[0] }}", b"{% for", b"\n", "é".encode()),
)
_WHOLE = {
    GGUFValueType.UINT8,
    GGUFValueType.INT8,
    GGUFValueType.UINT16,
    GGUFValueType.INT16,
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.UINT64,
    GGUFValueType.INT64,
}
_REAL = {GGUFValueType.FLOAT32, GGUFValueType.FLOAT64}
# Keys that only inform.
_INFORMING = (b"general.name", b"general.file_type", b"general.quantization_version")

Edit = Callable[[random.Random, GGUFFile], Mutation]


def mutate_gguf(rng: random.Random, seed: GGUFFile) -> tuple[bytes, Mutation]:
    """Change a GGUF file: its structure, or its bytes.

    Returns:
        The bytes of the mutated file, and what was changed.
    """
    if rng.random() < 0.3:
        return _mutate_bytes(rng, seed)
    file = copy.deepcopy(seed)
    edit = rng.choices([edit for edit, _ in _EDITS], [weight for _, weight in _EDITS])[0]
    mutation = edit(rng, file)
    return file.layout().content, mutation


def _mutate_bytes(rng: random.Random, seed: GGUFFile) -> tuple[bytes, Mutation]:
    content, infos, data = seed.layout()
    edit = mutate_bytes(rng, content, data if rng.random() < 0.8 else None)
    expected = Expected.ANY
    if edit.content == content:
        expected = Expected.SAME
    elif edit.is_truncation:  # there may be padding at the end
        expected = Expected.SAME_IF_LOADED
    elif edit.stop <= infos and len(edit.content) == len(content):
        expected = Expected.FINITE
    return edit.content, Mutation(edit.what, expected)


# --- Metadata -------------------------------------------------------------------------------------


def _odd_item(rng: random.Random, kind: int) -> Any:
    if kind in _WHOLE:
        return rng.choice(_INTEGERS)
    if kind in _REAL:
        return rng.choice(_FLOATS)
    if kind == GGUFValueType.BOOL:
        return rng.choice([0, 1, 2, 255])
    if kind == GGUFValueType.STRING:
        return rng.choice(_STRINGS)
    kind = rng.choice([k for k in GGUFValueType if k != GGUFValueType.ARRAY or rng.random() < 0.3])
    # Arrays of arrays are short, so that they end.
    sizes = [0, 1] if kind == GGUFValueType.ARRAY else [0, 1, 2, 300]
    return Array(kind, [_odd_item(rng, kind) for _ in range(rng.choice(sizes))])


def _category(kind: int) -> str:
    """Return which types can stand for each other."""
    if kind in _WHOLE:
        return "whole"
    return "real" if kind in _REAL else GGUFValueType(kind).name


def _shown(value: Any) -> str:
    return repr(value)[:50]


def _set_value(rng: random.Random, file: GGUFFile) -> Mutation:
    """Replace a value with one of its own type."""
    entry = rng.choice([e for e in file.entries if e.kind != GGUFValueType.ARRAY])
    entry.value = _odd_item(rng, entry.kind)
    what = f"{entry.key.decode()} is {_shown(entry.value)}"
    is_information = entry.key in _INFORMING
    return Mutation(what, Expected.SAME_IF_LOADED if is_information else Expected.FINITE)


def _set_type(rng: random.Random, file: GGUFFile) -> Mutation:
    """Replace a value with one of another type."""
    entry = rng.choice(file.entries)
    others = [kind for kind in GGUFValueType if _category(kind) != _category(entry.kind)]
    old, entry.kind = entry.kind, rng.choice(others)
    entry.value = _odd_item(rng, entry.kind)
    what = f"{entry.key.decode()} has the type {GGUFValueType(entry.kind).name}"
    # A whole number can stand for a real one.
    expected = Expected.SAME_IF_LOADED
    if old in _REAL and entry.kind in _WHOLE:
        expected = Expected.FINITE
    return Mutation(f"{what} and is {_shown(entry.value)}", expected)


def _widen(rng: random.Random, file: GGUFFile) -> Mutation:
    """Write the same number in a wider type."""
    entry = rng.choice([e for e in file.entries if e.kind == GGUFValueType.UINT32])
    entry.kind = rng.choice([GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.INT32])
    what = f"{entry.key.decode()} has the type {GGUFValueType(entry.kind).name}"
    return Mutation(what, Expected.SAME_IF_LOADED)


def _set_unknown_type(rng: random.Random, file: GGUFFile) -> Mutation:
    entry = rng.choice(file.entries)
    entry.kind = rng.choice([13, 99, 2**32 - 1])
    return Mutation(f"{entry.key.decode()} has the type {entry.kind}", Expected.REFUSED)


def _drop_entry(rng: random.Random, file: GGUFFile) -> Mutation:
    entry = rng.choice(file.entries)
    file.entries.remove(entry)
    expected = Expected.SAME if entry.key in _INFORMING else Expected.FINITE
    return Mutation(f"{entry.key.decode()} is missing", expected)


def _rename_entry(rng: random.Random, file: GGUFFile) -> Mutation:
    entry = rng.choice(file.entries)
    old = entry.key.decode()
    entry.key = rng.choice([b"", entry.key + b"_", b"\xff" + entry.key, entry.key.upper()])
    expected = Expected.SAME_IF_LOADED if old.encode() in _INFORMING else Expected.FINITE
    return Mutation(f"{old} is called {_shown(entry.key)}", expected)


def _duplicate_entry(rng: random.Random, file: GGUFFile) -> Mutation:
    entry = copy.deepcopy(rng.choice(file.entries))
    if entry.kind != GGUFValueType.ARRAY:
        entry.value = _odd_item(rng, entry.kind)
    file.entries.insert(rng.randint(0, len(file.entries)), entry)
    return Mutation(f"{entry.key.decode()} is there twice", Expected.REFUSED)


def _add_entry(rng: random.Random, file: GGUFFile) -> Mutation:
    kind = rng.choice(list(GGUFValueType))
    file.entries.insert(
        rng.randint(0, len(file.entries)), Entry(b"fuzz.key", kind, _odd_item(rng, kind))
    )
    return Mutation("it has an unknown key", Expected.SAME_IF_LOADED)


def _shuffle_entries(rng: random.Random, file: GGUFFile) -> Mutation:
    rng.shuffle(file.entries)
    return Mutation("its metadata is in another order", Expected.SAME)


def _change_array(rng: random.Random, file: GGUFFile) -> Mutation:
    """Change some items of an array, its length, or its type."""
    entry = rng.choice([e for e in file.entries if e.kind == GGUFValueType.ARRAY])
    array: Array = entry.value
    edits = ("item", "shorter", "longer", "duplicate", "empty", "kind", "stated length", "shuffle")
    edit = rng.choice(edits)
    index = rng.randrange(len(array.items))
    expected = Expected.FINITE
    if edit == "item":
        array.items[index] = _odd_item(rng, array.kind)
    elif edit == "shorter":
        del array.items[index:]
    elif edit == "longer":
        array.items += [array.items[index]] * rng.choice([1, 7, 1000])
    elif edit == "duplicate":
        array.items[index] = rng.choice(array.items)
    elif edit == "empty":
        array.items.clear()
    elif edit == "kind":
        array.kind = rng.choice([kind for kind in GGUFValueType if kind != array.kind])
        array.items = [_odd_item(rng, array.kind) for _ in array.items]
    elif edit == "stated length":
        array.length = rng.choice([len(array.items) + 1, len(array.items) - 1, 2**31, 2**63, 0])
        expected = Expected.REFUSED
    else:
        rng.shuffle(array.items)
    return Mutation(f"the array {entry.key.decode()} is changed: {edit}", expected)


def _change_special_id(rng: random.Random, file: GGUFFile) -> Mutation:
    entry = rng.choice([e for e in file.entries if e.key.endswith(b"token_id")])
    entry.value = rng.choice([0, 5, 259, 260, 261, 262, 263, 264, 280, 10**6, 2**31, 2**32 - 1])
    return Mutation(f"{entry.key.decode()} is {entry.value}", Expected.FINITE)


# --- Tensors --------------------------------------------------------------------------------------


def _drop_tensor(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor = rng.choice(file.tensors)
    file.tensors.remove(tensor)
    # The output is optional, and so is a bias; the tensors after it are where they were.
    return Mutation(f"{tensor.name.decode()} is missing", Expected.ANY)


def _duplicate_tensor(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor = copy.deepcopy(rng.choice(file.tensors))
    tensor.offset = rng.choice([tensor.offset, len(file.data)])
    file.tensors.append(tensor)
    return Mutation(f"{tensor.name.decode()} is there twice", Expected.REFUSED)


def _rename_tensor(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor = rng.choice(file.tensors)
    old = tensor.name
    names = (b"", b"blk.9.attn_q.weight", b"blk.-1.attn_q.weight", b"\xff", old + b"s", b"x" * 200)
    tensor.name = rng.choice([*names, old.replace(b"blk.0", b"blk.00"), old.upper()])
    expected = Expected.SAME if tensor.name == old else Expected.ANY
    if old.endswith(b"norm.weight") and tensor.name != old:
        expected = Expected.REFUSED
    return Mutation(f"{old.decode()} is called {_shown(tensor.name)}", expected)


def _swap_tensors(rng: random.Random, file: GGUFFile) -> Mutation:
    one, two = rng.sample(file.tensors, 2)
    one.name, two.name = two.name, one.name
    what = f"{one.name.decode()} and {two.name.decode()} are swapped"
    return Mutation(what, Expected.ANY if one.dims == two.dims else Expected.REFUSED)


def _shuffle_tensors(rng: random.Random, file: GGUFFile) -> Mutation:
    rng.shuffle(file.tensors)
    return Mutation("its tensors are listed in another order", Expected.SAME_IF_LOADED)


def _change_dims(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor = rng.choice(file.tensors)
    old = list(tensor.dims)
    index = rng.randrange(len(old))
    edit = rng.choice(("extreme", "less", "more", "reversed", "further", "fewer", "ones"))
    if edit == "extreme":
        tensor.dims[index] = rng.choice(_INTEGERS)
    elif edit == "less":
        tensor.dims[index] //= 2
    elif edit == "more":
        tensor.dims[index] += rng.choice([1, 32, 256])
    elif edit == "reversed":
        tensor.dims.reverse()
    elif edit == "further":
        tensor.dims += [rng.choice([0, 1, 2])] * rng.choice([1, 3, 100])
    elif edit == "fewer":
        tensor.dims.pop()
    else:
        tensor.dims.append(1)
    expected = Expected.REFUSED
    if tensor.dims[: len(old)] == old and set(tensor.dims[len(old) :]) <= {1}:
        expected = Expected.SAME_IF_LOADED
    return Mutation(f"{tensor.name.decode()} has the dims {_shown(tensor.dims)}", expected)


def _bytes_of(tensor: TensorInfo) -> int | None:
    """Return the size of a tensor's data, or None if its format is not known."""
    if tensor.kind not in gguf.GGML_QUANT_SIZES:
        return None
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count // block * size


def _change_kind(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor = rng.choice(file.tensors)
    old, size = tensor.kind, _bytes_of(tensor)
    tensor.kind = rng.choice([*GGMLQuantizationType, 4, 5, 100, 2**32 - 1])
    expected = Expected.ANY if _bytes_of(tensor) == size else Expected.REFUSED
    if tensor.kind == old:
        expected = Expected.SAME
    return Mutation(f"{tensor.name.decode()} has the format {int(tensor.kind)}", expected)


def _change_offset(rng: random.Random, file: GGUFFile) -> Mutation:
    tensor, other = rng.sample(file.tensors, 2)
    end = len(file.data)
    shifts = [tensor.offset + 1, tensor.offset + 32, other.offset, end, end - 1, end + 32]
    tensor.offset = rng.choice([*shifts, 2**31, 2**63, 2**64 - 32])
    return Mutation(f"{tensor.name.decode()} begins at {tensor.offset}", Expected.REFUSED)


# --- Header ---------------------------------------------------------------------------------------


def _change_counts(rng: random.Random, file: GGUFFile) -> Mutation:
    extra = rng.choice([-1, 1, 5, 2**31, 2**40, 2**63 - 1])
    if rng.random() < 0.5:
        file.extra_entries = extra
        return Mutation(f"the header states {extra} more entries", Expected.REFUSED)
    file.extra_tensors = extra
    return Mutation(f"the header states {extra} more tensors", Expected.REFUSED)


def _change_header(rng: random.Random, file: GGUFFile) -> Mutation:
    edit = rng.choice(("magic", "version", "order"))
    if edit == "magic":
        file.magic = rng.choice([b"GGUf", b"FUGG", b"\0\0\0\0", b"PK\x03\x04", b"ggml"])
    elif edit == "version":
        file.version = rng.choice([0, 1, 4, 65536, 2**32 - 1, 3 << 24])
    else:
        file.order = ">"
    return Mutation(f"the header's {edit} is changed", Expected.REFUSED)


def _set_alignment(rng: random.Random, file: GGUFFile) -> Mutation:
    value = rng.choice([0, 1, 3, 8, 16, 32, 64, 4096, 2**31, 2**32 - 1])
    file.entries.insert(0, Entry(b"general.alignment", GGUFValueType.UINT32, value))
    return Mutation(f"general.alignment is {value}", Expected.ANY if value != 32 else Expected.SAME)


def _append(rng: random.Random, file: GGUFFile) -> Mutation:
    file.data += rng.randbytes(rng.choice([1, 32, 10000]))
    return Mutation("it has more bytes at its end", Expected.SAME_IF_LOADED)


def _nothing(rng: random.Random, file: GGUFFile) -> Mutation:
    return Mutation("nothing is changed", Expected.SAME)


# Edits and how often they are chosen.
_EDITS: tuple[tuple[Edit, int], ...] = (
    (_set_value, 6),
    (_set_type, 5),
    (_change_array, 5),
    (_change_special_id, 2),
    (_drop_entry, 2),
    (_rename_entry, 1),
    (_duplicate_entry, 1),
    (_add_entry, 1),
    (_widen, 1),
    (_set_unknown_type, 1),
    (_shuffle_entries, 1),
    (_drop_tensor, 2),
    (_rename_tensor, 2),
    (_duplicate_tensor, 1),
    (_swap_tensors, 1),
    (_shuffle_tensors, 1),
    (_change_dims, 4),
    (_change_kind, 3),
    (_change_offset, 3),
    (_change_counts, 2),
    (_change_header, 1),
    (_set_alignment, 1),
    (_append, 1),
    (_nothing, 1),
)
