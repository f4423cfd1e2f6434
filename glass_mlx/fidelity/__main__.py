"""Measure how close sliced models stay to the dense model, by method and density.

The dense model continues the prompts. Its continuations are kept on disk for later runs. Every
method is then scored on these continuations token by token. The dense model reads the prompt. The
FFNs are sliced from the first generated token on or, in some methods, after a dense warm-up, with
later renewals. With --json, a run that was interrupted continues from where it stopped.
docs/results.md explains the methods and has results.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("fidelity")

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glass_mlx import Session, load
from glass_mlx.arguments import (
    CommandParser,
    add_load_arguments,
    add_model_argument,
    add_prior_argument,
    add_settings_arguments,
    check_minimums,
    make_settings,
    path,
)
from glass_mlx.calibration.curves import PROMPTS as CALIBRATION_PROMPTS
from glass_mlx.calibration.first_use import find_or_measure_prior
from glass_mlx.chat_templates import Messages
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.config import Setting, check_seed
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.ablations import ABLATIONS, format_ablation
from glass_mlx.fidelity.evaluation import (
    Outcomes,
    cached_continuations,
    evaluate,
    evaluation_digest,
)
from glass_mlx.fidelity.frontier import read_speedups
from glass_mlx.fidelity.methods import (
    BOUNDED,
    METHODS,
    TEAL,
    UNFUSED_METHODS,
    Evaluation,
    choose_methods,
)
from glass_mlx.fidelity.plots import plot
from glass_mlx.fidelity.prompts import WritingSettings, read_prompts
from glass_mlx.fidelity.quantizations import QUANTIZATIONS, REFERENCE
from glass_mlx.fidelity.report import BASELINE, format_table, summarize
from glass_mlx.fidelity.rivals import RivalChoice, make_rivals
from glass_mlx.fidelity.tasks import TASKS, Sample, write_task
from glass_mlx.fidelity.thresholds import Thresholds
from glass_mlx.files import check_writable, is_device, locked
from glass_mlx.ranking import check_prior_weight
from glass_mlx.reporting.machine import made_with
from glass_mlx.reporting.plotting import require_matplotlib
from glass_mlx.reporting.tables import write_results

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

PROMPTS = Path(__file__).with_name("test_prompts.txt")

_DEFAULT = Setting(density=0.5, vocabulary=1.0)

# The length of the texts that the thresholds of teal are measured on.
_THRESHOLD_TOKENS = 96

# The number of texts of a task, unless --limit sets it.
_TASK_TEXTS = 16


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser."""
    parser = CommandParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument(
        "--prompts",
        type=path,
        default=PROMPTS,
        help="A text file with one prompt per line, or JSONL with prompt or messages "
        "(%(default)s).",
    )
    parser.add_argument("--limit", type=int, help="Use only the first LIMIT prompts.")
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="Score exact answers to questions of this kind instead of continuations of prompts.",
    )
    parser.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="Print one of these tables instead. rankings: how well the beginning of a text and "
        "the prior rank neurons for the remainder; margins: how clear the cut between kept and "
        "dropped neurons is; evidence: KL by the numbers of tokens before and after the selection.",
    )
    add_settings_arguments(parser, f"a density of {_DEFAULT.density}")
    parser.add_argument(
        "--tokens", type=int, default=256, help="Generated tokens per prompt (%(default)s)."
    )
    parser.add_argument(
        "--temp", type=float, default=0.7, help="Sampling temperature (%(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Sampling seed (%(default)s).")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="Prompts continued at once (%(default)s)."
    )
    add_prior_argument(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=["dense", "prompt-only", "prior-only", "glass", "default", "oracle"],
        help=f"Methods to score, some of {', '.join(METHODS)} (%(default)s).",
    )
    parser.add_argument(
        "--prior-weight",
        type=float,
        nargs="+",
        default=[],
        help="Values of λ for --prior-weight-methods.",
    )
    parser.add_argument(
        "--prior-weight-methods",
        nargs="+",
        choices=[name for name in METHODS if name not in UNFUSED_METHODS],
        metavar="METHOD",
        default=["glass"],
        help="Methods to score with every λ of --prior-weight, too (%(default)s).",
    )
    parser.add_argument(
        "--quantizations",
        nargs="+",
        choices=QUANTIZATIONS,
        metavar="BITS",
        default=[],
        help="Score the dense model quantized again, too: at a number of bits, rounded to nearest, "
        f"or by a recipe of mlx_lm.convert; some of {', '.join(QUANTIZATIONS)}. Their bytes are "
        f"a share of those at {REFERENCE} bits.",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="MODEL",
        default=[],
        help="Score other models with the same tokenizer, too: the model quantized otherwise, an "
        "export of it, or a smaller model of its family.",
    )
    parser.add_argument(
        "--slice-rivals",
        action="store_true",
        help=f"Score the method {BOUNDED} on every quantization and checkpoint with the model's "
        "shapes, too, at every setting.",
    )
    parser.add_argument("--json", type=path, help="Write one JSON line per method and density.")
    parser.add_argument("--markdown", type=path, help="Write the table to this file, too.")
    parser.add_argument("--plots", type=path, help="Draw plots into this folder.")
    parser.add_argument(
        "--latency",
        type=path,
        metavar="FILE",
        help="JSON lines of glass-mlx latency for the same model, whose measured speed-ups are "
        "plotted, too.",
    )
    add_load_arguments(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first value that is out of range, before anything is loaded."""
    make_settings(args, _DEFAULT)
    if args.max_kl and BOUNDED not in args.methods:
        raise ValueError(
            f"--max-kl is for the method {BOUNDED}; add it to --methods, or give --density"
        )
    for prior_weight in args.prior_weight:
        check_prior_weight(prior_weight)
    check_minimums(args, tokens=2, batch_size=1, limit=1)
    if args.ablation and (args.json or args.markdown or args.plots or len(args.density) != 1):
        raise ValueError("--ablation prints one table, at one --density, and writes no files")
    check_seed(args.seed)
    check_writable(args.json)
    check_writable(args.markdown)
    check_writable(args.plots, folder=True)
    if args.plots:
        require_matplotlib()
    if args.slice_rivals and not (args.quantizations or args.checkpoints):
        raise ValueError("--slice-rivals is for --quantizations and --checkpoints")
    if args.latency and not args.plots:
        raise ValueError("--latency is for plots; give --plots, too")


def run(args: argparse.Namespace) -> None:
    """Load the model, score the methods, and print and write the results.

    Raises:
        FileNotFoundError: if the model, the prior or the prompts do not exist.
        ValueError: for a bad value, or a model, prior or prompts that cannot be used.
    """
    # 1) Load the model and its prior, choose the methods, and make the texts.
    check(args)
    speedups = read_speedups(args.latency) if args.latency else None
    prompts = [] if args.task else read_prompts(args.prompts)[: args.limit]
    model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
    session = Session.of(model)
    prior = find_or_measure_prior(session, tokenizer, args.prior, model=args.model)
    methods = choose_methods(args.methods, args.prior_weight, args.prior_weight_methods)
    settings = make_settings(args, _DEFAULT)
    choice = RivalChoice(args.quantizations, args.checkpoints, args.slice_rivals)
    rivals = make_rivals(choice, session, tokenizer, prior, settings)
    thresholds = _make_thresholds(session, tokenizer, args) if TEAL in args.methods else None
    evaluation = Evaluation(
        session, tokenizer, prior, methods, settings, args.seed, rivals, thresholds
    )
    samples = make_samples(session, tokenizer, prompts, args)
    if args.ablation:
        texts = (sample.text for sample in tqdm(samples, unit="prompt"))
        print(format_ablation(ABLATIONS[args.ablation](session, prior, texts, args.density[0])))
        return

    # 2) Score every method and density on every text.
    about = made_with() | {
        "model": model_name(args.model),
        "seed": args.seed,
        "temperature": args.temp,
        "dtype": args.dtype,
        "dequantize": args.dequantize,
        "prior": prior.about,
        "what": args.task or args.prompts.name,
    }
    digest = evaluation_digest(evaluation, samples, about)
    is_resumable = args.json is not None and not is_device(args.json)
    partial = args.json.with_name(f"{args.json.name}.partial") if is_resumable else None
    with locked(partial) if partial else nullcontext():
        outcomes = evaluate(evaluation, samples, digest, partial)

    # 3) Print the table, and write files and plots.
    rows = make_rows(outcomes, args.seed, about)
    print(format_table(rows, markdown=False))
    write_results(rows, format_table(rows, markdown=True), args.json, args.markdown)
    if args.plots:
        for file in plot(rows, args.plots, speedups):
            print(f"Wrote {file}", file=sys.stderr)
    if partial:
        partial.unlink()


def _make_thresholds(
    session: Session, tokenizer: TokenizerWrapper, args: argparse.Namespace
) -> Thresholds:
    """Measure the inputs of all linear layers on answers to the prompts that curves are for."""
    settings = WritingSettings(_THRESHOLD_TOKENS, args.temp, args.seed, args.batch_size)
    prompts, load_options = read_prompts(CALIBRATION_PROMPTS), (args.dtype, args.dequantize)
    texts = cached_continuations(session, tokenizer, prompts, settings, load_options)
    return Thresholds(session, [text for text in texts if text.written])


def make_samples(
    session: Session,
    tokenizer: TokenizerWrapper,
    prompts: list[Messages],
    args: argparse.Namespace,
) -> list[Sample]:
    """Write the texts to score: those of a task, or continuations of prompts.

    Raises:
        ValueError: if no text has tokens to score.
    """
    if args.task:
        samples = [*write_task(args.task, tokenizer, args.limit or _TASK_TEXTS, args.seed)]
    else:
        settings = WritingSettings(args.tokens, args.temp, args.seed, args.batch_size)
        load_options = (args.dtype, args.dequantize)
        texts = cached_continuations(session, tokenizer, prompts, settings, load_options)
        samples = [Sample(text, []) for text in texts]
    samples = [sample for sample in samples if len(sample.text.written) > 1]
    if not samples:
        raise ValueError("the model ends every text immediately; there is nothing to score")
    return samples


def make_rows(outcomes: Outcomes, seed: int, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a row of figures for each method and setting, sorted by density.

    Args:
        outcomes: the outcomes of all texts.
        seed: the seed of the resampling.
        about: the conditions, which are added to every row.
    """
    rows = []
    for (method, setting), results in outcomes.items():
        baseline = outcomes.get((BASELINE, setting)) if method != BASELINE else None
        figures = summarize(results, baseline, seed)
        rows.append({"method": method} | setting._asdict() | figures | about)
    return rows


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("fidelity"):
        run(setup_arg_parser().parse())
