"""The single entry point for all commands."""

import importlib
import subprocess
import sys

import glass_mlx
from glass_mlx.cli import COMMANDS, main

import pytest

# Run modules as `python -m` does, where importing MLX is interrupted; print the exit codes.
INTERRUPTED_IMPORT = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("glass_mlx")]:
        del sys.modules[name]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(end.code)
"""


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(run_command, name):
    code, out, err = run_command(main, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: glass-mlx {name}")
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_arguments_are_passed_on(run_command):
    code, out, err = run_command(main, "generate", "--prompt", "")
    assert (code, out) == (2, "")
    assert err == "glass-mlx: error: the prompt is empty\n"
    assert sys.argv == ["glass-mlx generate", "--prompt", ""]


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_without_a_command_all_commands_are_listed(run_command, arguments, code):
    assert run_command(main, *arguments)[0] == code
    for name, (_, purpose) in COMMANDS.items():
        assert name in run_command(main, *arguments)[1]
        assert purpose in run_command(main, *arguments)[1]


def test_an_unknown_command_is_refused(run_command):
    code, out, err = run_command(main, "serve")
    assert (code, out) == (2, "")
    assert err.startswith("glass-mlx: error: 'serve' is not a command; commands are generate, ")
    assert err.count("\n") == 1


def test_an_interrupt_while_mlx_is_imported_is_quiet():
    # The package glass_mlx.models imports MLX before its command runs.
    modules = [f"glass_mlx.{name}" for name in COMMANDS if name != "models"]
    result = run_python("-c", INTERRUPTED_IMPORT, *modules)
    assert (result.stdout, result.stderr) == ("130\n" * len(modules), "")


def test_the_package_imports_its_names_when_they_are_used():
    code = "import sys, glass_mlx.cli; print('mlx' in sys.modules); glass_mlx.load"
    assert run_python("-c", f"{code}; print('mlx' in sys.modules)").stdout == "False\nTrue\n"
    assert {name for names in glass_mlx._NAMES.values() for name in names} == {*glass_mlx.__all__}
    assert {*glass_mlx.__all__} <= {*dir(glass_mlx)}
    for name in glass_mlx.__all__:
        assert getattr(glass_mlx, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'glass_mlx' has no attribute 'nothing'"):
        _ = glass_mlx.nothing


def test_the_generate_command_does_not_hide_the_function():
    code = (
        "import glass_mlx.generate; print(glass_mlx.generate.__name__);"
        "import glass_mlx.generate.__main__; print(glass_mlx.generate.__name__)"
    )
    assert run_python("-c", code).stdout == "generate\ngenerate\n"
    result = run_python("-W", "error", "-m", "glass_mlx.generate", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: glass-mlx generate [flags]")
