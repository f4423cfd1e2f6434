"""Answer tasks dense and sliced, and compare accuracies, question by question.

The tasks are those of make_tasks. Answers are written by the engine through `glass_mlx.evaluate`'s
harness, greedily and without a chat template. --json has one line for each task and setting, with
the outcome of every question. It is written after each, and a run that was interrupted continues
with those that are missing. A difference is in points of accuracy; flips are questions with another
outcome than the dense model's. Accuracies of a dense model below 0.2 say nothing about slicing and
are marked with "weak".
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from glass_mlx import GlassConfig
from glass_mlx.arguments import (
    add_load_arguments,
    add_model_argument,
    add_prior_argument,
    add_settings_arguments,
    make_settings,
)
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.config import DEFAULT_MAX_KL, Setting
from glass_mlx.errors import exit_on_error
from glass_mlx.evaluate import evaluate_once, find_tasks
from glass_mlx.evaluate import setup_arg_parser as evaluate_parser
from glass_mlx.files import locked
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.reporting.machine import made_with
from glass_mlx.reporting.tables import markdown_table, write_rows
from glass_mlx.session import Session

import numpy as np
from continuations import load_session
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tasks.figures import accuracy, changes
from tasks.files import digest

DENSE = "dense"

# Where the dense model is right more rarely, slicing has nothing to break.
_WEAK = 0.2

Row = dict[str, Any]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    add_prior_argument(parser)
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="The YAML files that make_tasks wrote."
    )
    add_settings_arguments(parser, f"a bound of {DEFAULT_MAX_KL}")
    parser.add_argument("--limit", type=int, help="Number of questions of each task.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--warmup", type=int, nargs="+", default=[GlassConfig.warmup], help="Default: %(default)s."
    )
    parser.add_argument(
        "--dense-every",
        type=int,
        nargs="+",
        default=[GlassConfig.dense_every],
        help="Distances of dense tokens, each with every warm-up and setting (%(default)s).",
    )
    parser.add_argument("--json", type=Path, required=True, help="One line per task and setting.")
    add_load_arguments(parser)
    return parser


def list_configs(args: argparse.Namespace) -> dict[str, GlassConfig | None]:
    """Return the settings to compare by their names; None for the dense model, which comes first.

    Raises:
        ValueError: for the first value that is out of range.
    """
    configs: dict[str, GlassConfig | None] = {DENSE: None}
    for setting in make_settings(args, Setting(max_kl=DEFAULT_MAX_KL)):
        for warmup in args.warmup:
            for every in args.dense_every:
                options = setting._asdict() | {"warmup": warmup, "dense_every": every}
                configs[_setting_name(setting, warmup, every)] = GlassConfig(**options)
    return configs


def _setting_name(setting: Setting, warmup: int, dense_every: int) -> str:
    """Name a setting by the flags that differ from the defaults."""
    parts = [setting.flags]
    if warmup != GlassConfig.warmup:
        parts.append(f"--warmup {warmup}")
    if dense_every != GlassConfig.dense_every:
        parts.append(f"dense every {dense_every}")
    return " ".join(parts)


class Runner:
    """Runs tasks on one model.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        prior: its prior.
        args: the parsed flags.

    Raises:
        ValueError: if lm-evaluation-harness is not installed.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TokenizerWrapper,
        prior: GlobalPrior,
        args: argparse.Namespace,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError("this needs pip install 'glass-mlx[evaluate]'") from error
        self._session, self._tokenizer, self._prior = session, tokenizer, prior
        flags = ["--tasks", *args.tasks, "--confirm-run-unsafe-code", "--seed", str(args.seed)]
        flags += [] if args.limit is None else ["--limit", str(args.limit)]
        self._args = evaluate_parser().parse_args(flags)
        names, folders = find_tasks(args.tasks)
        self._names = dict(zip(args.tasks, names, strict=True))
        self._manager = TaskManager(include_path=sorted({*folders}), include_defaults=False)

    def answer(self, task: str, config: GlassConfig | None) -> Row:
        """Answer a task's questions, and return the marks of each question.

        Args:
            task: the task's file.
            config: how the model is sliced, or None for the dense model.
        """
        from glass_mlx.harness import GlassLM

        selector = None
        if config is not None:
            selector = make_selector(self._session, self._tokenizer, self._prior, config)
        lm = GlassLM(self._session, self._tokenizer, selector, self._prior, use_chat_template=False)
        name = self._names[task]
        samples = evaluate_once(lm, [name], self._manager, self._args)["samples"][name]
        samples.sort(key=lambda sample: sample["doc_id"])
        texts = [sample["filtered_resps"][0] for sample in samples]
        lengths = [len(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        marks = {
            metric: [float(sample[metric]) for sample in samples]
            for metric in samples[0]["metrics"]
        }
        return {"marks": marks, "answer_tokens": float(np.mean(lengths))}


def complete(rows: list[Row]) -> list[Row]:
    """Return rows with accuracies and, where the dense model's are known, changes from them."""
    dense = {_identity(row): row for row in rows if row["setting"] == DENSE}
    completed = []
    for row in rows:
        right = row["marks"]["right"]
        figures = accuracy(right) | {"share": float(np.mean(row["marks"]["share"]))}
        reference = dense.get(_identity(row))
        if reference is not None and row["setting"] != DENSE:
            figures |= changes(reference["marks"]["right"], right)
        completed.append(row | figures)
    return completed


def _identity(row: Row) -> str:
    """Return what must be equal in two rows whose questions are compared one by one."""
    return json.dumps([row[key] for key in ("about", "task", "digest", "limit")], sort_keys=True)


def _holds(row: Row, wanted: Row) -> bool:
    """Return whether a row has all of the wanted entries."""
    return all(row.get(key) == value for key, value in wanted.items())


def read_rows(file: Path) -> list[Row]:
    """Read the rows of an earlier run; none if there is no file.

    Raises:
        ValueError: if the file holds something else.
    """
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        complete(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold results of compare_tasks") from error
    return rows


def format_rows(rows: list[Row]) -> str:
    """Format rows as a table in Markdown."""
    columns = [
        "task",
        "setting",
        "questions",
        "accuracy",
        "difference",
        "flips",
        "lost",
        "gained",
        "share",
        "tokens",
    ]
    cells = []
    for row in rows:
        weak = " (weak)" if row.get("dense_accuracy", row["accuracy"]) < _WEAK else ""
        cell = [row["task"], row["setting"], f"{row['questions']}"]
        cell.append(f"{_percent(row, 'accuracy')}{weak}")
        if "flips" in row:
            cell += [_percent(row, "difference"), _percent(row, "flips")]
            cell += [f"{row['lost']}", f"{row['gained']}"]
        else:
            cell += [""] * 4
        cells.append([*cell, f"{row['share']:.3f}", f"{row['answer_tokens']:.0f}"])
    return markdown_table(columns, cells, left=("task", "setting"), padded=False)


def _percent(row: Row, key: str) -> str:
    low, high = row[f"{key}_95"]
    sign = "+" if key == "difference" else ""
    numbers = [f"{100 * value:{sign}.1f}" for value in (row[key], low, high)]
    return f"{numbers[0]} % ({numbers[1]} to {numbers[2]})"


def run(args: argparse.Namespace) -> None:
    """Answer the tasks that are not answered yet, and print the table.

    Raises:
        FileNotFoundError: if the model, the prior or a task does not exist.
        ValueError: for a bad value, or files that cannot be used.
    """
    configs = list_configs(args)
    find_tasks(args.tasks)
    if args.limit is not None and args.limit < 1:
        raise ValueError("--limit must be at least 1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warnings
    with locked(args.json):
        rows = read_rows(args.json)
        session, tokenizer = load_session(args)
        prior = find_or_measure_prior(session, tokenizer, args.prior, model=args.model)
        runner = Runner(session, tokenizer, prior, args)
        about = made_with() | {
            "model": model_name(args.model),
            "dtype": args.dtype,
            "dequantize": args.dequantize,
            "prior": prior.digest,
        }
        wanted = []
        for task in args.tasks:
            for name, config in configs.items():
                row = {"about": about, "task": Path(task).stem, "setting": name}
                row |= {"digest": digest(Path(task)), "limit": args.limit, "seed": args.seed}
                wanted.append(row)
                if any(_holds(old, row) for old in rows):
                    continue
                print(f"{row['task']}, {name}", file=sys.stderr)
                rows.append(row | runner.answer(task, config))
                rows = complete(rows)
                write_rows(args.json, rows)
    print(format_rows([row for row in rows if any(_holds(row, want) for want in wanted)]))


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_tasks"):
        run(setup_arg_parser().parse_args())


if __name__ == "__main__":
    main()
