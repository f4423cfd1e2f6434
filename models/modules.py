"""Replace modules of a model without changing the model."""

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def layer_order(path: str) -> str:
    """Return a key that sorts module paths in the order of the layers."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), path)


def named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return all arrays of a module by path."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def with_modules(model: nn.Module, modules: Mapping[str, Mapping[str, nn.Module]]) -> nn.Module:
    """Return a model with some modules replaced. The given model does not change.

    Only the modules between the root and a replaced module are copied. Everything else is shared,
    including every array. Nothing has to be undone, and several such models can run at once.

    Args:
        model: the model.
        modules: for the path of a module or list, its new members by name.
    """
    root = copy.copy(model)
    copies = {"": root}
    for path, replacements in modules.items():
        node, at = root, ""
        for name in path.split(".") if path else ():
            at += f".{name}"
            key = _key(node, name)
            if at not in copies:
                copies[at] = node[key] = copy.copy(node[key])
            node = copies[at]
        for name, module in replacements.items():
            node[_key(node, name)] = module
    return root


def _key(node: Any, name: str) -> str | int:
    """Turn a part of a path into an attribute of a module, or an index of a list."""
    return int(name) if isinstance(node, list) else name
