"""Replace modules of a model without changing the model."""

import copy
import re
from collections.abc import Callable, Mapping
from functools import cache
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


def with_replacements(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model with some modules replaced by path; see `with_modules`."""
    by_parent: dict[str, dict[str, nn.Module]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        by_parent.setdefault(parent, {})[name] = module
    return with_modules(model, by_parent)


def with_call(module: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """Return a copy of a module that calls a function, and is otherwise like the module.

    Models may ask for a module's class and members, which a wrapper would not have.
    """
    changed = copy.copy(module)
    changed.__class__ = _calling_class(type(module))
    changed._call = call
    return changed


@cache
def _calling_class(module_class: type[nn.Module]) -> type[nn.Module]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    return type(module_class.__name__, (module_class,), {"__call__": run})


def _key(node: Any, name: str) -> str | int:
    """Turn a part of a path into an attribute of a module, or an index of a list."""
    return int(name) if isinstance(node, list) else name
