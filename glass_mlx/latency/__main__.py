"""Measure how fast a model decodes, dense and sliced, alternating in one process.

There is one row per method, density and prompt length. The methods are mlx-lm itself (dense),
GRIFFIN (griffin: one selection from the prompt alone), GLASS with one selection (glass), the same
with the dense weights released (released), and the default, in which the dense model computes some
tokens and the selection is renewed (default). The ceiling is the speed-up that the bytes allow: the
bytes of weights that dense decoding reads per token, divided by those that a sliced token reads.
The run's ceiling counts the dense tokens, too.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("latency")

import argparse
import sys
from dataclasses import replace
from typing import Any

from glass_mlx.arguments import CommandParser, add_settings_arguments, make_settings, path
from glass_mlx.checkpoints.loading import advice
from glass_mlx.config import DEFAULT_MAX_KL, GlassConfig, Setting, check_seed
from glass_mlx.errors import exit_on_error
from glass_mlx.files import check_writable
from glass_mlx.latency.measured_model import (
    add_model_arguments,
    check_model_arguments,
    fix_densities,
    load_model,
    load_prior,
    model_title,
)
from glass_mlx.latency.report import format_report, plot
from glass_mlx.latency.timing import (
    DENSE,
    METHODS,
    Settings,
    measure,
    summarize,
    time_slicing,
)
from glass_mlx.models import named_arrays, world
from glass_mlx.reporting.machine import (
    busy_warning,
    describe_machine,
    made_with,
    slowdown_warning,
)
from glass_mlx.reporting.plotting import require_matplotlib
from glass_mlx.reporting.tables import write_results
from glass_mlx.session import Session

import mlx.core as mx


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser."""
    parser = CommandParser(description=__doc__)
    add_model_arguments(parser)
    add_settings_arguments(parser, f"a bound of {DEFAULT_MAX_KL}")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[name for name in METHODS if name != DENSE],
        help="Methods to compare with dense mlx-lm (default; with --density, griffin and glass, "
        "too).",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[64],
        help="Lengths of the prompts (%(default)s).",
    )
    parser.add_argument(
        "--generation-tokens",
        type=int,
        default=256,
        help="Generated tokens per run (%(default)s).",
    )
    parser.add_argument(
        "--repetitions", type=int, default=5, help="Timed runs of each method (%(default)s)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the random prompts (%(default)s)."
    )
    parser.add_argument("--json", type=path, help="Write one JSON line per row to this file.")
    parser.add_argument("--markdown", type=path, help="Write the tables to this file, too.")
    parser.add_argument(
        "--plot", type=path, help="Draw tokens/s and ceiling by density into this PNG file."
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, and print and write the results.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: for a bad value, or a model that cannot be used.
    """
    if args.repetitions < 2 or args.generation_tokens < 4 or min(args.prompt_tokens) < 2:
        raise ValueError("at least 2 repetitions, 4 generated and 2 prompt tokens are needed")
    check_seed(args.seed)
    check_model_arguments(args)
    for file in (args.json, args.markdown, args.plot) if world().is_first else ():
        check_writable(file)
    if args.plot:
        require_matplotlib()
    settings = Settings(
        shares=make_settings(args, Setting(max_kl=DEFAULT_MAX_KL)),
        methods=args.methods or ["griffin", "glass"] * bool(args.density) + ["default"],
        prompt_tokens=args.prompt_tokens,
        generation_tokens=args.generation_tokens,
        repetitions=args.repetitions,
        seed=args.seed,
        down_policy=args.down_policy,
    )
    warnings = [busy_warning()]
    model, tokenizer = load_model(args)
    prior = load_prior(model, tokenizer, args, settings.shares)
    tokenizer.eos_token_ids = []
    load_peak = mx.get_peak_memory()
    warnings.append(advice(model))
    session = Session.of(model)
    if args.shape:
        settings = replace(
            settings, shares=fix_densities(settings.shares, session, tokenizer, prior)
        )
    runs = measure(session, tokenizer, prior, settings, lambda: load_model(args, lazy=True)[0])
    warnings += [
        slowdown_warning([run.decode_tps for run in mode_runs])
        for (method, *_), mode_runs in runs.items()
        if method == DENSE
    ]
    session = Session.of(session)  # released weights have changed the facts
    slicing_times = {
        kept: time_slicing(session, tokenizer, prior, kept, args.down_policy)
        for kept in settings.shares
        if kept.density != 1 and not GlassConfig(**kept._asdict()).is_exact
    }
    about = made_with() | {
        "model": model_title(args),
        "size_gb": sum(array.nbytes for _, array in named_arrays(model)) / 1e9,
        "load_peak_gb": load_peak / 1e9,
        "machine": describe_machine(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "warnings": [warning for warning in warnings if warning],
    }
    rows = summarize(session.weight_bytes, runs, slicing_times)
    report_results(about, rows, args)


def report_results(
    about: dict[str, Any], rows: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """Print the tables, and write the files that the flags name."""
    text = format_report(about, rows)
    print(text)
    for warning in about["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if not world().is_first:
        return
    write_results([about | row for row in rows], text, args.json, args.markdown)
    if args.plot:
        plot(about, rows, args.plot)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("latency"):
        run(setup_arg_parser().parse())
