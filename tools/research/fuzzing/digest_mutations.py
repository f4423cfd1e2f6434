"""Changes to priors and to the statistics of prompt caches, with their digest computed anew.

Without a new digest every change is refused as such; with it, the checks behind are reached.
"""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing.json_mutations import mutate_tree
from fuzzing.mutation import Expected, Mutation
from fuzzing.safetensors_file import METADATA, SafetensorsFile
from fuzzing.safetensors_mutations import with_metadata
from fuzzing.seeds import CACHE_FILE, STATISTICS_FILE, Files
from glass_mlx.files import digest, write_tensors

import numpy as np
from safetensors.numpy import load as load_arrays

Arrays = dict[str, np.ndarray]
Edit = Callable[[random.Random, Arrays], Mutation]

# The entry of a file's metadata that holds everything, and that of a cache's digest.
_ENTRY = "glass"
_CACHE_DIGEST = "0.glass_statistics"
_DTYPES = (np.float16, np.float64, np.int32, np.uint8, np.bool_)


def mutate_prior(rng: random.Random, content: bytes) -> tuple[bytes, Mutation]:
    """Change a prior's scores, fingerprint or description; return the file and the change."""
    arrays, about, kind = _parts(content)
    if rng.random() < 0.4:
        about, what = mutate_tree(rng, about, deep=False)
        mutation = Mutation(f"the description: {what}", Expected.FINITE)
    elif rng.random() < 0.3:
        mutation = _change_fingerprint(rng, arrays)
    else:
        mutation = rng.choice(_EDITS)(rng, arrays)
    return _written(arrays, about, kind), mutation


def mutate_statistics(rng: random.Random, files: Files) -> tuple[Files, Mutation]:
    """Change the statistics of a prompt cache, and the digest that the cache has of them."""
    arrays, about, kind = _parts(files[STATISTICS_FILE])
    choice = rng.random()
    if choice < 0.3:
        mutation = _change_tokens(rng, about)
    elif choice < 0.5:
        about, what = mutate_tree(rng, about, deep=False)
        mutation = Mutation(f"the description: {what}", Expected.FINITE)
    else:
        mutation = rng.choice(_EDITS)(rng, arrays)
    cache = with_metadata(files[CACHE_FILE], {_CACHE_DIGEST: digest(arrays, about)})
    return {CACHE_FILE: cache, STATISTICS_FILE: _written(arrays, about, kind)}, mutation


def _parts(content: bytes) -> tuple[Arrays, Any, str]:
    """Return a file's arrays, its description and the name of its format."""
    entry = json.loads(SafetensorsFile.parse(content).header[METADATA][_ENTRY])
    arrays = dict(sorted(load_arrays(content).items()))  # safetensors has them in random order
    return arrays, entry["about"], entry["format"]


def _written(arrays: Arrays, about: Any, kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.safetensors"
        write_tensors(file, arrays, kind, about)
        return file.read_bytes()


def _drop(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    del arrays[name]
    # Without the sum of an FFN's outputs, their mean is computed from the hidden vectors.
    expected = Expected.ANY if name.endswith(".outputs") else Expected.REFUSED
    return Mutation(f"{name} is missing", expected)


def _drop_group(rng: random.Random, arrays: Arrays) -> Mutation:
    """Drop all arrays whose names end alike."""
    suffix = rng.choice(list(arrays)).rpartition(".")[2]
    for name in [name for name in arrays if name.rpartition(".")[2] == suffix]:
        del arrays[name]
    return Mutation(f"all {suffix} are missing", Expected.FINITE)


def _drop_all(rng: random.Random, arrays: Arrays) -> Mutation:
    arrays.clear()
    return Mutation("it has no arrays", Expected.REFUSED)


def _rename(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    new = rng.choice([f"{name}x", f"x{name}", name.replace("0", "9"), ".", name.rpartition(".")[2]])
    arrays[new] = arrays.pop(name)
    expected = Expected.SAME if new == name else Expected.REFUSED
    return Mutation(f"{name} is called {new}", expected)


def _add(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(
        ["fuzz", "fuzz.griffin", "model.layers.9.mlp.griffin", "prompt.fuzz", "x.y.z"]
    )
    arrays[name] = np.ones(4, np.float32)
    return Mutation(f"there is a further array {name}", Expected.SAME_IF_LOADED)


def _set_dtype(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    dtype = rng.choice([dtype for dtype in _DTYPES if dtype != arrays[name].dtype])
    arrays[name] = arrays[name].astype(dtype)
    return Mutation(f"{name} has the dtype {arrays[name].dtype}", Expected.REFUSED)


def _set_shape(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    old = arrays[name]
    shapes = [old[..., :0], old[..., :-1], old[None], old.ravel()[0].reshape(()), old[:0]]
    shapes += [np.concatenate([old, old]), np.concatenate([old, old], axis=-1), old[..., None]]
    changed = rng.choice([shape for shape in shapes if shape.shape != old.shape])
    arrays[name] = np.array(changed, order="C")  # np.ascontiguousarray gives a number a dimension
    if rng.random() < 0.1 and changed.size == 1 and old.shape:
        arrays[name] = arrays[name].reshape(())
    what = f"{name} has the shape {arrays[name].shape} instead of {old.shape}"
    return Mutation(what, Expected.REFUSED)


def _set_unfinite(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    arrays[name] = arrays[name].copy()
    arrays[name].flat[rng.randrange(arrays[name].size)] = value = rng.choice(
        [np.nan, np.inf, -np.inf]
    )
    return Mutation(f"{name} has the value {value}", Expected.REFUSED)


def _set_values(rng: random.Random, arrays: Arrays) -> Mutation:
    name = rng.choice(list(arrays))
    old = arrays[name]
    choices = {"zero": 0 * old, "negative": -old - 1, "huge": np.full_like(old, 3e38)}
    choices["tiny"] = np.full_like(old, 1e-45)
    what, arrays[name] = rng.choice(list(choices.items()))
    return Mutation(f"{name} is {what}", Expected.FINITE)


def _change_fingerprint(rng: random.Random, arrays: Arrays) -> Mutation:
    """Make a prior another model's."""
    what = rng.choice(["noise", "negative", "zero", "rolled"])
    noise = np.random.default_rng(rng.randrange(2**32))
    for name in [name for name in arrays if name.endswith(".fingerprint")]:
        old = arrays[name]
        changed = {
            "noise": noise.normal(size=old.shape),
            "negative": -old,
            "zero": 0 * old,
            "rolled": np.roll(old, 1, axis=0),
        }
        arrays[name] = np.ascontiguousarray(changed[what].astype(old.dtype))
    return Mutation(f"the fingerprint is {what}", Expected.REFUSED)


def _change_tokens(rng: random.Random, about: dict[str, Any]) -> Mutation:
    """Change the list of a cache's tokens."""
    tokens: list[Any] = about["tokens"]
    edit = rng.choice(("more", "fewer", "none", "out of range", "negative", "odd", "other"))
    index, expected = rng.randrange(len(tokens)), Expected.REFUSED
    if edit == "more":
        tokens += [3] * rng.choice([1, 100])
    elif edit == "fewer":
        del tokens[index:]
    elif edit == "none":
        tokens.clear()
    elif edit == "out of range":
        tokens[index], expected = rng.choice([256, 10**6, 2**31, 2**32, 2**64]), Expected.FINITE
    elif edit == "negative":
        tokens[index] = -1
    elif edit == "odd":
        tokens[index] = rng.choice([None, "1", 1.5, [1], True, {}, float("nan")])
    else:
        tokens[index], expected = rng.randrange(256), Expected.FINITE
    return Mutation(f"the list of tokens has {edit}", expected)


_EDITS: tuple[Edit, ...] = (
    _drop,
    _drop_group,
    _drop_all,
    _rename,
    _add,
    _set_dtype,
    _set_shape,
    _set_shape,
    _set_unfinite,
    _set_values,
    _set_values,
)
