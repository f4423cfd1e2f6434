"""The processes that `mlx.launch` starts together, and what they tell each other.

Each process is a rank. All ranks run the same program: what one of them asks of the others, all
must ask in the same order.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from hashlib import sha256
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

T = TypeVar("T")


class Ranks:
    """The ranks of a group.

    Args:
        group: the group. Default: this process alone.

    Attributes:
        group: the group, or None.
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = group.rank(), group.size()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads and writes files and talks to the user."""
        return self.rank == 0

    def settle(self) -> None:
        """Wait for the decode loop, which computes ahead, on a stream of its own.

        Ranks must talk to each other in the same order, and streams have no order among them. So
        this comes before anything that is computed on another stream.
        """
        if self.size > 1:
            mx.synchronize(generation_stream)

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum of an array over all ranks, lazily and on the current stream."""
        return mx.distributed.all_sum(array, group=self.group)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        self.settle()
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self._gathered(np.array([len(data)], np.int32))[:, 0]
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(data)] = data
        rows = self._gathered(padded)
        return [
            value if rank == self.rank else pickle.loads(row[:length].tobytes())
            for rank, (row, length) in enumerate(zip(rows, lengths, strict=True))
        ]

    def _gathered(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays (n,) of all ranks, (ranks, n)."""
        return np.array(mx.distributed.all_gather(mx.array(array)[None], group=self.group))

    def share(self, value: T) -> T:
        """Return the value of rank 0. The others' values do not matter."""
        if self.size == 1:
            return value
        self.settle()
        data = np.frombuffer(pickle.dumps(value) if self.is_first else b"", np.uint8)
        length = int(np.array(self.sum(mx.array([len(data)], mx.int32)))[0])
        if not self.is_first:
            data = np.zeros(length, np.uint8)
        data = np.array(self.sum(mx.array(data)))
        shared: T = value if self.is_first else pickle.loads(data.tobytes())
        return shared

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 alone, and return or raise on all ranks what it did there."""
        if self.size == 1:
            return function()
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as raised:
                error = _sendable(raised)
        result, error = self.share((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @contextmanager
    def held_by_first(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Enter a context, such as a lock, on rank 0 alone; its error is raised on all ranks."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(make())

            self.on_first(enter)
            yield

    def check_agreement(self, *values: Any) -> None:
        """Check that values are the same on all ranks.

        Raises:
            ValueError: if they are not, as on machines that round differently.
        """
        if self.size > 1 and len(set(self.gather(sha256(pickle.dumps(values)).digest()))) > 1:
            raise ValueError(
                "the machines do not compute the same tokens, so their slices do not fit together; "
                "use machines of the same kind, with the same versions of mlx and mlx-lm"
            )


def _sendable(error: Exception) -> Exception:
    """Return an error that can be pickled: the given one, or a plain one with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # as of an error whose constructor needs more than a message
        return ValueError(str(error))
    return error


@cache
def world() -> Ranks:
    """Return all ranks of this run; one if `mlx.launch` did not start this process."""
    return Ranks(mx.distributed.init())
