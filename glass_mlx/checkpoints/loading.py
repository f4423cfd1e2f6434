"""Load a model by name: a hub id, a folder, a GGUF file, or the built-in model."""

import glob
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

from glass_mlx.blas import has_openblas
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL, GGUF_SHA256, builtin_gguf
from glass_mlx.checkpoints.conversions import converted_builtin, converted_file
from glass_mlx.checkpoints.folder import check_folder
from glass_mlx.errors import is_library_error, library_reason
from glass_mlx.files import expand_user
from glass_mlx.models import QUANTIZED_ACTIVATIONS, Ranks, divide, precision

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

DTYPES = ("float16", "bfloat16", "float32")


def model_name(model: str | None) -> str:
    """Return the name of a model for records: its hub id, or its file's or folder's name."""
    if model is None:
        return DEFAULT_MODEL
    path = expand_user(model)
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
        return _address(converted_builtin(DEFAULT_MODEL, dtype, GGUF_SHA256, builtin_gguf))
    path = expand_user(model)
    if path.is_dir():
        return _address(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is a file, but not a .gguf; give its folder, or a hub id")
        return _address(converted_file(path, dtype))
    if path.exists():
        raise ValueError(f"{model} is neither a folder nor a file; give a model")
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise FileNotFoundError(f"there is no model at {model}")
    return model


def _address(folder: Path) -> str:
    """Return a folder as text, in which mlx-lm looks for weights with glob."""
    address = str(folder)
    if glob.escape(address) != address:
        raise ValueError(f"mlx-lm finds no weights in {address}; rename it without [, ], * and ?")
    return address


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
    ranks: Ranks | None = None,
    pipeline: bool = False,
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
    ranks: Ranks | None = None,
    pipeline: bool = False,
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
    ranks: Ranks | None = None,
    pipeline: bool = False,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a model and its tokenizer, as `mlx_lm.load` does.

    Args:
        path_or_hf_repo: a hub id, a folder, a GGUF file, or None for the built-in model.
        tokenizer_config: see `mlx_lm.load`.
        model_config: see `mlx_lm.load`.
        adapter_path: a folder with LoRA, DoRA or full adapters. As in mlx-lm, LoRA and DoRA stay
            beside the weights, which do not change.
        lazy: whether to leave weights on disk until they are used.
        return_config: whether to return the model's configuration, too.
        revision: the revision of a hub id.
        trust_remote_code: see `mlx_lm.load`.
        dtype: "float16", "bfloat16" or "float32", for computing and for all weights that are
            not quantized, except those that the model's class keeps as they are. Default: as
            stored; for GGUF files see `resolve`.
        dequantize: whether to convert quantized weights to floats. This uses more memory, but is
            much faster on a CPU.
        ranks: the processes to divide the model over, as `mlx_lm.utils.sharded_load` does. Each
            keeps its part of the weights. Default: the whole model in this process.
        pipeline: whether each rank gets some of the layers, and not some of the neurons.

    Returns:
        Model and tokenizer, and with `return_config` the configuration.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if the model cannot be used.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if (model_config or {}).get("quantize_activations"):
        raise ValueError(QUANTIZED_ACTIVATIONS)
    source = resolve(path_or_hf_repo, dtype)
    with _one_sentence(path_or_hf_repo or DEFAULT_MODEL):
        if Path(source).is_dir():
            check_folder(Path(source))
        loaded = mlx_lm.load(
            source,
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=None if adapter_path is None else str(expand_user(adapter_path)),
            lazy=True,
            return_config=return_config,
            revision=revision,
            **_remote_code_option(trust_remote_code),
        )
        _set_precision(loaded[0], dtype, dequantize)
    if ranks is not None and ranks.size > 1:
        divide(loaded[0], ranks, pipeline)
    with _one_sentence(path_or_hf_repo or DEFAULT_MODEL):
        if not lazy:
            mx.eval(loaded[0].parameters())
    return loaded


def load_draft(name: str | None, tokenizer: TokenizerWrapper, **options: Any) -> nn.Module | None:
    """Load a draft model for speculative decoding.

    Args:
        name: the draft model, as for `load`; None for no draft model.
        tokenizer: the tokenizer of the model whose text it drafts.
        **options: further arguments of `load`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if it cannot be used, or if its tokenizer is another one.
    """
    if name is None:
        return None
    model, own = load(name, **options)
    if not _are_compatible(tokenizer, own):
        raise ValueError(
            f"the draft model {name} has another tokenizer than the model; give a smaller model "
            "of the same family"
        )
    return model


def _are_compatible(tokenizer: TokenizerWrapper, other: TokenizerWrapper) -> bool:
    """Return whether the ids that two tokenizers have in common stand for the same tokens.

    Files of one family differ in how many unused tokens they list at the end.
    """
    first, second = (
        {identifier: token for token, identifier in one.get_vocab().items()}
        for one in (tokenizer, other)
    )
    shared = first.keys() & second.keys()
    return bool(shared) and all(first[identifier] == second[identifier] for identifier in shared)


def _set_precision(model: nn.Module, dtype: str | None, dequantize: bool) -> None:
    """Convert a model's weights in place; see `load`."""
    type_of_floats = None if dtype is None else getattr(mx, dtype)
    if type_of_floats is not None:
        precision.set_dtype(model, type_of_floats)
    if dequantize:
        precision.dequantize(model, type_of_floats)


def _remote_code_option(trust_remote_code: bool) -> dict[str, bool]:
    """Return the option for `mlx_lm.load`, or nothing for mlx-lm 0.31, which does not have it."""
    if "trust_remote_code" in inspect.signature(mlx_lm.load).parameters:
        return {"trust_remote_code": trust_remote_code}
    return {}


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn an error of any library that loads the model into one sentence."""
    try:
        yield
    except BaseException as error:
        if not is_library_error(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"the model {name} cannot be loaded: {library_reason(error)}") from error


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
