"""Time generations on a random prompt, dense and sliced in turn.

Accepts the flags of `mlx_lm.benchmark` and some more. `glass-mlx latency` measures more closely.
With `--submit-file`, runs a fixed protocol instead, and writes a file for the README's table.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("benchmark")

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_load_arguments,
    add_model_argument,
    check_minimums,
    path,
)
from glass_mlx.command_model import find_prior, load_session
from glass_mlx.errors import exit_on_error
from glass_mlx.files import check_writable, write_text
from glass_mlx.latency.submission import measure_machine, submission_advice
from glass_mlx.prior.lookup import given_prior
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from
from glass_mlx.streaming import stream_generate

import mlx.core as mx
import mlx_lm
from mlx_lm.benchmark import setup_arg_parser as mlx_lm_arg_parser

_FIGURES = ("prompt_tps", "generation_tps", "peak_memory")

_REFUSED = {
    "pipeline": "--pipeline cannot be combined with slicing; use mlx_lm.benchmark",
    "release_dense": "--release-dense would reload the model in every trial; use glass-mlx latency",
}


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(
        prog="glass-mlx",
        usage="glass-mlx benchmark [flags]",
        description=__doc__,
        parents=[mlx_lm_arg_parser()],
        conflict_handler="resolve",
    )
    add_model_argument(parser)
    parser.add_argument("--adapter-path", help="A folder with adapters from mlx-lm.")
    add_load_arguments(parser)
    add_slicing_arguments(parser.add_argument_group("slicing"))
    group = parser.add_argument_group("contributing")
    group.add_argument(
        "--submit-file",
        type=path,
        metavar="FILE",
        help="Measure this machine with a fixed protocol, and write the result as JSON. It has "
        "no names and no serial numbers.",
    )
    group.add_argument(
        "--submit-minutes",
        type=float,
        default=10,
        metavar="N",
        help="About how long --submit-file may take (%(default)s).",
    )
    return parser


def submit(args: argparse.Namespace) -> None:
    """Measure this machine with the fixed protocol, and write the result.

    Raises:
        OSError: if the file cannot be written.
        ValueError: for a flag that would change the protocol.
    """
    parser = setup_arg_parser()
    for name, value in vars(args).items():
        is_fixed = name not in ("model", "submit_file", "submit_minutes")
        if is_fixed and value != parser.get_default(name):
            flag = name.replace("_", "-")
            raise ValueError(f"--submit-file runs a fixed protocol; leave out --{flag}")
    if not 0 < args.submit_minutes < float("inf"):
        raise ValueError(f"--submit-minutes must be positive, not {args.submit_minutes}")
    check_writable(args.submit_file)

    def save(found: dict[str, Any]) -> None:
        write_text(args.submit_file, json.dumps(found, indent=1) + "\n")

    found = measure_machine(args.model, args.submit_minutes, save)
    for result in found["results"]:
        if "left_out" in result:
            print(f"{result['model']}: left out, {result['left_out']}")
            continue
        dense, sliced = (row["total_tps"] for row in result["rows"])
        print(f"{result['model']}: {dense:.1f} tokens/s dense, {sliced:.1f} sliced")
    print(submission_advice(args.submit_file))


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for the first flag that is out of range or of no use here."""
    for name, reason in _REFUSED.items():
        if getattr(args, name):
            raise ValueError(reason)
    if args.batch_size != 1:
        raise ValueError("--batch-size must be 1: slices belong to one text; use mlx_lm.benchmark")
    check_minimums(
        args, prompt_tokens=2, generation_tokens=2, num_trials=1, prefill_step_size=1, delay=0
    )


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        FileNotFoundError: if the model or the prior does not exist.
        ValueError: for a bad value, a model that cannot be used or a prior that does not fit.
    """
    if args.submit_file:
        submit(args)
        return
    check_flags(args)
    config = config_from(args)
    given = given_prior(args.prior)
    mx.random.seed(0)
    session, tokenizer = load_session(
        args, model_config={"quantize_activations": args.quantize_activations}
    )
    tokenizer.eos_token_ids = []  # so that no text ends early
    ids = mx.random.randint(0, session.vocabulary_size, (args.prompt_tokens,))
    options: dict[str, Any] = {
        "prompt": ids.tolist(),
        "max_tokens": args.generation_tokens,
        "prefill_step_size": args.prefill_step_size,
    }
    methods: dict[str, Callable[[], Iterator[Any]]] = {
        "dense": lambda: mlx_lm.stream_generate(session.model, tokenizer, **options)
    }
    if not args.dense:
        prior = find_prior(args, session, tokenizer, given, config)
        methods["sliced"] = lambda: stream_generate(
            session, tokenizer, config=config, prior=prior or False, **options
        )
    for method in methods.values():  # to warm up
        _last(method())
    print(
        f"Timing with prompt_tokens={args.prompt_tokens}, "
        f"generation_tokens={args.generation_tokens}, batch_size=1."
    )
    report(methods, args.num_trials, args.delay)


def _last(responses: Iterator[Any]) -> Any:
    """Return the last response of a generation."""
    mx.reset_peak_memory()
    for response in responses:
        last = response
    return last


def report(methods: dict[str, Callable[[], Iterator[Any]]], trials: int, delay: float) -> None:
    """Time every method in every trial, and print the figures in mlx-lm's form.

    Args:
        methods: what starts a generation, by the method's name; the first is the dense model.
        trials: how often to time each.
        delay: seconds to wait before each generation.
    """
    found: dict[str, list[Any]] = {name: [] for name in methods}
    for trial in range(1, trials + 1):
        for name, method in methods.items():
            time.sleep(delay)
            start = time.perf_counter()
            found[name].append(_last(method()))
            total = time.perf_counter() - start
            figures = _line(found[name][-1:])
            print(f"Trial {trial}, {name}:  {figures}, total_time={total:.3f}")
    for name, responses in found.items():
        print(f"Averages, {name}: {_line(responses)}")
    if "sliced" in found:
        dense, sliced = (mean(r.generation_tps for r in found[name]) for name in found)
        last = found["sliced"][-1]
        glass = last.glass
        read = glass.bytes_per_token(last.generation_tokens)
        print(
            f"Sliced over dense: generation_tps={sliced / dense:.3f}, density="
            f"{glass.density_got:.3f}, vocabulary={glass.vocabulary_got:.3f}, bytes_per_token="
            f"{read / glass.dense_bytes:.3f}"
        )


def _line(responses: list[Any]) -> str:
    """Return the means of mlx-lm's figures."""
    means = {name: mean(getattr(r, name) for r in responses) for name in _FIGURES}
    return ", ".join(f"{name}={value:.3f}" for name, value in means.items())


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
