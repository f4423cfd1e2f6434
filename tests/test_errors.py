"""What commands print and return when something goes wrong."""

import io
import os
import subprocess
import sys

from glass_mlx.errors import (
    exit_on_error,
    is_library_error,
    library_reason,
    one_line,
    read_standard_input,
)

import pytest

PROGRAM = """
import sys
from glass_mlx.errors import exit_on_error
with exit_on_error("tool"):
    {}
"""


def run(code, *arguments, **options):
    """Run Python code with exit_on_error in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(code), *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, timeout=60, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_shows_what_it_can(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = run("print('\\u03bb 0.45 \\U0001f600'); raise ValueError('\\u03bb')", env=environment)
    assert result.returncode == 2
    shown = "λ 0.45 😀".encode(encoding, "replace").strip()
    assert result.stdout.strip() == shown
    assert result.stderr.strip() == b"tool: error: " + "λ".encode(encoding, "replace")


def test_a_broken_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    code = "print('x' * 10)"
    for program in (code, f"{code}; sys.exit(0)", "print('x' * 1000000, flush=True)"):
        result = run(program, stdout=write)
        assert result.returncode == 141
        assert result.stderr == b""
    os.close(write)


def test_arguments_that_are_not_text_are_refused():
    result = run("pass", b"caf\xe9")
    assert result.returncode == 2
    assert result.stderr == b"tool: error: the argument 'caf\\udce9' is not valid UTF-8 text\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines"), "two lines"),
        (ValueError(), "ValueError"),
        (ValueError("a\x00b\x7f\u2028c"), "a b c"),
        (ValueError("x" * 5000), "x" * 800 + " ..."),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "a/b: No such file or directory",
        ),
        (OSError("full"), "full"),
    ],
)
def test_a_message_is_one_printable_line(error, message):
    assert one_line(error) == message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Model type foo not supported."), "Model type foo not supported."),
        (OSError("disk full"), "disk full"),
        (
            TypeError("ModelArgs.__init__() missing 1 required positional argument: 'n_layers'"),
            "its configuration lacks 'n_layers'",
        ),
        (RecursionError("maximum recursion depth exceeded"), "a file is nested too deeply"),
        (MemoryError(), "it needs more memory than there is"),
        (KeyError("rope"), "damaged or do not fit together"),
        (ValueError("[reshape] Cannot reshape array"), "damaged or do not fit together"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "do not fit together"),
    ],
)
def test_errors_in_a_librarys_own_code_become_a_sentence(error, reason):
    assert library_reason(error).endswith(reason)


def test_a_panic_is_an_error_and_an_interrupt_is_not():
    panic = type("PanicException", (BaseException,), {})()
    assert is_library_error(panic)
    assert is_library_error(ValueError())
    assert not is_library_error(KeyboardInterrupt())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("bad\nvalue"), 2, "tool: error: bad value\n"),
        (OSError("full"), 2, "tool: error: full\n"),
        (NotImplementedError("no"), 2, "tool: error: no\n"),
        (MemoryError(), 2, "tool: error: there is not enough memory (MemoryError)\n"),
        (
            RuntimeError("[malloc] Unable to allocate 9 bytes."),
            2,
            "tool: error: there is not enough memory ([malloc] Unable to allocate 9 bytes.)\n",
        ),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_errors_become_messages_and_codes(capsys, monkeypatch, error, code, message):
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as stop, exit_on_error("tool", "stopped"):
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == message


def test_standard_input_must_be_open_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_standard_input()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    with pytest.raises(ValueError, match="standard input is not valid UTF-8 text"):
        read_standard_input()
    escaped = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", escaped)
    with pytest.raises(ValueError, match="standard input is not valid UTF-8 text"):
        read_standard_input()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert read_standard_input() == "hi"


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool"])
    for error in (RuntimeError("generator ignored GeneratorExit"), TypeError("x")):
        with pytest.raises(type(error)), exit_on_error("tool"):
            raise error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_reported_wherever_the_output_goes():
    with open("/dev/full", "w") as full:
        result = run("print('x')", stdout=full)
        assert result.returncode == 2
        assert result.stderr == b"tool: error: No space left on device\n"
        assert run("raise ValueError('x')", stderr=full).returncode == 2
        parser = "from glass_mlx.arguments import CommandParser; CommandParser().parse()"
        result = run(parser, "--help", stdout=full)
        assert (result.returncode, result.stdout) == (2, None)
