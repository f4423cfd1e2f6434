"""Files of prompt caches.

A file has mlx-lm's format. The statistics are in a second file beside it, `NAME.glass.safetensors`,
with a digest of the first file's keys and values.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.errors import one_line
from glass_mlx.files import (
    check_writable,
    digest,
    expand_user,
    read_tensors,
    replacing,
    write_tensors,
)
from glass_mlx.prompt_cache import PromptCache, Turn, token_count
from glass_mlx.statistics import MEAN, STATISTICS, LocalStatistics, NeuronStatistics
from glass_mlx.vocabulary import VocabularyStatistics

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from safetensors import safe_open

FORMAT = "glass-statistics-1"
_SUFFIX = ".safetensors"
_DIGEST = "glass_statistics"

# More entries than any prompt cache has. mlx-lm makes lists as long as the numbers in a file say.
_MAX_ENTRIES = 10_000

# The types of hidden vectors.
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

# The names of the statistics in a file: those of all tokens, and those before the last turn.
_NOW, _BEFORE = ("prompt", "text"), ("prompt_before", "text_before")
_VOCABULARY, _VOCABULARY_BEFORE = "vocabulary", "vocabulary_before"


def _statistics_file(file: Path) -> Path:
    """Return the file beside a prompt cache that holds its statistics."""
    return file.with_suffix(f".glass{_SUFFIX}")


def check_name(file_name: str | Path) -> Path:
    """Return the path of a file that a prompt cache can be saved to.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if mlx-lm could not load a file of this name.
    """
    file = expand_user(file_name)
    if file.suffix != _SUFFIX:
        raise ValueError(f"the prompt cache {file} must have a name that ends in {_SUFFIX}")
    check_writable(file)
    return file


def cache_metadata(model: str | None, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Return the metadata that tells mlx-lm's commands which model a prompt cache belongs to."""
    return {
        "model": model or DEFAULT_MODEL,
        "tokenizer_config": json.dumps(tokenizer_config),
    }


def save_prompt_cache(
    file_name: str | Path, cache: PromptCache, metadata: dict[str, str] | None = None
) -> None:
    """Save a prompt cache for mlx-lm and for `load_prompt_cache`, and its statistics beside it.

    Args:
        file_name: the file, whose name ends in .safetensors.
        cache: the cache.
        metadata: further entries for the file.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if the file has another extension, or the contents of the cache are not known.
    """
    cache.check("it cannot be saved")
    file, statistics_digest = check_name(file_name), ""
    about: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    if cache.statistics is not None:
        about, tensors = _pack(cache, cache.statistics)
        statistics_digest = digest(tensors, about)
        metadata = (metadata or {}) | {_DIGEST: statistics_digest}
    with replacing(file) as temporary:
        try:
            mlx_lm_cache.save_prompt_cache(str(temporary), cache, metadata or {})
        except RuntimeError as error:
            raise OSError(f"{file} cannot be written: {one_line(error)}") from error
        if tensors:
            write_tensors(_statistics_file(file), tensors, FORMAT, about, statistics_digest)


def load_prompt_cache(
    file_name: str | Path, return_metadata: bool = False
) -> PromptCache | tuple[PromptCache, dict[str, str]]:
    """Load a prompt cache that `save_prompt_cache` or mlx-lm saved.

    Args:
        file_name: the file.
        return_metadata: whether to return the file's metadata, too.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, or its statistics are missing or belong to another
            cache.
    """
    file = Path(file_name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt cache at {file}")
    try:
        _check_structure(file)
        layers, metadata = mlx_lm_cache.load_prompt_cache(str(file), return_metadata=True)
        metadata = dict(metadata)
        mx.eval([layer.state for layer in layers])
        cache = PromptCache(layers, None)
    except Exception as error:  # a file of another kind causes errors of any type
        raise ValueError(f"{file} is not a prompt cache, or it is damaged") from error
    if not layers or not all(map(_is_whole, layers)):
        raise ValueError(f"{file} is not a prompt cache, or it is damaged")
    statistics_digest = metadata.get(_DIGEST)
    if statistics_digest is not None:
        cache = _with_statistics(file, layers, statistics_digest)
    return (cache, metadata) if return_metadata else cache


def _check_structure(file: Path) -> None:
    """Check what mlx-lm trusts: that tensors are in the file, and entries are few and named right.

    Raises:
        Exception: of any type, if the file is damaged.
    """
    with safe_open(file, "numpy") as stored:
        keys, metadata = [*stored.keys()], stored.metadata()
    places = [key.split(".") for key in [*keys, *metadata]]
    if any(part.isdecimal() and int(part) > _MAX_ENTRIES for parts in places for part in parts):
        raise ValueError("there is an entry with a number beyond all entries")


def _is_whole(layer: Any) -> bool:
    """Return whether an entry is a cache of mlx-lm, and its keys and values hold its tokens."""
    if not type(layer).__module__.startswith("mlx_lm."):
        return False
    if not hasattr(layer, "update_and_fetch"):
        return True  # recurrent states
    offset, size = layer.offset, getattr(layer, "max_size", 1)
    if not isinstance(offset, int) or not isinstance(size, int) or offset < 0 or size < 1:
        return False
    keys, values = layer.keys, layer.values
    if not isinstance(keys, mx.array):  # empty, or quantized
        return True
    if not isinstance(values, mx.array) or keys.shape[:3] != values.shape[:3]:
        return False
    if not all(mx.issubdtype(array.dtype, mx.floating) for array in (keys, values)):
        return False
    held = min(offset, layer.max_size) if hasattr(layer, "max_size") else offset
    return keys.ndim == values.ndim == 4 and held <= keys.shape[2]


def _pack(
    cache: PromptCache, statistics: LocalStatistics
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description and the tensors of the file of statistics."""
    parts = dict(zip(_NOW, (statistics.prompt, statistics.text), strict=True))
    vocabularies = {_VOCABULARY: statistics.vocabulary}
    about: dict[str, Any] = {"tokens": cache.tokens, "contents": _digest_contents(cache)}
    if cache.unlisted:
        about["unlisted"] = cache.unlisted
    if cache.turns:
        turn = cache.turns[-1]
        parts |= dict(zip(_BEFORE, (turn.before.prompt, turn.before.text), strict=True))
        vocabularies[_VOCABULARY_BEFORE] = turn.before.vocabulary
        about["turn"] = [turn.start, turn.prompt_end]
    about["dtypes"] = {name: str(part.dtype).split(".")[-1] for name, part in parts.items()}
    states = {name: part.state() for name, part in parts.items()}
    states |= {name: part.state() for name, part in vocabularies.items()}
    tensors = {
        f"{name}.{key}": values for name, state in states.items() for key, values in state.items()
    }
    return about, tensors


def _with_statistics(file: Path, layers: list[Any], expected_digest: str) -> PromptCache:
    """Return a prompt cache with the statistics beside it, if both were saved together."""
    statistics_file = _statistics_file(file)
    if not statistics_file.is_file():
        raise ValueError(f"the statistics of the prompt cache are missing: {statistics_file}")
    tensors, about, stored_digest = read_tensors(statistics_file, FORMAT)
    if stored_digest != expected_digest:
        raise ValueError(f"{statistics_file} does not belong to this prompt cache; save both again")
    if not isinstance(about, dict):
        raise ValueError(f"{statistics_file} is damaged; save both files again")
    # Files from before there was a digest of the contents have none.
    if about.get("contents", contents := _digest_contents(layers)) != contents:
        raise ValueError(f"the prompt cache {file} was changed after it was written")
    try:
        return _unpack(layers, tensors, about)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{statistics_file} is damaged; save both files again") from error


def _unpack(
    layers: list[Any], tensors: dict[str, np.ndarray], about: dict[str, Any]
) -> PromptCache:
    """Return a prompt cache from a description and tensors; see `_pack`."""
    states: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        part, _, key = name.partition(".")
        states.setdefault(part, {})[key] = values
    vocabulary, vocabulary_before = (
        VocabularyStatistics.restored(states.pop(name, {}))
        for name in (_VOCABULARY, _VOCABULARY_BEFORE)
    )
    parts = {
        part: NeuronStatistics.restored(state, _DTYPES[about["dtypes"][part]])
        for part, state in states.items()
    }
    names = {*_NOW, *(_BEFORE if "turn" in about else ())}
    if parts.keys() != names:
        raise ValueError("it does not have the statistics of prompt and text")
    for name, statistics in parts.items():
        needed = {*STATISTICS, MEAN} if name.startswith("text") else {*STATISTICS}
        if not needed <= {*statistics.names}:
            raise ValueError(f"it does not have all statistics of {name}")
    tokens = about["tokens"]
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    ):
        raise ValueError("its tokens are not token ids")
    read = token_count(layers)
    if read is not None and read != len(tokens) + about.get("unlisted", 0):
        raise ValueError("it has another number of tokens than the prompt cache")
    cache = PromptCache(layers, _local(parts, _NOW, vocabulary), tokens)
    if "turn" in about:
        before = _local(parts, _BEFORE, vocabulary_before)
        start, prompt_end = map(int, about["turn"])
        cache.turns.append(Turn(start, prompt_end, before))
    return cache


def _local(
    parts: dict[str, NeuronStatistics], names: tuple[str, str], vocabulary: VocabularyStatistics
) -> LocalStatistics:
    prompt, text = (parts[name] for name in names)
    return LocalStatistics(prompt, text, vocabulary)


def _digest_contents(layers: list[Any]) -> str:
    """Return a hash of everything that a prompt cache holds."""
    state = hashlib.sha256()
    for layer in layers:
        # mlx-lm 0.31 has numbers in `meta_state` that later versions have in `state`.
        contents: Any = tree_flatten([layer.state, getattr(layer, "meta_state", ())])
        for key, value in contents:
            if isinstance(value, mx.array):
                is_plain = value.dtype != mx.bfloat16
                values = np.array(value if is_plain else value.view(mx.uint16))
                state.update(f"{key} {value.dtype} {values.shape}".encode())
                state.update(np.ascontiguousarray(values).data)
            else:
                state.update(f"{key} {value}".encode())
    return state.hexdigest()
