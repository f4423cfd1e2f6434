"""Mark answers. lm-evaluation-harness calls these functions, which are copied beside its tasks.

Every function takes a question's record and the texts that the model wrote for it (one), and
returns `right` (1 if all of the answer is) and `share` (how much of it is).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

Marks = dict[str, float]

# What code that a model wrote may take.
_SECONDS = 10
_BYTES = 1 << 30

_RUNNER = """
import contextlib, io, json, resource, sys
with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
code, tests = json.load(sys.stdin)
place, passed = dict(__name__="answer"), 0
with contextlib.redirect_stdout(io.StringIO()):
    exec(code, place)
    for test in tests:
        with contextlib.suppress(Exception):
            passed += eval(test, dict(place)) is True
print(passed)
"""


def _compare(found: Sequence[Any], expected: Sequence[Any]) -> Marks:
    """Mark a sequence by its elements, each in its place."""
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    return {"right": float([*found] == [*expected]), "share": same / len(expected)}


def _parts(text: str, separator: str | None = None) -> list[str]:
    return [part.strip() for part in text.strip().split(separator) if part.strip()]


def mark_words(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark an answer by its words."""
    return _compare(_parts(results[0]), _parts(record["answer"]))


def mark_list(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark an answer by its parts between semicolons."""
    return _compare(_parts(results[0], ";"), _parts(record["answer"], ";"))


def mark_lines(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark an answer by its lines."""
    return _compare(_parts(results[0], "\n"), _parts(record["answer"], "\n"))


def mark_sentences(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark an answer by its sentences. What comes after as many as there should be is ignored."""
    expected = _parts(record["answer"], ".")
    return _compare(_parts(results[0], ".")[: len(expected)], expected)


def mark_steps(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark a calculation: `share` by its steps, and `right` by its result alone."""
    marks = mark_sentences(record, results)
    steps, expected = _parts(results[0], "."), _parts(record["answer"], ".")
    return marks | {"right": float(steps[: len(expected)][-1:] == expected[-1:])}


def mark_json(record: dict[str, Any], results: list[str]) -> Marks:
    """Mark a JSON object by its values. One that does not parse has none right."""
    expected = json.loads(record["answer"])
    try:
        found = json.loads(results[0])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"right": 0.0, "share": 0.0, "parses": 0.0}
    same = sum(key in found and found[key] == value for key, value in expected.items())
    return {"right": float(found == expected), "share": same / len(expected), "parses": 1.0}


def mark_code(record: dict[str, Any], results: list[str]) -> Marks:
    """Run a function's tests in a process of its own, with limits on time and memory."""
    tests = record["tests"]
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", _RUNNER.format(limit=_BYTES)],
                input=json.dumps([results[0], tests]),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return {"right": 0.0, "share": 0.0}
    if run.returncode == 0 and run.stdout.strip().isdecimal():
        passed = int(run.stdout)
    return {"right": float(passed == len(tests)), "share": passed / len(tests)}
