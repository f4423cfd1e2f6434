"""Run a command on several machines: `mlx.launch` starts it on each of them, as one rank.

Rank 0 reads and writes files and prints. The others print nothing; if one of them fails, rank 0
says why.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from glass_mlx.errors import one_line
from glass_mlx.models import Ranks, world
from glass_mlx.rank_watch import RankWatch

import mlx.core as mx
import numpy as np

# The commands that can divide a model.
DIVIDING = ("generate", "server", "calibrate", "latency", "evaluate")


@contextmanager
def joined(name: str, program: str = "glass-mlx") -> Iterator[Ranks]:
    """Run a command as one rank of all.

    Args:
        name: the command's name.
        program: the program's name, for messages.

    Raises:
        ValueError: if the command cannot divide a model and there are several ranks.
    """
    ranks = world()
    if ranks.size == 1:
        yield ranks
        return
    stderr = os.dup(2)
    if not ranks.is_first:
        _redirect_output()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 is interrupted, and ends the others
    if name not in DIVIDING:
        raise ValueError(
            f"{name} cannot be run by mlx.launch; run it on one machine, without mlx.launch"
        )
    _share_seed(ranks)
    watch = RankWatch(ranks, program, stderr)
    try:
        yield ranks
    except SystemExit as end:
        if end.code in (None, 0):
            watch.done()
        else:
            watch.failed(_last_words())
        raise
    except RuntimeError as error:
        watch.blame_others()  # MLX fails in many ways if another rank has ended
        watch.failed(one_line(error))
        raise
    except BaseException as error:
        watch.failed(one_line(error))
        raise
    watch.done()


def _redirect_output() -> None:
    """Send what this process prints to nowhere, and its errors to a file that `_last_words` reads.

    This is done below Python, for libraries that print by themselves.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _last_words() -> str:
    """Return the last line that this process printed to its redirected standard error."""
    sys.stderr.flush()
    try:
        size = os.lseek(2, 0, os.SEEK_END)
        text = os.pread(2, 4096, max(0, size - 4096)).decode(errors="replace")
    except OSError:  # a terminal or pipe: this is rank 0, which prints for itself
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].partition(" error: ")[2] or lines[-1] if lines else ""


def _share_seed(ranks: Ranks) -> None:
    """Give all ranks the random state of rank 0, so that they sample the same tokens."""
    (key,) = cast(Iterable[mx.array], mx.random.state)
    mx.random.seed(ranks.share(int.from_bytes(np.array(key).tobytes(), "little")))
