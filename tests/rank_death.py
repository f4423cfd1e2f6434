"""One rank of a test: rank NUMBER dies, as WAY says, while all others wait for it.

rank_death.py NUMBER WAY
"""

import os
import signal
import sys
import time

from glass_mlx.distributed import joined
from glass_mlx.errors import exit_on_error
from glass_mlx.models import world

import mlx.core as mx


def die(way: str) -> None:
    """End this process: by a signal, or by an error that only this rank has."""
    time.sleep(1)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the disk of this machine is full")


def main() -> None:
    """Talk to the other ranks until one has died."""
    number, way = int(sys.argv[1]), sys.argv[2]
    with exit_on_error("glass-mlx"), joined("generate"):
        print("rank", world().rank, flush=True)
        if world().rank == number:
            with exit_on_error("glass-mlx"):  # as in a command
                die(way)
        while True:
            mx.eval(world().sum(mx.ones(1)))


if __name__ == "__main__":
    main()
