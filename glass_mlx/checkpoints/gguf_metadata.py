"""Metadata of a GGUF file: keys whose values are checked for type and range when they are read."""

import sys
from collections.abc import Iterator, Mapping

import numpy as np

# Arrays of numbers are NumPy arrays, arrays of strings are lists.
Value = bool | int | float | str | list[str] | np.ndarray

MAX_INTEGER = 2**31 - 1


_MAX_MESSAGE = 500


class GGUFError(ValueError):
    """Says in one sentence why a GGUF file cannot be used; "it" is the file.

    Names in a damaged file may hold anything; what cannot be printed is escaped.
    """

    def __init__(self, message: str) -> None:
        text = message[:_MAX_MESSAGE]
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def warn(message: str) -> None:
    """Print one line about a flaw of the file that does not keep it from being used."""
    print(f"warning: {message}", file=sys.stderr)


def shorten(value: Value) -> str:
    """Return a value as a message shows it: on one line of at most 60 characters."""
    text = repr(value.tolist()[:20]) if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Metadata:
    """The key-value part of a GGUF file.

    Every getter takes a default. A key that is missing and has no default is an error.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    @property
    def architecture(self) -> str:
        """The name of the model's architecture in llama.cpp."""
        return self.text("general.architecture")

    def hparam(self, name: str) -> str:
        """Return the key of a hyperparameter, which starts with the architecture's name."""
        return f"{self.architecture}.{name}"

    def value(self, key: str) -> Value:
        """Return the value of a key that is in the file, of any type."""
        if key not in self._values:
            raise GGUFError(f"its metadata has no {key}")
        return self._values[key]

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "a boolean")
        return value

    def integer(
        self, key: str, default: int | None = None, low: int = 0, high: int = MAX_INTEGER
    ) -> int:
        """Return an integer between `low` and `high`, inclusive."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, low: float = -np.inf) -> float:
        """Return a finite number that is not below `low`."""
        value = self._get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if is_number else np.nan  # type: ignore[arg-type]
        if not np.isfinite(number) or number < low:
            expected = "a number" if low == -np.inf else f"a number of {low} or more"
            raise self._wrong(key, value, expected)
        return number

    def strings(self, key: str) -> list[str]:
        """Return an array of strings; it is empty if the key is missing."""
        value = self._get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, value, "an array of strings")
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """Return an array of numbers, or None if the key is missing."""
        if key not in self._values:
            return None
        value = self._values[key]
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, value, "an array of numbers")
        return value

    def _get(self, key: str, default: Value | None) -> Value:
        return self.value(key) if default is None else self._values.get(key, default)

    def _wrong(self, key: str, value: Value, expected: str) -> GGUFError:
        return GGUFError(f"its {key} is {shorten(value)}, not {expected}")
