"""The single entry point for all commands."""

import importlib
import sys

from glass_mlx.cli import COMMANDS, main

import pytest


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(run_command, name):
    code, out, err = run_command(main, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(("usage: glass-mlx " + name, "usage: python -m glass_mlx." + name))
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
