"""Open thousands of mutated files, and list those that are neither refused nor loaded right.

The files are GGUF files, priors, prompt caches, and the tokenizers, configurations and weights of
model folders. Each is opened as a user does, and text is generated with it. It must be refused with
one readable line, or load right: no traceback, no crash, no more than ten seconds, no more memory
than its size justifies, and no silent change of the output where the file's meaning is the same or
protected.

A case is made from `--seed` and its number alone, so `--case NUMBER` opens it again.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from glass_mlx.errors import exit_on_error
from glass_mlx.reporting.tables import markdown_table

from fuzzing.cases import FORMATS, Case, case_format, case_numbers, make_case
from fuzzing.checks import FAILED, LOADED, REFUSED, Outcome, prepare, run_case
from fuzzing.watch import Lost, watched
from tqdm import tqdm


def _number(text: str) -> int:
    """Read an argument that is a whole number, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    """Read an argument that is a whole number, at least 1."""
    if not (number := _number(text)):
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=_positive, default=10_000, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--formats", nargs="+", choices=[*FORMATS], default=[*FORMATS], help="Default: all."
    )
    parser.add_argument(
        "--jobs", type=_positive, default=os.cpu_count(), help="Default: one a CPU."
    )
    parser.add_argument(
        "--time-limit", type=float, default=10.0, help="Seconds a case. Default: %(default)s."
    )
    parser.add_argument("--case", type=_number, metavar="NUMBER", help="Open only this case.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Write --case's files here.")
    return parser


def fuzz(
    numbers: list[int], seed: int, jobs: int, limit: float, is_quiet: bool = True
) -> list[Outcome]:
    """Run cases in processes of their own, with a progress bar; return what happened."""
    formats = sorted({case_format(number) for number in numbers})
    outcomes, failed = [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(numbers), unit="file", file=sys.stderr) as bar,
    ):
        run, start = partial(run_case, seed=seed), partial(prepare, formats, folder)
        for number, result in watched(numbers, run, start, jobs, limit, is_quiet):
            if isinstance(result, Lost):
                case = make_case(seed, number)
                what = f"{case.seed}: {case.mutation.what}"
                result = Outcome(number, case.format, FAILED, what, f"it {result.reason}")
            outcomes.append(result)
            failed += result.status == FAILED
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
    return sorted(outcomes, key=lambda outcome: outcome.number)


def summary(outcomes: list[Outcome]) -> str:
    """Return a table of how many files of each format were refused, loaded and failed."""
    counts = Counter((outcome.format, outcome.status) for outcome in outcomes)
    columns = ["format", "cases", REFUSED, LOADED, FAILED]
    rows = [
        [kind, str(sum(numbers)), *map(str, numbers)]
        for kind in FORMATS
        if sum(numbers := [counts[kind, status] for status in columns[2:]])
    ]
    return markdown_table(columns, rows, left=("format",))


def _keep(case: Case, folder: Path) -> None:
    """Write a case's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in case.files.items():
        (folder / name).write_bytes(content)


def _numbers(args: argparse.Namespace) -> list[int]:
    """Return the numbers of the cases that the arguments ask for."""
    if args.case is not None:
        return [args.case]
    if args.keep is not None:
        raise ValueError("--keep needs --case, which names the case whose files to keep")
    return case_numbers(args.formats, args.cases)


def main() -> None:
    """Run the command; the exit code is 1 if a case failed."""
    with exit_on_error("fuzz_files"):
        args = setup_arg_parser().parse_args()
        numbers, is_one = _numbers(args), args.case is not None
        if args.keep is not None:
            _keep(make_case(args.seed, args.case), args.keep)
        outcomes = fuzz(numbers, args.seed, args.jobs, args.time_limit, not is_one)
        failures = [outcome for outcome in outcomes if outcome.status == FAILED]
        for outcome in sorted(
            outcomes if is_one else failures, key=lambda shown: (shown.format, shown.detail)
        ):
            print(f"{outcome.number} {outcome.format} {outcome.status}: {outcome.detail}")
            print(f"    {outcome.what}")
        print(summary(outcomes))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
