"""Measure the global prior of a model and write it to a file, or show or publish a prior."""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("calibrate")

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from glass_mlx.arguments import (
    CommandParser,
    add_adapter_arguments,
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    load_options,
    path,
)
from glass_mlx.calibration.building import CalibrationSettings, build
from glass_mlx.calibration.stability import overall_stability
from glass_mlx.calibration.texts import Recipe
from glass_mlx.checkpoints.loading import load, model_name
from glass_mlx.command_model import note_advice
from glass_mlx.errors import exit_on_error
from glass_mlx.files import check_writable
from glass_mlx.models import world
from glass_mlx.prior.display import MIN_EXPERT_TOKENS, describe, draw, expert_lines
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prior.hub import check_repository, locate, publish
from glass_mlx.statistics import PRIOR_STATISTICS

import mlx.core as mx
from tqdm import tqdm


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser."""
    defaults = CalibrationSettings()
    parser = CommandParser(description=__doc__)
    add_model_argument(parser)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--output",
        type=path,
        help="The file to write. Repeating the command continues an interrupted run.",
    )
    action.add_argument(
        "--show", metavar="FILE", help="Describe and draw a prior (a file or hub:user/repo)."
    )
    parser.add_argument(
        "--picture",
        type=path,
        help="The PNG file that --show draws. Default: FILE's stem with .png.",
    )
    parser.add_argument(
        "--push-to-hub", metavar="USER/REPO", help="Publish the prior there, with a model card."
    )
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--recipe",
        nargs="+",
        action="extend",
        default=[],
        metavar="RECIPE",
        help="Texts to measure on, each with an optional =WEIGHT: bos (written by the model from "
        "the beginning-of-sequence token), chat (through its chat template) or corpus:FILE (text, "
        "or JSONL with messages, prompt and completion, or text). Default: bos and chat, or bos "
        "alone if the model has no chat template.",
    )
    group.add_argument(
        "--statistic",
        nargs="+",
        action="extend",
        choices=PRIOR_STATISTICS,
        help="Statistics to measure; impact needs a backward pass "
        f"({' '.join(defaults.statistics)}).",
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens", type=int, default=defaults.tokens, help="Tokens to measure (%(default)s)."
    )
    amount.add_argument("--sequences", type=int, help="Sequences to measure, instead of tokens.")
    group.add_argument(
        "--until-stable",
        type=float,
        metavar="X",
        help="Stop early, once the neurons that two halves of the sequences select at density 0.5 "
        "reach a Jaccard index of X.",
    )
    group.add_argument(
        "--expert-factor",
        type=float,
        default=defaults.expert_factor,
        metavar="X",
        help="In mixtures of experts, measure up to X times as much for experts that have seen "
        f"fewer than {MIN_EXPERT_TOKENS} tokens; 1 for no more (%(default)s).",
    )
    group.add_argument(
        "--length", type=int, default=defaults.length, help="Tokens per sequence (%(default)s)."
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="Sequences written at once (%(default)s).",
    )
    group.add_argument(
        "--temp",
        type=float,
        default=defaults.temperature,
        help="Sampling temperature (%(default)s).",
    )
    group.add_argument(
        "--seed", type=int, default=defaults.seed, help="Sampling seed (%(default)s)."
    )
    group.add_argument(
        "--corpus-field",
        default=defaults.corpus_field,
        help="The field of a JSONL corpus that holds the text (%(default)s).",
    )
    group.add_argument(
        "--curve-texts",
        type=int,
        default=defaults.curve_texts,
        help="Texts at most for measuring what slicing costs, which --max-kl needs; 0 for none "
        "(%(default)s).",
    )
    add_load_arguments(parser)
    add_adapter_arguments(parser)
    add_pipeline_argument(parser)
    return parser


def _settings(args: argparse.Namespace) -> CalibrationSettings:
    """Turn parsed flags into settings; raise ValueError for a bad value."""
    return CalibrationSettings(
        recipes=tuple(map(Recipe.parse, args.recipe)),
        statistics=tuple(dict.fromkeys(args.statistic or CalibrationSettings.statistics)),
        tokens=args.tokens,
        sequences=args.sequences,
        length=args.length,
        batch_size=args.batch_size,
        temperature=args.temp,
        seed=args.seed,
        until_stable=args.until_stable,
        expert_factor=args.expert_factor,
        corpus_field=args.corpus_field,
        curve_texts=args.curve_texts,
    )


def _build(args: argparse.Namespace) -> GlobalPrior:
    """Measure a prior into `args.output` and print a summary."""
    settings = _settings(args)
    model, tokenizer = load(args.model, lazy=True, **load_options(args))
    note_advice(model)
    start = time.perf_counter()
    report = partial(tqdm.write, file=sys.stderr)  # above the progress bar
    prior = build(model, tokenizer, args.output, settings, model_name(args.model), report)
    about = prior.about
    stability = f"{overall_stability(about['stability']):.3f}" if about["stability"] else "unknown"
    print(
        f"Wrote {args.output}: {about['tokens']} tokens in {about['sequences']} sequences, "
        f"{time.perf_counter() - start:.1f} s, stability {stability}\n"
        f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB",
        *expert_lines(prior),
        sep="\n",
    )
    return prior


def _draw(prior: GlobalPrior, picture: Path) -> None:
    """Draw a prior and print the name of the picture."""
    draw(prior, picture)
    print(f"\npicture     {picture}")


def _check_flags(args: argparse.Namespace) -> None:
    """Check the names of files and repositories, before a long measurement.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if the repository has no valid name, or there is no picture to draw.
    """
    if args.picture and not args.show:
        raise ValueError("--picture goes with --show")
    if world().is_first:
        check_writable(args.output)
        check_writable(args.picture)
    if args.push_to_hub is not None:
        check_repository(args.push_to_hub)


def run(args: argparse.Namespace) -> None:
    """Measure or show a prior, and publish it on request.

    Raises:
        OSError: if a file does not exist or cannot be written.
        ValueError: for a bad value, a model that cannot be used, or a damaged prior.
    """
    _check_flags(args)
    if args.show:
        file = locate(args.show)
        prior = GlobalPrior.load(file)
        print(describe(prior))
    else:
        file, prior = args.output, _build(args)
    if not world().is_first:
        return
    if args.push_to_hub:
        url, writes_card = publish(prior, file, args.push_to_hub)
        print(f"Published at {url}{'' if writes_card else '; the README.md there was kept'}")
    if args.show:  # last, because a missing matplotlib is an error
        _draw(prior, args.picture or Path(f"{file.stem}.png"))


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    interrupted = "\nInterrupted; the same command continues after the last complete batch"
    with exit_on_error("calibrate", interrupted):
        run(setup_arg_parser().parse())
