"""A prompt cache that is kept from turn to turn, with the statistics of what was read into it.

The functions have the names of mlx-lm's, in whose places they can be used, and the files are
mlx-lm's, too. Statistics are in a second file beside that, `NAME.glass.safetensors`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints import DEFAULT_MODEL
from glass_mlx.files import digest, one_line, read_tensors, replacing, write_tensors
from glass_mlx.models import with_taps
from glass_mlx.slicing import FEW, Evidence
from glass_mlx.statistics import NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache

FORMAT = "glass-statistics-1"
_SUFFIX = ".safetensors"
_DIGEST = "glass_statistics"


class PromptCache(list):
    """mlx-lm's prompt cache, a layer an entry, and what is known of the tokens in it.

    Attributes:
        evidence: what the dense model has seen of them; None for a cache of mlx-lm's.
        tokens: their ids; of a cache of mlx-lm's only those that came later.
        intact: whether it is known what is in it; not after an error in the midst of reading.
    """

    def __init__(
        self, layers: Iterable[Any], evidence: Evidence | None, tokens: Iterable[int] = ()
    ) -> None:
        super().__init__(layers)
        self.evidence, self.tokens, self.intact = evidence, list(tokens), True

    def add(self, tokens: Iterable[int]) -> None:
        """Note tokens that were read into it."""
        self.tokens += tokens
        self.intact = True

    def trim(self, count: int) -> None:
        """Take back the last tokens. The statistics still count them.

        Raises:
            ValueError: if a layer's cache cannot go back.
        """
        if not mlx_lm_cache.can_trim_prompt_cache(self):
            raise ValueError(
                "what was said before is not the same tokens any more in the chat template, and "
                "this model's prompt cache cannot go back; begin a new one"
            )
        mlx_lm_cache.trim_prompt_cache(self, count)
        del self.tokens[len(self.tokens) - count :]


def make_prompt_cache(model: nn.Module, max_kv_size: int | None = None) -> PromptCache:
    """Make an empty prompt cache, as `mlx_lm.models.cache.make_prompt_cache` does.

    Give it to `stream_generate` as `prompt_cache`, turn for turn, each time with what is new.

    Raises:
        ValueError: if the model cannot be sliced.
    """
    return PromptCache(mlx_lm_cache.make_prompt_cache(model, max_kv_size), Evidence.of(model))


def read_prompt(
    model: nn.Module,
    tokens: list[int],
    cache: PromptCache,
    progress: Callable[[int, int], None],
    **kwargs: Any,
) -> None:
    """Read tokens into a prompt cache and generate nothing yet.

    Args:
        model: the model that the cache was made for.
        tokens: what to read.
        cache: a new cache, which changes.
        progress: called with the number of tokens read, and of all.
        **kwargs: for `mlx_lm.generate.generate_step`.
    """
    seen, cache.intact = cache.evidence.prompt, False

    def evaluate(done: int, total: int) -> None:
        mx.eval(seen.sums)
        progress(done, total)

    # It samples a token that it does not read.
    steps = generate_step(
        mx.array(tokens, mx.uint32),
        with_taps(model, seen.update, few=FEW),
        max_tokens=0,
        prompt_cache=cache,
        prompt_progress_callback=evaluate,
        **kwargs,
    )
    for _ in steps:
        pass
    mx.eval(seen.sums)
    cache.add(tokens)


def _beside(file: Path) -> Path:
    """Where the statistics of a prompt cache are."""
    return file.with_suffix(f".glass{_SUFFIX}")


def check_name(file_name: str | Path) -> Path:
    """The path of a file that a prompt cache can be saved to.

    Raises:
        ValueError: if mlx-lm could not load it under this name.
    """
    file = Path(file_name)
    if file.suffix != _SUFFIX:
        raise ValueError(f"the prompt cache {file} must have a name that ends in {_SUFFIX}")
    return file


def described(model: str | None, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The metadata by which mlx-lm's commands know which model a prompt cache is of."""
    return {
        "model": model or DEFAULT_MODEL,
        "tokenizer_config": json.dumps(tokenizer_config),
    }


def save_prompt_cache(
    file_name: str | Path, cache: PromptCache, metadata: dict[str, str] | None = None
) -> None:
    """Save a prompt cache for mlx-lm and for `load_prompt_cache`, and its statistics beside it.

    Args:
        file_name: the file, which ends in .safetensors.
        cache: the cache.
        metadata: what else to keep in the file.

    Raises:
        OSError: if a file cannot be written.
        ValueError: for a file of another name.
    """
    file, about, tensors = check_name(file_name), {}, {}
    if cache.evidence is not None:
        parts = {"prompt": cache.evidence.prompt, "text": cache.evidence.text}
        about = {
            "tokens": cache.tokens,
            "dtypes": {name: str(part.dtype).split(".")[-1] for name, part in parts.items()},
        }
        tensors = {
            f"{name}.{key}": values
            for name, part in parts.items()
            for key, values in part.state().items()
        }
        metadata = (metadata or {}) | {_DIGEST: digest(tensors, about)}
    with replacing(file) as temporary:
        try:
            mlx_lm_cache.save_prompt_cache(str(temporary), cache, metadata)
        except RuntimeError as error:
            raise OSError(f"{file} cannot be written: {one_line(error)}") from error
        if tensors:
            write_tensors(_beside(file), tensors, FORMAT, about)


def load_prompt_cache(
    file_name: str | Path, return_metadata: bool = False
) -> PromptCache | tuple[PromptCache, dict[str, str]]:
    """Load a prompt cache that was saved by `save_prompt_cache`, or by mlx-lm.

    Args:
        file_name: the file.
        return_metadata: whether to return what else was kept in it, too.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a whole one, or its statistics are missing or of another cache.
    """
    file = Path(file_name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt cache at {file}")
    try:
        layers, metadata = mlx_lm_cache.load_prompt_cache(str(file), return_metadata=True)
        wanted = dict(metadata).get(_DIGEST)
    except Exception as error:  # of whatever kind, for a file that is something else
        raise ValueError(f"{file} is not a prompt cache ({one_line(error)})") from error
    if not layers:
        raise ValueError(f"{file} is not a prompt cache (it has no layers)")
    cache = PromptCache(layers, None)
    if wanted is not None:
        cache.evidence, cache.tokens = _load_statistics(_beside(file), wanted)
    return (cache, metadata) if return_metadata else cache


def _load_statistics(file: Path, wanted: str) -> tuple[Evidence, list[int]]:
    """Read what is beside a prompt cache, if it is what was saved with it."""
    if not file.is_file():
        raise ValueError(f"the statistics of the prompt cache are missing: {file}")
    tensors, about = read_tensors(file, FORMAT)
    if digest(tensors, about) != wanted:
        raise ValueError(f"{file} does not belong to this prompt cache; save both again")
    parts: dict[str, dict[str, Any]] = {"prompt": {}, "text": {}}
    for key, values in tensors.items():
        name, _, key = key.partition(".")
        parts[name][key] = values
    restored = {
        name: NeuronStatistics.restored(state, getattr(mx, about["dtypes"][name]))
        for name, state in parts.items()
    }
    return Evidence(**restored), about["tokens"]
