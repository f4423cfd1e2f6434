"""What a mutated file is, and what may happen when it is opened."""

from dataclasses import dataclass
from enum import Enum


class Expected(Enum):
    """What may happen when a mutated file is opened. Every file may also be refused, except SAME.

    Members:
        SAME: it loads and gives the same output as the seed; its meaning is the same.
        SAME_IF_LOADED: if it loads, it gives the same output as the seed.
        REFUSED: it is refused.
        FINITE: if it loads, its output is finite. Settings are changed, but no weights.
        ANY: if it loads, two loads give the same output.
    """

    SAME = "the same output as the seed"
    SAME_IF_LOADED = "the same output as the seed, or a refusal"
    REFUSED = "a refusal"
    FINITE = "finite output, or a refusal"
    ANY = "any output, or a refusal"


@dataclass(frozen=True)
class Mutation:
    """A change to a file.

    Attributes:
        what: a description of the change.
        expected: what may happen when the file is opened.
    """

    what: str
    expected: Expected
