"""Evaluate a sliced model on the tasks of lm-evaluation-harness.

Accepts the flags of `mlx_lm.evaluate` and some more, and needs `glass-mlx[evaluate]`.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("evaluate")

import argparse
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_adapter_arguments,
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    check_minimums,
    check_sampling_flags,
    path,
)
from glass_mlx.calibration.first_use import make_selector
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.command_model import find_prior, load_session
from glass_mlx.config import GlassConfig, check_seed
from glass_mlx.errors import exit_on_error, is_library_error, library_reason
from glass_mlx.files import write_text
from glass_mlx.models import world
from glass_mlx.prior.lookup import given_prior
from glass_mlx.sampling import make_sampler
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from

import mlx.core as mx


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(
        prog="glass-mlx", usage="glass-mlx evaluate [flags]", description=__doc__
    )
    add_model_argument(parser)
    add_adapter_arguments(parser)
    add_load_arguments(parser)
    add_pipeline_argument(parser)
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="Names of tasks, or YAML files that define one."
    )
    parser.add_argument(
        "--output-dir", type=path, default=Path(), help="Folder for the results (default: here)."
    )
    parser.add_argument("--batch-size", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--num-shots", type=int, help="Number of examples before each question.")
    parser.add_argument(
        "--max-tokens", type=int, help="Maximum number of tokens to generate, over the tasks' own."
    )
    parser.add_argument("--limit", type=int, help="Number of questions of each task.")
    parser.add_argument("--seed", type=int, default=123, help="Seed (default: %(default)s).")
    parser.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the examples as a conversation instead of a single turn.",
    )
    parser.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Whether prompts go through the chat template. Default: if the model has one.",
    )
    parser.add_argument(
        "--chat-template-args",
        type=json.loads,
        default="{}",
        metavar="JSON",
        help="""Options of the chat template, such as '{"enable_thinking": false}'.""",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code which the model writes.",
    )
    parser.add_argument("--temp", type=float, default=0.0, help="Sampling temperature.")
    parser.add_argument("--top-p", type=float, default=1.0, help="Top-p.")
    parser.add_argument("--top-k", type=int, default=0, help="Top-k.")
    group = parser.add_argument_group("slicing")
    add_slicing_arguments(group)
    group.add_argument(
        "--sliced-only",
        action="store_true",
        help="Do not evaluate the dense model, too, which tells how many outcomes change.",
    )
    return parser


def check_flags(args: argparse.Namespace) -> GlassConfig:
    """Check the flags, and return how the model is sliced.

    Raises:
        ValueError: for the first value that is out of range or of no use here.
    """
    if args.release_dense:
        raise ValueError("--release-dense is of no use here: every question needs dense weights")
    if args.dense and args.sliced_only:
        raise ValueError("give either --dense or --sliced-only")
    check_minimums(args, limit=1, max_tokens=1, num_shots=0)
    if not isinstance(args.chat_template_args, dict):
        raise ValueError("--chat-template-args must be a JSON object")
    args.min_p, args.min_tokens_to_keep, args.xtc_probability, args.xtc_threshold = 0, 1, 0, 0
    check_sampling_flags(args)
    check_seed(args.seed)
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be below 2^32, not {args.seed}")
    return config_from(args)


def find_tasks(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of tasks, and the folders of those that are given as YAML files.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file defines no task.
    """
    tasks, folders = [], []
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            tasks.append(name)
            continue
        file = path(name)
        if not file.is_file():
            raise FileNotFoundError(f"there is no task at {name}")
        defined = re.search(r"^task:\s*[\"']?([\w.-]+)", file.read_text(), re.MULTILINE)
        if defined is None:
            raise ValueError(f"{name} has no line such as task: NAME")
        tasks.append(defined[1])
        folders.append(str(file.parent.resolve()))
    return tasks, folders


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the results and write them.

    Raises:
        FileNotFoundError: if the model, the prior or a task's file does not exist.
        ValueError: for a bad value, a model that cannot be used or an unknown task.
    """
    config = check_flags(args)
    tasks, folders = find_tasks(args.tasks)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warnings
    try:
        from glass_mlx.harness import GlassLM
    except ImportError as error:
        raise ValueError(
            f"this needs lm-evaluation-harness: pip install 'glass-mlx[evaluate]' ({error})"
        ) from error
    given = given_prior(args.prior)
    ranks = world()
    ranks.on_first(lambda: args.output_dir.mkdir(parents=True, exist_ok=True))
    mx.random.seed(args.seed)
    session, tokenizer = load_session(args)
    prior = find_prior(args, session, tokenizer, given, config)
    selector = None if args.dense else make_selector(session, tokenizer, prior, config)
    sampler = make_sampler(args.temp, args.top_p, top_k=args.top_k)
    lm = GlassLM(
        session, tokenizer, selector, prior, args.max_tokens, args.apply_chat_template, sampler
    )
    results = evaluate(lm, tasks, folders, args)
    name = "_".join(["eval", model_name(args.model).replace("/", "_"), version("lm_eval")])
    if args.num_shots is not None:
        name += f"_{args.num_shots:02d}"
    if ranks.is_first:
        write_text(args.output_dir / "_".join([name, *tasks]), json.dumps(results, indent=4))
    print("Results:")
    print(json.dumps(results, indent=4))


def evaluate(
    lm: Any, tasks: list[str], folders: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the results of all tasks.

    Args:
        lm: a `harness.GlassLM`.
        tasks: the names of the tasks.
        folders: folders with tasks of the user's own.
        args: the parsed flags.

    Returns:
        The harness's results by task. With slicing there are also those of the dense model in
        `dense`, and in `flips` how many outcomes differ.

    Raises:
        ValueError: if the harness cannot run a task.
    """
    from glass_mlx.harness import flips

    from lm_eval.tasks import TaskManager

    # The harness's own tasks are thousands of files, which take long to list.
    needs_own = len(folders) < len(tasks)
    manager = TaskManager(include_path=folders or None, include_defaults=needs_own)
    sliced = evaluate_once(lm, tasks, manager, args)
    results = {task: dict(values) for task, values in sliced["results"].items()}
    if lm.is_dense or args.sliced_only:
        return results
    lm.is_dense = True
    dense = evaluate_once(lm, tasks, manager, args)
    changed = flips(dense, sliced)
    for task, values in results.items():
        values["dense"] = dense["results"][task]
        values["flips"] = changed.get(task, {})
    return results


def evaluate_once(
    lm: Any, tasks: list[str], manager: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Run all tasks with one model, and return what the harness does.

    Args:
        lm: a `harness.GlassLM`.
        tasks: the names of the tasks.
        manager: the harness's `TaskManager`, which knows them.
        args: the parsed flags.

    Raises:
        ValueError: if the harness cannot run a task.
    """
    import lm_eval
    from mlx_lm.evaluate import chat_template_fn

    type(lm).apply_chat_template = chat_template_fn(**args.chat_template_args)
    try:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            apply_chat_template=lm.use_chat_template,
            num_fewshot=args.num_shots,
            limit=args.limit,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise ValueError(
            f"the tasks {', '.join(tasks)} cannot be run: {library_reason(error)}"
        ) from error
    assert results is not None
    return results


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
