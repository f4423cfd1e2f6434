"""Write tasks for `glass-mlx evaluate` into a folder: questions whose answers are right or wrong.

The kinds are calculations in steps, copying, finding lines in a text of 1,000 tokens, JSON, code
that must pass tests, numbers in words, and a report of 250 tokens. All come from a seed, and all
have worked examples in the prompt, which suits base models. The task `code` runs what the model
writes, in a process with limits on time and memory; the harness wants --confirm-run-unsafe-code.
"""

import argparse
from pathlib import Path

from glass_mlx.config import check_seed
from glass_mlx.errors import exit_on_error

from tasks.files import write_tasks
from tasks.questions import TASKS


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="The folder to write, which is replaced."
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="Default: all.")
    parser.add_argument("--count", type=int, help="Questions of each task. Default: 30 to 100.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the tasks, and print their files.

    Raises:
        ValueError: for a value that is out of range.
    """
    check_seed(args.seed)
    if args.count is not None and args.count < 1:
        raise ValueError("--count must be at least 1")
    for file in write_tasks(args.output, args.tasks, args.count, args.seed):
        print(file)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("make_tasks"):
        run(setup_arg_parser().parse_args())


if __name__ == "__main__":
    main()
