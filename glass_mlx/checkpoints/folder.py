"""Check the files of a model's folder before other libraries read them.

mlx-lm, transformers and MLX trust these files: a damaged one would end in an error without a
sentence, in memory without bounds, or in a model that computes something else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glass_mlx.errors import one_line, parse_json

from safetensors import safe_open

CONFIG = "config.json"

# The names of the number of layers in configurations.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_BASES = ("rope_theta", "rope_local_base_freq", "rms_norm_eps", "layer_norm_eps")

# The smallest quantization group.
_MIN_GROUP = 16

# Data types of safetensors that hold no weights without scales.
_CODES = ("U32", "I32", "U64", "I64", "BOOL")


def check_folder(folder: Path) -> None:
    """Check a model's folder.

    Args:
        folder: the folder, with config.json and safetensors files.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if a file is damaged, with its name and the reason.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"there is no {CONFIG} in {folder}")
    contents = {file.name: read_json(file) for file in sorted(folder.glob("*.json"))}
    config = contents[CONFIG]
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not a JSON object")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / CONFIG} does not state a model_type")
    dtypes: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        dtypes |= _read_dtypes(file)
    is_quantized = any(key.startswith("quant") for key in config)
    _check_numbers(folder / CONFIG, config, len(dtypes), is_quantized)
    _check_dtypes(folder, dtypes, is_quantized)
    for name in (CONFIG, "generation_config.json"):
        _check_end_tokens(folder / name, contents.get(name))


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if it is not JSON, with its name and the reason.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error
    return parse_json(text, str(file))


def _read_dtypes(file: Path) -> dict[str, str]:
    """Return the data type of each tensor in a safetensors file; check that the file is whole."""
    try:
        with safe_open(file, "numpy") as stored:
            return {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    except Exception as error:  # damaged headers cause many kinds of errors
        raise ValueError(f"{file} is not a complete safetensors file") from error


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a configuration and those within it."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)


def _check_numbers(file: Path, config: dict[str, Any], tensors: int, is_quantized: bool) -> None:
    """Check the numbers of a configuration that would make a model too large, or not finite."""
    for part in _objects(config):
        for name in _LAYER_COUNTS:
            layers = part.get(name)
            if isinstance(layers, int) and tensors and layers > tensors:
                raise ValueError(
                    f"{file} has {name} {layers}, more than the {tensors} tensors in the folder"
                )
        for name in ("hidden_size", "intermediate_size"):
            size = part.get(name)
            if is_quantized and isinstance(size, int) and size < _MIN_GROUP:
                raise ValueError(f"{file} has {name} {size}, less than a quantization group")
        for name in _BASES:
            base = part.get(name)
            if base is not None and (not isinstance(base, float | int) or not 0 < base < 1e18):
                raise ValueError(f"{file} has {name} {one_line(repr(base))}, not a positive number")


def _check_dtypes(folder: Path, dtypes: dict[str, str], is_quantized: bool) -> None:
    """Check that weights have data types that hold weights."""
    for name, dtype in dtypes.items():
        path, _, kind = name.rpartition(".")
        has_scales = f"{path}.scales" in dtypes
        if kind == "weight":
            is_wrong = dtype != "U32" if has_scales else dtype in _CODES and not is_quantized
        else:
            is_wrong = kind in ("scales", "biases") and dtype in _CODES
        if is_wrong:
            raise ValueError(f"the weights {name} in {folder} have the data type {dtype}")


def _check_end_tokens(file: Path, content: Any) -> None:
    """Check the end-of-sequence tokens that a file states."""
    tokens = content.get("eos_token_id") if isinstance(content, dict) else None
    listed = tokens if isinstance(tokens, list) else [tokens]
    if not all(token is None or type(token) is int for token in listed):
        raise ValueError(f"{file} has the eos_token_id {one_line(repr(tokens))}, not integers")
