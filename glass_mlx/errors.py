"""Errors of commands: one sentence on standard error, and an exit code."""

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

# The exit code of a command that SIGINT ends.
INTERRUPTED = 130

# The longest message that `one_line` returns.
_MAX_LENGTH = 800


def one_line(error: BaseException | str) -> str:
    """Return an error's message on one line, or its class name if it has no message.

    Characters that cannot be printed become spaces, and a long message is shortened. An error of
    the operating system is shown without its number.
    """
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        message = f"{place}{error.strerror}"
    printable = "".join(c if c.isprintable() else " " for c in message)
    line = " ".join(printable.split()) or type(error).__name__
    return line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]} ..."


_MISSING = re.compile(r"missing \d+ required [a-z -]+arguments?: (.*)")
# What a library says when its own code fails, and not when it refuses a file.
_INTERNAL = re.compile(
    r"\[[a-z_]+\] |\(\): incompatible|'\w+' object|invalid literal|not in list|<class|codec"
    r"|unhashable|math domain"
)


def is_library_error(error: BaseException) -> bool:
    """Return whether an exception is an error, and not an interrupt or an exit.

    A panic in a library written in Rust, such as tokenizers, is not an `Exception` for Python.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def library_reason(error: BaseException) -> str:
    """Say in one sentence why another library cannot use a user's files.

    Libraries raise errors of their own code for files that do not suit them. These errors tell a
    user nothing; they are the cause of the error that is raised instead.
    """
    if missing := _MISSING.search(str(error)):
        return f"its configuration lacks {missing[1]}"
    if isinstance(error, UnicodeDecodeError):
        return "a file is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    reason = re.sub(r"\b\w+(Error|Exception): ", "", one_line(error))
    is_sentence = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
    if not is_sentence or _INTERNAL.search(reason):
        return "its configuration, tokenizer and weights are damaged or do not fit together"
    return reason


@contextmanager
def exit_on_error(command: str, interrupted: str = "") -> Iterator[None]:
    """Run a command: turn its errors into a message and an exit code.

    The codes are 2 for bad input or too little memory, 130 for an interrupt, and 141 if the reader
    of the output has gone, as in `glass-mlx generate ... | head`. Characters that the terminal
    cannot show are printed as question marks.

    Args:
        command: the command's name, which the message starts with.
        interrupted: the message for an interrupt. Default: none.
    """
    try:
        _replace_unprintable_characters()
        try:
            _check_arguments()
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a pipe may break only now
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)
    except (ValueError, OSError, NotImplementedError) as error:
        _exit(2, f"{command}: error: {one_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        _exit(2, f"{command}: error: there is not enough memory ({one_line(error)})")
    except KeyboardInterrupt:
        _exit(INTERRUPTED, interrupted)


def _exit(code: int, message: str) -> NoReturn:
    """End the process with a message on standard error, if that can be written."""
    if message and sys.stderr is not None:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _replace_unprintable_characters() -> None:
    """Print a question mark for each character that a stream's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _check_arguments() -> None:
    """Raise ValueError for an argument with bytes that are not text."""
    for argument in sys.argv:
        check_text(argument, f"the argument {one_line(ascii(argument))}")


def _discard_output() -> None:
    """Redirect standard output to nowhere, so that Python's last flush of it succeeds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def check_text(text: str, name: str) -> str:
    """Return text that can be encoded.

    Args:
        text: the text.
        name: what it is, for the message.

    Raises:
        ValueError: if it has half a character (a lone surrogate), which comes from bytes that are
            not UTF-8 or from a JSON escape.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 text") from error
    return text


def parse_json(text: str, name: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        name: what it is, for the message.

    Raises:
        ValueError: if it is not JSON, with the reason.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({one_line(error)})") from error


def read_standard_input() -> str:
    """Read standard input to its end.

    Raises:
        ValueError: if it is closed or not UTF-8 text.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed; give the prompt itself with --prompt")
    try:
        return check_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise ValueError("standard input is not valid UTF-8 text") from error
