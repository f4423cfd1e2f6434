"""Errors of commands: one sentence on standard error, and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def one_line(error: Exception) -> str:
    """Return an error's message on one line, or its class name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def exit_on_error(command: str, interrupted: str = "") -> Iterator[None]:
    """Turn errors into a message and an exit code: 2 for bad input, 130 for an interrupt.

    Args:
        command: the command's name, which the message starts with.
        interrupted: the message for an interrupt. Default: none.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
