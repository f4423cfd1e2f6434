"""How the commands end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending(name: str, interrupted: str = "") -> Iterator[None]:
    """End a command on bad input with one sentence and exit code 2, when interrupted with 130.

    Args:
        name: the command's.
        interrupted: what to say when the user interrupts it.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
