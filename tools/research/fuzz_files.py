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
from collections import Counter
from functools import partial
from pathlib import Path

from glass_mlx.errors import exit_on_error
from glass_mlx.reporting.tables import markdown_table

from fuzzing.cases import FORMATS, case_format, case_numbers, make_case
from fuzzing.checks import FAILED, LOADED, REFUSED, Outcome, prepare, run_case
from fuzzing.watch import Lost, watched
from tqdm import tqdm


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--formats", nargs="+", choices=[*FORMATS], default=[*FORMATS], help="Default: all."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Default: one a CPU.")
    parser.add_argument(
        "--time-limit", type=float, default=10.0, help="Seconds a case. Default: %(default)s."
    )
    parser.add_argument("--case", type=int, metavar="NUMBER", help="Open only this case.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Write --case's files here.")
    return parser


def fuzz(
    numbers: list[int], seed: int, jobs: int, limit: float, is_quiet: bool = True
) -> list[Outcome]:
    """Run cases in processes of their own, with a progress bar; return what happened."""
    formats = sorted({case_format(number) for number in numbers})
    runs = watched(
        numbers,
        partial(run_case, seed=seed),
        partial(prepare, formats),
        min(jobs, len(numbers)),
        limit,
        is_quiet,
    )
    outcomes = []
    with tqdm(total=len(numbers), unit="file", file=sys.stderr) as bar:
        for number, result in runs:
            if isinstance(result, Lost):
                case = make_case(seed, number)
                what = f"{case.seed}: {case.mutation.what}"
                result = Outcome(number, case.format, FAILED, what, f"it {result.reason}")
            outcomes.append(result)
            bar.set_postfix(failed=sum(outcome.status == FAILED for outcome in outcomes))
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


def main() -> None:
    """Run the command; the exit code is 1 if a case failed."""
    args = setup_arg_parser().parse_args()
    with exit_on_error("fuzz_files"):
        numbers = [args.case] if args.case is not None else case_numbers(args.formats, args.cases)
        if args.keep is not None:
            if args.case is None:
                raise ValueError("--keep needs --case, which names the files to keep")
            args.keep.mkdir(parents=True, exist_ok=True)
            for name, content in make_case(args.seed, args.case).files.items():
                (args.keep / name).write_bytes(content)
        outcomes = fuzz(numbers, args.seed, args.jobs, args.time_limit, args.case is None)
        failures = [outcome for outcome in outcomes if outcome.status == FAILED]
        shown = outcomes if args.case is not None else failures
        for outcome in sorted(shown, key=lambda o: (o.format, o.detail)):
            print(f"{outcome.number} {outcome.format} {outcome.status}: {outcome.detail}")
            print(f"    {outcome.what}")
        print(summary(outcomes))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
