"""The entry point for all commands: `glass-mlx COMMAND`, like `mlx_lm COMMAND`."""

import importlib
import signal
import sys
from importlib.metadata import version
from typing import NoReturn

from glass_mlx.errors import INTERRUPTED, exit_on_error

COMMANDS = {
    "generate": ("glass_mlx.generate.__main__", "answer a prompt"),
    "chat": ("glass_mlx.chat", "chat with a model in the terminal"),
    "server": ("glass_mlx.server.__main__", "serve a model over HTTP"),
    "cache_prompt": ("glass_mlx.cache_prompt", "read a prompt once for many questions"),
    "calibrate": ("glass_mlx.calibrate", "measure a model's prior, show one or publish one"),
    "export": ("glass_mlx.export", "save a sliced model as a checkpoint for stock mlx-lm"),
    "fidelity": (
        "glass_mlx.fidelity.__main__",
        "measure how close sliced models stay to the dense model",
    ),
    "latency": ("glass_mlx.latency.__main__", "measure how fast a model decodes"),
    "benchmark": ("glass_mlx.benchmark", "time generations, with the flags of mlx_lm.benchmark"),
    "perplexity": ("glass_mlx.perplexity", "measure perplexity, dense and sliced"),
    "evaluate": ("glass_mlx.evaluate", "run tasks of lm-evaluation-harness"),
    "models": ("glass_mlx.models.__main__", "list the architectures that can be sliced"),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: glass-mlx COMMAND [flags]",
            "",
            *lines,
            "",
            "glass-mlx COMMAND --help lists a command's flags.",
            "glass-mlx --version prints the version.",
        ]
    )


def run_command(name: str) -> NoReturn:
    """Import and run a command, and end the process.

    Args:
        name: the command's name. `sys.argv` holds its flags.
    """
    try:
        with exit_on_error("glass-mlx"):
            sys.argv[0] = f"glass-mlx {name}"  # the name in the command's usage
            main = importlib.import_module(COMMANDS[name][0]).main
            with importlib.import_module("glass_mlx.distributed").joined(name):
                main()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # a second interrupt must not disturb Python's own end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    sys.exit()


def main() -> None:
    """Run the named command; an unknown name ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name in ("", "-h", "--help"):
            print(usage())
            sys.exit(0 if name else 2)
        if name == "--version":
            print(version("glass-mlx"))
            sys.exit(0)
        if name not in COMMANDS:
            raise ValueError(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}")
        del sys.argv[1]
        run_command(name)


if __name__ == "__main__":
    main()
