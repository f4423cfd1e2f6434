"""Changes to the metadata of a prompt cache: layers, their kinds, their numbers, and messages."""

import json
import random
import re
from collections.abc import Callable

from fuzzing.json_mutations import mutate_json
from fuzzing.mutation import Expected, Mutation
from fuzzing.safetensors_file import SafetensorsFile

import numpy as np

# Keys of mlx-lm's metadata: user's entries, the class of each layer, which arrays are scalars.
_USER, _CLASS, _SCALAR = "0.", "1.", "2."
_CLASSES = ("KVCache", "RotatingKVCache", "QuantizedKVCache", "ArraysCache", "ChunkedKVCache")
_NO_CLASSES = ("", "dict", "List", "mx", "create_causal_mask", "__builtins__", "_BaseCache", "1")

Edit = Callable[[random.Random, SafetensorsFile], Mutation]


def mutate_cache(rng: random.Random, content: bytes) -> tuple[bytes, Mutation]:
    """Change a prompt cache; return the file and the change."""
    file = SafetensorsFile.parse(content)
    mutation = rng.choice(_EDITS)(rng, file)
    return file.content(), mutation


def _set_class(rng: random.Random, file: SafetensorsFile) -> Mutation:
    key = rng.choice([key for key in file.metadata if key.startswith(_CLASS)])
    old = file.metadata[key]
    names = [name for name in (*_CLASSES, *_NO_CLASSES) if name != old]
    file.metadata[key] = rng.choice(names)
    return Mutation(f"a layer is a {file.metadata[key]!r}, not a {old}", Expected.REFUSED)


def _drop_layer(rng: random.Random, file: SafetensorsFile) -> Mutation:
    layers = [key for key in file.metadata if key.startswith(_CLASS)]
    last = f"{len(layers) - 1}."
    del file.metadata[layers[-1]]
    for key in [key for key in file.metadata if key.startswith(f"{_SCALAR}")]:
        if file.metadata[key].startswith(last):
            del file.metadata[key]
    for name in [name for name in file.names if name.startswith(last)]:
        del file.header[name]
    # The data of the tensors stay, so that only mlx-lm's reader, which allows that, can read it.
    return Mutation("the last layer is missing", Expected.REFUSED)


def _set_number(rng: random.Random, file: SafetensorsFile) -> Mutation:
    """Change a number of a layer, such as its offset."""
    scalars = [name for name in file.names if file.header[name]["shape"] == []]
    name = rng.choice(scalars)
    entry = file.header[name]
    start, stop = entry["data_offsets"]
    dtype = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "BOOL": "?"}[entry["dtype"]]
    old = int(np.frombuffer(file.data[start:stop], dtype)[0])
    new = rng.choice(
        [v for v in (-1, old + 1, old - 1, 0, 1, 10**6, 2**31 - 1, -(2**31)) if v != old]
    )
    value = np.array([new], np.int64).astype(dtype).tobytes()
    file.data = file.data[:start] + value + file.data[stop:]
    # Without a list of tokens, every offset within the keys is a cache.
    has_tokens = "0.glass_statistics" in file.metadata
    is_offset = re.fullmatch(r"\d+\.2", name) is not None
    is_valid = not is_offset or (0 <= new <= old + 1 and not has_tokens)
    expected = Expected.ANY if is_valid else Expected.REFUSED
    return Mutation(f"the number {name} is {new} instead of {old}", expected)


def _set_scalars(rng: random.Random, file: SafetensorsFile) -> Mutation:
    """Change the list of arrays that are numbers."""
    key = rng.choice([key for key in file.metadata if key.startswith(_SCALAR)])
    old = file.metadata[key]
    file.metadata[key] = rng.choice(["0.0", "99.1", "", "none", "string", "scalar", "object"])
    expected = Expected.SAME if file.metadata[key] == old else Expected.SAME_IF_LOADED
    return Mutation(f"the entry {key} is {file.metadata[key]!r}, not {old!r}", expected)


def _set_entry(rng: random.Random, file: SafetensorsFile) -> Mutation:
    """Change an entry that the user's command wrote: model, messages, options of the tokenizer."""
    key = rng.choice([key for key in file.metadata if key.startswith(_USER)])
    value = file.metadata[key]
    try:
        tree = json.loads(value)
    except ValueError:
        tree = None
    if isinstance(tree, dict | list) and tree:
        edit = mutate_json(rng, tree)
        file.metadata[key] = edit.content.decode("utf-8", "surrogateescape")
    else:
        file.metadata[key] = rng.choice(
            ["", "[]", "{", "null", "1", '"a"', "[1]", "x" * 5000, "\0"]
        )
    return Mutation(f"the entry {key} is {file.metadata[key][:60]!r}", Expected.SAME_IF_LOADED)


def _drop_entry(rng: random.Random, file: SafetensorsFile) -> Mutation:
    key = rng.choice(list(file.metadata))
    del file.metadata[key]
    expected = Expected.ANY if key.startswith(_USER) else Expected.SAME_IF_LOADED
    return Mutation(f"the entry {key} is missing", expected)


def _rename_entry(rng: random.Random, file: SafetensorsFile) -> Mutation:
    key = rng.choice(list(file.metadata))
    new = rng.choice(
        ["", "0", "1", "3.0", "2.x", "0.a.b", f"{key}.0", "1.-1", "1.99", "1.99999999"]
    )
    file.metadata[new] = file.metadata.pop(key)
    return Mutation(f"the entry {key} is called {new!r}", Expected.ANY)


def _exchange_layers(rng: random.Random, file: SafetensorsFile) -> Mutation:
    """Drop the data of one layer, or give it that of another."""
    one, two = rng.sample([name for name in file.names if name.endswith((".0", ".1"))], 2)
    file.header[one] = dict(file.header[two])
    return Mutation(f"{one} has the data of {two}", Expected.REFUSED)


_EDITS: tuple[Edit, ...] = (
    _set_class,
    _drop_layer,
    _set_number,
    _set_number,
    _set_scalars,
    _set_entry,
    _set_entry,
    _drop_entry,
    _rename_entry,
    _exchange_layers,
)
