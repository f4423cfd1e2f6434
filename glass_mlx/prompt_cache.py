"""A prompt cache that continues from turn to turn, with the statistics of the tokens in it.

The functions have the names of mlx-lm's functions and can replace them. Files have mlx-lm's format;
the statistics are in a second file beside the first, `NAME.glass.safetensors`.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.errors import one_line
from glass_mlx.files import digest, read_tensors, replacing, write_tensors
from glass_mlx.session import Session
from glass_mlx.statistics import LocalStatistics, NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache

FORMAT = "glass-statistics-1"
_SUFFIX = ".safetensors"
_DIGEST = "glass_statistics"


class PromptCache(list[Any]):
    """mlx-lm's prompt cache, one entry per layer, with its tokens and their statistics.

    Attributes:
        statistics: the local statistics of the tokens; None for a cache from mlx-lm.
        tokens: the ids of the tokens; for a cache from mlx-lm, only those that were added later.
        intact: whether the contents of the cache are known. They are unknown after an error in the
            middle of a generation.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        statistics: LocalStatistics | None,
        tokens: Iterable[int] = (),
    ) -> None:
        super().__init__(layers)
        self.statistics, self.tokens, self.intact = statistics, list(tokens), True

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptCache":
        """Return a copy, such as for one of several questions about the same prompt."""
        statistics = None if self.statistics is None else self.statistics.copy()
        other = PromptCache(copy.deepcopy([*self], memo), statistics, self.tokens)
        other.intact = self.intact
        return other

    def begin(self, widths: Mapping[str, int]) -> LocalStatistics:
        """Begin to read tokens into the cache, which is not intact until `add` records them.

        Args:
            widths: the number of neurons of each FFN of the model, by path.

        Returns:
            The statistics to add the tokens to.

        Raises:
            ValueError: if the cache is not intact, or belongs to another model.
        """
        if not self.intact:
            raise ValueError("the prompt cache was left in the middle of a step; begin a new one")
        if self.statistics is None:
            self.statistics = LocalStatistics.empty(widths)
        if self.statistics.prompt.widths != widths:
            raise ValueError("the statistics of the prompt cache are of another model")
        self.intact = False
        return self.statistics

    def add(self, tokens: Iterable[int]) -> None:
        """Record the tokens that were read into the cache."""
        self.tokens += tokens
        self.intact = True

    def trim(self, count: int) -> None:
        """Remove the last tokens. The statistics still count them.

        Raises:
            ValueError: if the cache of a layer cannot be trimmed.
        """
        if not mlx_lm_cache.can_trim_prompt_cache(self):
            raise ValueError(
                "the chat template no longer gives the same tokens for the earlier messages, and "
                "this model's prompt cache cannot be trimmed; begin a new one"
            )
        mlx_lm_cache.trim_prompt_cache(self, count)
        del self.tokens[len(self.tokens) - count :]


def make_prompt_cache(model: nn.Module | Session, max_kv_size: int | None = None) -> PromptCache:
    """Make an empty prompt cache, as `mlx_lm.models.cache.make_prompt_cache` does.

    In every turn, pass the cache to `stream_generate` as `prompt_cache`, with the new tokens only.

    Raises:
        ValueError: if the model cannot be sliced.
    """
    session = Session.of(model)
    layers = mlx_lm_cache.make_prompt_cache(session.model, max_kv_size)
    return PromptCache(layers, session.empty_statistics())


def read_prompt(
    model: nn.Module | Session,
    tokens: list[int],
    cache: PromptCache,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **kwargs: Any,
) -> None:
    """Read tokens into a prompt cache without generating any.

    Args:
        model: the model that the cache was made for.
        tokens: the token ids to read.
        cache: a new cache, which is filled in place.
        progress: called with the number of tokens read so far, and the total number.
        **kwargs: passed on to `mlx_lm.generate.generate_step`.
    """
    session = Session.of(model)
    statistics = cache.begin(session.widths)

    def evaluate(tokens_read: int, total: int) -> None:
        mx.eval(statistics.prompt.sums)
        progress(tokens_read, total)

    # With no tokens to generate, mlx-lm's loop samples one token that the model does not read.
    steps = generate_step(
        mx.array(tokens, mx.uint32),
        session.observed_on_prompt(statistics),
        max_tokens=0,
        prompt_cache=cache,
        prompt_progress_callback=evaluate,
        **kwargs,
    )
    for _ in steps:
        pass
    mx.eval(statistics.prompt.sums)
    cache.add(tokens)


# --- Files ----------------------------------------------------------------------------------------


def _statistics_file(file: Path) -> Path:
    """Return the file beside a prompt cache that holds its statistics."""
    return file.with_suffix(f".glass{_SUFFIX}")


def check_name(file_name: str | Path) -> Path:
    """Return the path of a file that a prompt cache can be saved to.

    Raises:
        ValueError: if mlx-lm could not load a file of this name.
    """
    file = Path(file_name).expanduser()
    if file.suffix != _SUFFIX:
        raise ValueError(f"the prompt cache {file} must have a name that ends in {_SUFFIX}")
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
        ValueError: if the file has another extension, or the cache is not intact.
    """
    if not cache.intact:
        raise ValueError("the prompt cache was left in the middle of a step; it cannot be saved")
    file, about, tensors, statistics_digest = check_name(file_name), {}, {}, ""
    if cache.statistics is not None:
        parts = {"prompt": cache.statistics.prompt, "text": cache.statistics.text}
        about = {
            "tokens": cache.tokens,
            "dtypes": {name: str(part.dtype).split(".")[-1] for name, part in parts.items()},
        }
        tensors = {
            f"{name}.{key}": values
            for name, part in parts.items()
            for key, values in part.state().items()
        }
        statistics_digest = digest(tensors, about)
        metadata = (metadata or {}) | {_DIGEST: statistics_digest}
    with replacing(file) as temporary:
        try:
            mlx_lm_cache.save_prompt_cache(str(temporary), cache, metadata)
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
        ValueError: if the file is incomplete, or its statistics are missing or belong to another
            cache.
    """
    file = Path(file_name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt cache at {file}")
    try:
        layers, metadata = mlx_lm_cache.load_prompt_cache(str(file), return_metadata=True)
        statistics_digest = dict(metadata).get(_DIGEST)
    except Exception as error:  # a file of another kind causes errors of any type
        raise ValueError(f"{file} is not a prompt cache ({one_line(error)})") from error
    if not layers:
        raise ValueError(f"{file} is not a prompt cache (it has no layers)")
    cache = PromptCache(layers, None)
    if statistics_digest is not None:
        statistics_file = _statistics_file(file)
        cache.statistics, cache.tokens = _load_statistics(statistics_file, statistics_digest)
    return (cache, metadata) if return_metadata else cache


def _load_statistics(file: Path, expected_digest: str) -> tuple[LocalStatistics, list[int]]:
    """Read the statistics beside a prompt cache, if they were saved together with it."""
    if not file.is_file():
        raise ValueError(f"the statistics of the prompt cache are missing: {file}")
    tensors, about, stored_digest = read_tensors(file, FORMAT)
    if stored_digest != expected_digest:
        raise ValueError(f"{file} does not belong to this prompt cache; save both again")
    states: dict[str, dict[str, Any]] = {"prompt": {}, "text": {}}
    for name, values in tensors.items():
        part, _, key = name.partition(".")
        states[part][key] = values
    restored = {
        part: NeuronStatistics.restored(state, getattr(mx, about["dtypes"][part]))
        for part, state in states.items()
    }
    return LocalStatistics(**restored), about["tokens"]
