"""Accuracies, differences and flips of tasks, with 95 % intervals."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

_Z = 1.96

Row = dict[str, Any]


def share_interval(count: int, total: int) -> list[float]:
    """Return the interval of a share by Wilson's score, which holds near 0 and 1, too.

    Args:
        count: how many of the questions.
        total: the number of questions, at least 1.
    """
    share, scale = count / total, 1 + _Z**2 / total
    center = (share + _Z**2 / (2 * total)) / scale
    half = _Z * sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / scale
    return [max(0.0, center - half), min(1.0, center + half)]


def difference_interval(lost: int, gained: int, total: int) -> list[float]:
    """Return the interval of a difference of two accuracies on the same questions.

    Agresti and Min (2005) add half a question to each cell of the table of outcomes, so that the
    interval has a width where no outcome changed.

    Args:
        lost: questions that only the first was right in.
        gained: questions that only the second was right in.
        total: the number of questions.
    """
    n, b, c = total + 2, lost + 0.5, gained + 0.5
    center = (c - b) / n
    half = _Z * sqrt(b + c - (c - b) ** 2 / n) / n
    return [max(-1.0, center - half), min(1.0, center + half)]


def accuracy(right: Sequence[float]) -> Row:
    """Return the accuracy of answers that are 1 or 0."""
    count = round(sum(right))
    return {
        "questions": len(right),
        "accuracy": count / len(right),
        "accuracy_95": share_interval(count, len(right)),
    }


def changes(dense: Sequence[float], sliced: Sequence[float]) -> Row:
    """Compare answers with the dense model's to the same questions.

    Args:
        dense: for each question, 1 if the dense model's answer was right, or 0.
        sliced: the same of the sliced model.
    """
    lost = sum(a > b for a, b in zip(dense, sliced, strict=True))
    gained = sum(a < b for a, b in zip(dense, sliced, strict=True))
    total = len(dense)
    return {
        "dense_accuracy": sum(dense) / total,
        "difference": (gained - lost) / total,
        "difference_95": difference_interval(lost, gained, total),
        "flips": (lost + gained) / total,
        "flips_95": share_interval(lost + gained, total),
        "lost": lost,
        "gained": gained,
    }
