"""Changes to JSON: values of odd types and sizes at random places, and damaged text."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 65536),
    *(2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-45, 1e-300, 1e38, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
_ODD_STRINGS = ("", " ", "x" * 5000, "\0", "\ud800", "é", "../..", "None", "1", "{{", "%s{}", "\n")
_ODD_CONTAINERS: tuple[Any, ...] = ([], {}, [[]], [None], [[[[]]]], {"": None}, {"a": {"b": []}})

# Stands for lists within lists, deeper than a parser can follow.
_DEEP_MARK = "glass: deeply nested"
_DEPTH = 20_000


class JSONEdit(NamedTuple):
    """Mutated JSON.

    Attributes:
        content: the text, in UTF-8 unless the encoding is what changed.
        what: a description of the change.
        keeps_meaning: whether the text still describes the same tree.
    """

    content: bytes
    what: str
    keeps_meaning: bool = False


def odd_value(rng: random.Random, deep: bool = True) -> Any:
    """Return a value of a random type, which JSON in Python's dialect can represent.

    Args:
        rng: the source of choices.
        deep: whether the value may be `_DEEP_MARK`, which `to_text` replaces.
    """
    kinds = [ODD_NUMBERS, _ODD_STRINGS, _ODD_CONTAINERS, (None, True, False)]
    if deep and rng.random() < 0.02:
        return _DEEP_MARK
    return copy.deepcopy(rng.choice(rng.choice(kinds)))


def to_text(tree: Any) -> bytes:
    """Write a tree as JSON, with NaN and infinities as Python writes them."""
    text = json.dumps(tree)
    return text.replace(f'"{_DEEP_MARK}"', "[" * _DEPTH + "]" * _DEPTH).encode()


def mutate_json(rng: random.Random, tree: Any) -> JSONEdit:
    """Change a JSON file: mostly its tree, sometimes only its text."""
    if rng.random() < 0.15:
        return rng.choice(_TEXT_EDITS)(tree)
    mutated, what = mutate_tree(rng, tree)
    return JSONEdit(to_text(mutated), what)


def mutate_tree(rng: random.Random, tree: Any, deep: bool = True) -> tuple[Any, str]:
    """Change a copy of a tree at a random place; return it and a description.

    Args:
        rng: the source of choices.
        tree: a tree whose root is an object or a list with something in it.
        deep: see `odd_value`.
    """
    tree = copy.deepcopy(tree)
    if rng.random() < 0.02:
        value = odd_value(rng, deep)
        return value, f"the whole is {_shown(value)}"
    path, parent = _walk(rng, tree)
    edit = rng.choices(_TREE_EDITS, weights=(4, 1, 1, 1, 1, 1))[0]
    what = edit(rng, parent, path[-1], odd_value(rng, deep))
    return tree, f"{'.'.join(map(str, path))} {what}"


def _walk(rng: random.Random, tree: Any) -> tuple[list[Any], Any]:
    """Go down to a random place; return its path and the object or list that holds it."""
    path: list[Any] = []
    node = tree
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        child = node[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.25:
            return path, node
        node = child


def _replace(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    parent[key] = value
    return f"is {_shown(value)}"


def _drop(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    del parent[key]
    return "is dropped"


def _rename(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
        return "is there twice"
    parent[f"{key}_"] = parent.pop(key)
    return "has another name"


def _wrap(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    parent[key] = [parent[key]]
    return "is in a list"


def _as_text(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    parent[key] = str(parent[key])
    return f"is the string {_shown(parent[key])}"


def _scale(rng: random.Random, parent: Any, key: Any, value: Any) -> str:
    old = parent[key]
    if isinstance(old, bool) or not isinstance(old, int | float):
        return _replace(rng, parent, key, value)
    parent[key] = rng.choice([old + 1, old - 1, -old, 2 * old, old / 2, float(old), old * 10**6])
    return f"is {parent[key]} instead of {old}"


_TREE_EDITS: tuple[Callable[[random.Random, Any, Any, Any], str], ...] = (
    _replace,
    _drop,
    _rename,
    _wrap,
    _as_text,
    _scale,
)


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _with_duplicate(tree: Any) -> bytes:
    """Write an object whose first key is there twice, with null at last."""
    first = json.dumps(next(iter(tree))) if isinstance(tree, dict) else '"a"'
    return to_text(tree)[:-1] + f", {first}: null}}".encode()


_TEXT_EDITS: tuple[Callable[[Any], JSONEdit], ...] = (
    lambda tree: JSONEdit(b"", "it is empty"),
    lambda tree: JSONEdit(b"\n\n", "it is white space"),
    lambda tree: JSONEdit(b"\xef\xbb\xbf" + to_text(tree), "it begins with a byte-order mark"),
    lambda tree: JSONEdit(to_text(tree).decode().encode("utf-16"), "it is in UTF-16"),
    lambda tree: JSONEdit(to_text(tree)[:-1] + b",}", "it has a comma at the end"),
    lambda tree: JSONEdit(to_text(tree) * 2, "it is there twice"),
    lambda tree: JSONEdit(_with_duplicate(tree), "a key is there twice"),
    lambda tree: JSONEdit(to_text(tree).replace(b'"', b"'"), "it has single quotes"),
    lambda tree: JSONEdit(to_text(tree).replace(b": ", b": \xff", 1), "it is not UTF-8"),
    lambda tree: JSONEdit(json.dumps(tree, indent=3).encode(), "it has other spaces", True),
    lambda tree: JSONEdit(json.dumps(tree, ensure_ascii=False).encode(), "it has no escapes", True),
)
