"""Changes to the header of a safetensors file, and to its bytes."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

from fuzzing.byte_mutations import mutate_bytes
from fuzzing.json_mutations import mutate_json, mutate_tree, to_text
from fuzzing.mutation import Expected, Mutation
from fuzzing.safetensors_file import METADATA, SafetensorsFile

_FLOATS = ("F16", "BF16", "F32", "F64")
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4}
_SIZES |= {"I32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "C64": 8}

Edit = Callable[[random.Random, SafetensorsFile], Mutation]


def mutate_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, Mutation]:
    """Change a safetensors file: its structure, or its bytes.

    Returns:
        The bytes of the mutated file, and what was changed.
    """
    file = SafetensorsFile.parse(content)
    kind = rng.random()
    if kind < 0.25:
        header = len(content) - len(file.data)
        edit = mutate_bytes(rng, content, header if rng.random() < 0.7 else None)
        if edit.content == content:
            return content, Mutation(edit.what, Expected.SAME)
        expected = Expected.SAME_IF_LOADED if edit.is_truncation else Expected.ANY
        return edit.content, Mutation(edit.what, expected)
    if kind < 0.35:
        change = mutate_json(rng, file.header)
        expected = Expected.SAME if change.keeps_meaning else Expected.SAME_IF_LOADED
        return file.content(change.content), Mutation(f"its header: {change.what}", expected)
    if kind < 0.4:
        extra = rng.choice([-8, -1, 1, 8, len(file.data), 2**31, 2**62, -(2**20)])
        mutated = file.content(extra_length=extra)
        return mutated, Mutation(f"it states {extra} more bytes of header", Expected.REFUSED)
    mutation = rng.choice(_EDITS)(rng, file)
    return file.content(), mutation


def _set_shape(rng: random.Random, file: SafetensorsFile) -> Mutation:
    name = rng.choice(file.names)
    entry = file.header[name]
    old = list(entry["shape"])
    choices: list[list[Any]] = [old[::-1], [*old, 1], [1, *old], [math.prod(old)], old[1:]]
    choices += [[2 * n for n in old], [-n for n in old], [0, *old], [2**63, 2], [2**31] * 3]
    entry["shape"] = rng.choice(choices)
    what = f"{name} has the shape {entry['shape']} instead of {old}"
    if entry["shape"] == old:
        return Mutation(what, Expected.SAME)
    # A number is the same in an array of one, and nothing is the same in every empty array.
    is_same = (old == [] and math.prod(entry["shape"]) == 1) or (
        math.prod(old) == math.prod(entry["shape"]) == 0
    )
    return Mutation(what, Expected.SAME_IF_LOADED if is_same else Expected.REFUSED)


def _set_dtype(rng: random.Random, file: SafetensorsFile) -> Mutation:
    name = rng.choice(file.names)
    entry = file.header[name]
    old = entry["dtype"]
    entry["dtype"] = new = rng.choice([*_SIZES, "f32", "", "F4", "F128"])
    expected = Expected.REFUSED
    is_number = entry["shape"] == [] and {new, old} <= {"I32", "U32"}
    if new == old or 0 in entry["shape"] or is_number:
        expected = Expected.SAME_IF_LOADED
    elif new in _FLOATS and old in _FLOATS and _SIZES[new] == _SIZES[old]:
        expected = Expected.ANY
    return Mutation(f"{name} has the dtype {new} instead of {old}", expected)


def _set_offsets(rng: random.Random, file: SafetensorsFile) -> Mutation:
    name, other = rng.sample(file.names, 2)
    entry, end = file.header[name], len(file.data)
    start, stop = old = entry["data_offsets"]
    size = stop - start
    choices = [[start + 4, stop + 4], [start, stop + 4], [start, stop - 4], [stop, start]]
    choices += [[end, end + size], [end - 4, end - 4 + size], [-size, 0], [start], []]
    choices += [file.header[other]["data_offsets"], [2**62, 2**62 + size], [0, 2**63]]
    entry["data_offsets"] = rng.choice(choices)
    what = f"{name} is at {entry['data_offsets']} instead of {old}"
    return Mutation(what, Expected.SAME if entry["data_offsets"] == old else Expected.REFUSED)


def _drop(rng: random.Random, file: SafetensorsFile) -> Mutation:
    name = rng.choice(file.names)
    del file.header[name]
    return Mutation(f"{name} is missing", Expected.REFUSED)


def _rename(rng: random.Random, file: SafetensorsFile) -> Mutation:
    name = rng.choice(file.names)
    new = rng.choice(
        ["", f"{name}_", name.upper(), name.replace(".", "..", 1), "\ud800", "x" * 999]
    )
    file.header[new] = file.header.pop(name)
    expected = Expected.SAME if new == name else Expected.REFUSED
    return Mutation(f"{name} is called {new[:40]!r}", expected)


def _add(rng: random.Random, file: SafetensorsFile) -> Mutation:
    """Add a tensor after the others."""
    end = len(file.data)
    file.data += bytes(16)
    name = rng.choice(["fuzz", "0", "", "model.layers.9.mlp.up_proj.weight", "a.b"])
    file.header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]}
    return Mutation(f"there is a further tensor {name!r}", Expected.SAME_IF_LOADED)


def _swap(rng: random.Random, file: SafetensorsFile) -> Mutation:
    one, two = rng.sample(file.names, 2)
    header = file.header
    header[one], header[two] = header[two], header[one]
    is_alike = all(header[one][key] == header[two][key] for key in ("shape", "dtype"))
    expected = Expected.ANY if is_alike else Expected.REFUSED
    return Mutation(f"{one} and {two} are swapped", expected)


def _set_metadata(rng: random.Random, file: SafetensorsFile) -> Mutation:
    tree = {METADATA: file.header.get(METADATA) or {"format": "mlx"}}
    mutated, what = mutate_tree(rng, tree)
    if isinstance(mutated, dict):
        file.header.pop(METADATA, None)
        file.header |= mutated
    return Mutation(what, Expected.SAME_IF_LOADED)


def _reorder(rng: random.Random, file: SafetensorsFile) -> Mutation:
    names = list(file.header)
    rng.shuffle(names)
    file.header = {name: file.header[name] for name in names}
    return Mutation("its header is in another order", Expected.SAME)


def _append(rng: random.Random, file: SafetensorsFile) -> Mutation:
    file.data += rng.randbytes(rng.choice([1, 8, 5000]))
    return Mutation("it has more bytes at its end", Expected.SAME_IF_LOADED)


_EDITS: tuple[Edit, ...] = (
    _set_shape,
    _set_shape,
    _set_dtype,
    _set_dtype,
    _set_offsets,
    _set_offsets,
    _drop,
    _rename,
    _add,
    _swap,
    _set_metadata,
    _reorder,
    _append,
)


def mutate_index(rng: random.Random, content: bytes) -> tuple[bytes, Mutation]:
    """Change the index of a model's weight files."""
    change = mutate_json(rng, json.loads(content))
    expected = Expected.SAME if change.keeps_meaning else Expected.SAME_IF_LOADED
    return change.content, Mutation(f"the index: {change.what}", expected)


def with_metadata(content: bytes, changes: dict[str, str]) -> bytes:
    """Return a safetensors file with further metadata."""
    file = SafetensorsFile.parse(content)
    file.header[METADATA] = file.header.get(METADATA, {}) | changes
    return file.content(to_text(file.header))
