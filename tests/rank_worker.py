"""One rank of a test: run by `mlx.launch`, it writes what it computes to a file of its own.

    rank_worker.py FOLDER CASES

CASES is a JSON list of cases (see `rank_cases.Case`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import glass_mlx  # noqa: F401, before MLX
from glass_mlx import Session
from glass_mlx.models import divide, world
from rank_cases import (
    EXACT_TOKENS,
    WHOLE_TOKENS,
    Case,
    build,
    calibrated,
    dense_tokens,
    exact_tokens,
    generated,
)

import mlx.core as mx
import numpy as np


class Counter:
    """Counts the bytes that this rank hands to the functions that talk to other ranks."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_sum", "all_gather", "send"):
            setattr(mx.distributed, name, self._counting(getattr(mx.distributed, name)))

    def _counting(self, function: Any) -> Any:
        def call(array: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += array.nbytes
            return function(array, *args, **kwargs)

        return call

    def take(self) -> int:
        """Return the bytes since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken


def run(case: Case, counter: Counter) -> dict[str, np.ndarray]:
    """Run a case, and return what it computed by name."""
    ranks = world()
    model = build(case)
    divide(model, ranks, case.pipeline)
    session = Session(model)
    counter.take()
    found = {"dense": np.array(dense_tokens(model))}
    found["dense_bytes"] = np.array(counter.take())
    options = {"density": 1.0, "vocabulary": 1.0, "max_tokens": WHOLE_TOKENS, "warmup": 1}
    found["whole"], _, _ = generated(session, case, **options)
    counter.take()
    tokens, logprobs, selections = generated(session, case)
    found |= {"tokens": tokens, "logprobs": logprobs, "bytes": np.array(counter.take())}
    found |= {f"kept {path}": kept for path, kept in selections.items()}
    found["exact"] = np.array(exact_tokens(session, case))
    found["exact_dense"] = np.array(dense_tokens(model, EXACT_TOKENS))
    if case.is_thorough:
        found["again"], _, _ = generated(session, case)
        prior = calibrated(model)
        for path, scores in prior.scores["griffin"].items():
            found[f"prior {path}"] = scores
        found |= {f"sample {path}": s for path, s in prior.fingerprint.samples.items()}
    return found


def main() -> None:
    """Run all cases."""
    folder, counter = Path(sys.argv[1]), Counter()
    for case in json.loads(sys.argv[2]):
        case = Case(**case)
        np.savez(folder / f"{case.name}-{world().rank}.npz", **run(case, counter))


if __name__ == "__main__":
    main()
