"""Write a sliced model as an ordinary checkpoint, which stock mlx-lm loads and runs."""

import copy
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glass_mlx.errors import one_line
from glass_mlx.files import locked, replacing
from glass_mlx.models import FFN, find_ffns, named_arrays
from glass_mlx.prior.lookup import model_folder

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, save

Shapes = dict[str, tuple[int, ...]]

# mlx-kld copies the scalars in this file into its records.
_RECIPE = "quant-recipe.json"


def write_sliced_checkpoint(
    sliced: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    output: Path,
    about: dict[str, Any],
    trust_remote_code: bool = False,
) -> None:
    """Write a sliced model as a checkpoint.

    Args:
        sliced: the sliced model.
        tokenizer: its tokenizer, which was loaded from the dense model's folder.
        config: the configuration of the sliced model.
        output: the folder to write, which must not exist.
        about: a description of the selection, for the configuration's entry "glass".
        trust_remote_code: whether code in the model's folder may run.

    Raises:
        OSError: if the checkpoint cannot be written.
        ValueError: if `output` exists, or mlx-lm does not load the result.
    """
    check_output(output)
    folder = model_folder(tokenizer)
    if folder is None:
        raise ValueError("the model was not loaded from a folder with its files")
    config = config | {"glass": about}
    with locked(output), replacing(output, folder=True) as temporary:
        try:
            save(temporary, folder, sliced, tokenizer, config, donate_model=False)
            (temporary / "README.md").write_text(_model_card(about), encoding="utf-8")
            (temporary / _RECIPE).write_text(_recipe(about), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
            raise OSError(f"{output} cannot be written: {one_line(error)}") from error
        options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        try:
            load_model(temporary, lazy=True, **options)
        except Exception as error:  # mlx-lm raises exceptions of many types
            raise ValueError(
                f"mlx-lm does not load the sliced checkpoint: {one_line(error)}"
            ) from error


def _recipe(about: dict[str, Any]) -> str:
    """Return what was done to a model as JSON with scalars only."""
    scalars = {k: v for k, v in about.items() if isinstance(v, str | int | float)}
    return json.dumps({"method": "glass-mlx export"} | scalars, indent=2) + "\n"


def check_output(output: Path) -> None:
    """Check that a checkpoint can be written to a folder, and loaded from there.

    Raises:
        OSError: if the folder cannot be made.
        ValueError: if there is something already, or mlx-lm would not find weights in the folder.
    """
    if output.exists():
        raise ValueError(f"there is something at {output}; name a folder that does not exist yet")
    address = Path(os.path.realpath(output))
    if glob.escape(str(address)) != str(address):
        raise ValueError(f"mlx-lm finds no weights in {address}; name it without [, ], * and ?")
    parent = next(folder for folder in address.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{output} cannot be made in {parent}; name another folder")


def without_float_layers(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a configuration whose quantization covers only a model's quantized layers."""
    modules = dict(model.named_modules())
    quantized = {path for path, module in modules.items() if "scales" in module}
    config = dict(config)
    for key in ("quantization", "quantization_config"):
        entries = config.get(key)
        if not quantized:
            config.pop(key, None)
        elif isinstance(entries, dict):
            floats = {path for path in modules if path not in quantized}
            config[key] = {k: v for k, v in entries.items() if k not in floats}
    return config


def narrowed(model: nn.Module, config: dict[str, Any], width: int, kept: int) -> dict[str, Any]:
    """Return a model's configuration with fewer neurons in each FFN and no other difference.

    Each value that may be the width is changed, and a model is built to check the result. No list
    of configuration keys is needed. In a mixture of experts, the routed experts get fewer neurons;
    other FFNs may, if the same value states their width.

    Args:
        model: the model.
        config: its configuration.
        width: the number of neurons of each of the FFNs in `narrowed_ffns`.
        kept: the number of neurons after slicing.

    Raises:
        ValueError: if no configuration has only this difference.
    """
    original = _build(model, config)
    others = None if original is None else _other_shapes(original)
    for candidate in _with_width(config, width, kept):
        built = _build(model, candidate)
        try:
            if built is None or _other_shapes(built) != others:
                continue
            if {ffn.width for ffn in narrowed_ffns(find_ffns(built))} == {kept}:
                return candidate
        except ValueError:  # nothing in this model can be sliced
            continue
    raise ValueError(
        f"models of type {config.get('model_type')} have no configuration with {kept} instead of "
        f"{width} neurons in all feed-forward networks; this one cannot be exported"
    )


def narrowed_ffns(ffns: list[FFN]) -> list[FFN]:
    """Return the FFNs that an export narrows: the routed experts if there are any, or all."""
    stacks = [ffn for ffn in ffns if ffn.experts is not None]
    return stacks or ffns


def built_widths(model: nn.Module, config: dict[str, Any]) -> dict[str, int]:
    """Return the number of neurons of each FFN under a configuration that `narrowed` returned."""
    built = _build(model, config)
    assert built is not None
    return {ffn.path: ffn.width for ffn in find_ffns(built)}


def _build(model: nn.Module, config: dict[str, Any]) -> nn.Module | None:
    """Build a model of the same class from a configuration, without computing its weights."""
    try:
        architecture: Any = sys.modules[type(model).__module__]
        arguments = architecture.ModelArgs.from_dict(copy.deepcopy(config))
        kind: Any = type(model)
        return kind(arguments)
    except Exception:  # every architecture rejects configurations in its own way
        return None


def _with_width(config: dict[str, Any], width: int, kept: int) -> Iterator[dict[str, Any]]:
    """Yield configurations in which one value, which may be the width, is reduced."""
    smaller = {width: kept, 2 * width: 2 * kept}
    for key, value in config.items():
        if isinstance(value, dict):
            for inner in _with_width(value, width, kept):
                yield config | {key: inner}
        elif isinstance(value, int) and value in smaller:
            yield config | {key: smaller[value]}
    yield config | {"intermediate_size": kept}


def _other_shapes(model: nn.Module) -> Shapes:
    """Return the shapes of all arrays outside the FFNs' projections."""
    projections = tuple(f"{ffn.path}.{name}." for ffn in find_ffns(model) for name in ffn.layers)
    return {
        path: array.shape for path, array in named_arrays(model) if not path.startswith(projections)
    }


def _model_card(about: dict[str, Any]) -> str:
    head = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "---"]
    facts = [f"- {key}: {value}" for key, value in about.items()]
    title = f"# {about['model']} with {about['density']:.2f} of its feed-forward neurons"
    return "\n".join([*head, title, "", "Made with glass-mlx.", "", *facts, ""])
