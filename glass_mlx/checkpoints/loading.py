"""Load a model by name: a hub id, a folder, a GGUF file, or the built-in model."""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

from glass_mlx.blas import has_openblas
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL, builtin_gguf
from glass_mlx.checkpoints.gguf import convert
from glass_mlx.errors import one_line
from glass_mlx.files import cache_folder, replacing

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model

DTYPES = ("float16", "bfloat16", "float32")

# Lists the files of a converted model and their sizes.
_MANIFEST = "glass_conversion.json"


def model_name(model: str | None) -> str:
    """Return the name of a model for records: its hub id, or its file's or folder's name."""
    if model is None:
        return DEFAULT_MODEL
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def resolve(model: str | None, dtype: str | None = None) -> str:
    """Find the folder or hub id to give to `mlx_lm.load`; convert GGUF files into the cache.

    Args:
        model: a hub id, a folder, a GGUF file, or None for the built-in model.
        dtype: one of `DTYPES`, for GGUF files. Default: float16, or float32 if MLX computes
            on the CPU, where half-precision products are about 30 times slower.

    Returns:
        A folder, or the unchanged hub id.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if the file cannot be used.
    """
    dtype = dtype or ("float32" if mx.default_device() == mx.cpu else "float16")
    if model is None:
        return _convert_into_cache(DEFAULT_MODEL, dtype, builtin_gguf)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is a file, but not a .gguf; give its folder, or a hub id")
        return _convert_into_cache(_conversion_name(path), dtype, lambda: path)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise FileNotFoundError(f"there is no model at {model}")
    return model


def _convert_into_cache(name: str, dtype: str, find_source: Callable[[], Path]) -> str:
    """Return the folder of a converted model; convert the source file if the folder is stale.

    Args:
        name: the converted model's name in the cache.
        dtype: see `resolve`.
        find_source: returns the GGUF file. It is called only for a new conversion, because the
            built-in model may have to be downloaded.
    """
    folder = cache_folder() / "models" / f"{name}-{dtype}"
    if not _is_complete(folder):
        with replacing(folder, folder=True) as temporary:
            convert(find_source(), temporary, dtype)
            (temporary / _MANIFEST).write_text(json.dumps(_file_sizes(temporary)))
    return str(folder)


def _conversion_name(file: Path) -> str:
    """Return the name of a GGUF file's conversion, which changes when the file changes."""
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _file_sizes(folder: Path) -> dict[str, int]:
    """Map the names of a folder's files, except the manifest, to their sizes in bytes."""
    return {f.name: f.stat().st_size for f in sorted(folder.iterdir()) if f.name != _MANIFEST}


def _is_complete(folder: Path) -> bool:
    """Return whether a converted model's files match its manifest."""
    try:
        return bool(json.loads((folder / _MANIFEST).read_text()) == _file_sizes(folder))
    except (OSError, ValueError):
        return False


@overload
def load(
    path_or_hf_repo: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: Literal[False] = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    *,
    return_config: Literal[True],
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    dequantize: bool = False,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a model and its tokenizer, as `mlx_lm.load` does.

    Args:
        path_or_hf_repo: a hub id, a folder, a GGUF file, or None for the built-in model.
        tokenizer_config: see `mlx_lm.load`.
        model_config: see `mlx_lm.load`.
        adapter_path: a folder with LoRA, DoRA or full adapters, which are fused into the weights.
        lazy: whether to leave weights on disk until they are used.
        return_config: whether to return the model's configuration, too.
        revision: the revision of a hub id.
        trust_remote_code: see `mlx_lm.load`.
        dtype: "float16", "bfloat16" or "float32", for computing and for all weights that are
            not quantized. Default: as stored; for GGUF files see `resolve`.
        dequantize: whether to convert quantized weights to floats. This uses more memory, but is
            much faster on a CPU.

    Returns:
        Model and tokenizer, and with `return_config` the configuration.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if the model cannot be used.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source = resolve(path_or_hf_repo, dtype)
    with _one_sentence(path_or_hf_repo or DEFAULT_MODEL):
        loaded = mlx_lm.load(
            source,
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=True,
            return_config=return_config,
            revision=revision,
            **_remote_code_option(trust_remote_code),
        )
        model = loaded[0]
        if adapter_path is not None:
            _fuse_adapters(model)
        if dtype is not None:
            model.set_dtype(getattr(mx, dtype))
        if dequantize:
            dequantize_model(model)
        if not lazy:
            mx.eval(model.parameters())
    return loaded


def _remote_code_option(trust_remote_code: bool) -> dict[str, bool]:
    """Return the option for `mlx_lm.load`, or nothing for mlx-lm 0.31, which does not have it."""
    if "trust_remote_code" in inspect.signature(mlx_lm.load).parameters:
        return {"trust_remote_code": trust_remote_code}
    return {}


def _fuse_adapters(model: nn.Module) -> None:
    """Fuse adapters into the layers that they adapt; adapted layers cannot be sliced."""
    fused_layers = [(path, m.fuse()) for path, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused_layers))


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn an error of any library that loads the model into one sentence."""
    try:
        yield
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"the model {name} cannot be loaded: {one_line(error)}") from error


def advice(model: nn.Module) -> str | None:
    """Return a hint on how to make the model faster on a CPU, or None."""
    if mx.default_device() != mx.cpu:
        return None
    parameters = dict(tree_flatten(model.parameters()))
    if {array.dtype for array in parameters.values()} != {mx.float32}:
        return "On a CPU this model is much faster with --dtype float32 --dequantize."
    if sys.platform == "linux" and not has_openblas():
        return "On a CPU this is much faster with OpenBLAS: apt install libopenblas0-pthread"
    return None
