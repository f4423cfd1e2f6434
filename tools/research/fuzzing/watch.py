"""Run many tasks in processes that may hang or crash."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import monotonic
from typing import Any

# A process is not forked but started anew, because MLX has threads.
_CONTEXT = multiprocessing.get_context("spawn")
_READY = "ready"
# Importing the libraries and opening all valid files may take this long, in seconds.
_START_LIMIT = 300.0


@dataclass(frozen=True)
class Lost:
    """The end of a process that gave no result.

    Attributes:
        reason: how it ended.
    """

    reason: str


@dataclass(eq=False)
class _Worker:
    """A process, and what it is at.

    Attributes:
        process: the process.
        connection: the connection to it.
        deadline: the time at which it has hung.
        number: the task that it runs, or None while it starts.
    """

    process: SpawnProcess
    connection: Connection
    deadline: float
    number: int | None = None


def watched(
    numbers: Sequence[int],
    run: Callable[[int], Any],
    prepare: Callable[[], object],
    jobs: int,
    limit: float,
    is_quiet: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Run tasks in processes, which are replaced when they hang or crash.

    Args:
        numbers: the tasks' numbers.
        run: runs one task; it and its result must be picklable.
        prepare: runs once in every process before its first task.
        jobs: the largest number of processes at a time.
        limit: the time of one task in seconds.
        is_quiet: whether to drop what tasks print.

    Yields:
        The number of each task and its result, or a `Lost`, in the order in which they end.

    Raises:
        RuntimeError: if `prepare` fails.
    """
    waiting, workers = iter(numbers), []
    try:
        for _ in range(min(jobs, len(numbers))):
            workers.append(_start(run, prepare, is_quiet))
        while workers:
            by_connection = {worker.connection: worker for worker in workers}
            nearest = min(worker.deadline for worker in workers)
            for connection in wait([*by_connection], max(0.0, nearest - monotonic())):
                worker = by_connection[connection]  # type: ignore[index]
                result = _receive(worker)
                if worker.number is not None:
                    yield worker.number, result
                elif isinstance(result, Lost):
                    raise RuntimeError(f"a process cannot start: {result.reason}")
                if isinstance(result, Lost):
                    workers[workers.index(worker)] = worker = _start(run, prepare, is_quiet)
                elif not _give(worker, waiting, limit):
                    workers.remove(worker)
            for worker in [worker for worker in workers if worker.deadline <= monotonic()]:
                number = worker.number
                _stop(worker)
                if number is None:
                    raise RuntimeError("a process takes too long to start")
                yield number, Lost(f"hangs for more than {limit:g} seconds")
                workers[workers.index(worker)] = _start(run, prepare, is_quiet)
    finally:
        for worker in workers:
            _stop(worker)


def _start(run: Callable[[int], Any], prepare: Callable[[], object], is_quiet: bool) -> _Worker:
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_work, args=(there, run, prepare, is_quiet), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here, monotonic() + _START_LIMIT)


def _receive(worker: _Worker) -> Any:
    """Return what a process sent, or how it ended."""
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        _stop(worker)
        code = worker.process.exitcode
        return Lost(f"crashes with signal {-code}" if code and code < 0 else f"exits with {code}")


def _give(worker: _Worker, waiting: Iterator[int], limit: float) -> bool:
    """Give a process the next task; return False, and end it, if there is none."""
    number = next(waiting, None)
    if number is None:
        _stop(worker)
        return False
    worker.number, worker.deadline = number, monotonic() + limit
    worker.connection.send(number)
    return True


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.join(1.0 if worker.process.exitcode is not None else 0.1)
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join()


def _work(
    connection: Connection,
    run: Callable[[int], Any],
    prepare: Callable[[], object],
    is_quiet: bool,
) -> None:
    """Run tasks until the connection is closed."""
    prepare()
    if is_quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(nowhere, stream.fileno())
    connection.send(_READY)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send(run(connection.recv()))
